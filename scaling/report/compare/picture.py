"""Curves, panels and pictures as data, which matplotlib and plotly draw. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Column = list[float | None]
Kind = Literal["line", "step", "points", "both", "guide", "band"]


@dataclass(frozen=True, slots=True)
class Curve:
    """A line or points of one colour.

    Attributes:
        name: of the run or group; ``group``: the index of its group, which is shown and hidden as a whole; None: a
            line that belongs to no group, such as a fit.
        label: text at its end; "": none.
        errors: half the length of the error bars, at each point; ``texts``: what to write beside each point.
        mark: why the run can't be compared, which a cross at its end shows; "": it can.
        kind: ``guide``: a line to compare with; ``band``: the outline of an area.
        dash: the number of its dashes or of its marker, if it belongs to no group or is drawn as points.
    """

    x: Column
    y: Column
    name: str
    group: int | None
    label: str = ""
    kind: Kind = "line"
    errors: Column = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    dash: int = 0
    mark: str = ""


@dataclass(frozen=True, slots=True)
class Heat:
    """A table of values by batch and learning rate, coloured by value.

    Attributes:
        columns, rows: its labels: learning rates and batches.
        values: by row; ``texts``: what the cells say; ``best``: row and column of the one best value.
    """

    columns: list[str]
    rows: list[str]
    values: list[Column]
    texts: list[list[str]]
    best: tuple[int, int] | None
    more_is_better: bool

    def goodness(self) -> list[Column]:
        """Return each value as a share of the way from the worst to the best; None if missing, or if all are equal."""
        known = [value for row in self.values for value in row if value is not None]
        low, high = min(known, default=0.0), max(known, default=0.0)
        worst, way = (low, high - low) if self.more_is_better else (high, low - high)
        return [[(value - worst) / way if value is not None and way else None for value in row] for row in self.values]


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes; without ``x_ticks``, whoever draws it chooses them.

    ``legend``: name its curves and marked points inside, instead of writing beside them.
    """

    title: str
    x_label: str
    y_label: str
    x_log: bool = False
    y_log: bool = False
    curves: list[Curve] = field(default_factory=list)
    x_ticks: list[float] = field(default_factory=list)
    heat: Heat | None = None
    legend: bool = False


@dataclass(frozen=True, slots=True)
class Picture:
    """Panels that belong together. ``name`` is that of its file, ``about`` says how to read it."""

    name: str
    title: str
    about: str
    panels: list[Panel]
