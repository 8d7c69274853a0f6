"""Describe the pictures of a comparison, for whoever draws them. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from isobatch.scaling.report.compare.colours import Colour, distinct, ordered
from isobatch.scaling.report.compare.comparison import Comparison
from isobatch.scaling.report.compare.groups import STILL_GOING, Group, run_label, why_not_counted
from isobatch.scaling.report.compare.values import Values
from isobatch.scaling.report.compare.words import spread
from isobatch.scaling.tuning.spread import Spread

Column = list[float | None]
AXES = {"step": "steps", "samples": "samples", "time_s": "time in seconds"}
RANGE_FOR_LOG = 12.0  # an axis is logarithmic where its values span more than this factor
MOST_MEASURES = 4


@dataclass(frozen=True, slots=True)
class Curve:
    """A line or points of one colour.

    Attributes:
        name: of the run or group; ``group``: the index of its group, which is shown and hidden as a whole; None: a
            line that belongs to no group, such as a fit.
        label: text at its end; "": none.
        errors: half the length of the error bars, at each point; ``texts``: what to write beside each point.
        mark: why the run can't be compared, which a cross at its end shows; "": it can.
        dash: the number of its dashes or of its marker, if it belongs to no group or is drawn as points.
    """

    x: Column
    y: Column
    name: str
    group: int | None
    label: str = ""
    kind: Literal["line", "step", "points", "both", "guide"] = "line"
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


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes; without ``x_ticks``, whoever draws it chooses them."""

    title: str
    x_label: str
    y_label: str
    x_log: bool = False
    y_log: bool = False
    curves: list[Curve] = field(default_factory=list)
    x_ticks: list[float] = field(default_factory=list)
    heat: Heat | None = None


@dataclass(frozen=True, slots=True)
class Style:
    """How a group is drawn. ``shown``: from the start, rather than once it is asked for."""

    colour: Colour
    dash: int
    shown: bool


@dataclass(frozen=True, slots=True)
class Picture:
    """Panels that belong together. ``name`` is that of its file, ``about`` says how to read it."""

    name: str
    title: str
    about: str
    panels: list[Panel]


def styles_of(comparison: Comparison) -> list[Style]:
    """Return the style of each group: its colour tells the batch, its dashes the family.

    Where all have one batch, the colour tells the group. Where a batch has several learning rates, only the best one is
    shown at first.
    """
    groups = comparison.groups
    batches = sorted({group.global_size or 0 for group in groups})
    families = list(dict.fromkeys(group.family for group in groups))
    shown = {id(group) for group, _ in comparison.best_lrs()} if len(batches) > 1 else set(map(id, groups))
    if len(batches) > 1:
        colours = dict(zip(batches, ordered(len(batches)), strict=True))
        return [
            Style(colours[group.global_size or 0], families.index(group.family), id(group) in shown) for group in groups
        ]
    return [Style(colour, 0, True) for colour in distinct(len(groups))]


def pictures_of(comparison: Comparison) -> list[Picture]:
    """Return the pictures that the runs have values for."""
    made = [_losses(comparison), _evaluations(comparison), _by_time(comparison), _course(comparison)]
    if len(comparison.groups) > 1:
        made += [_by_batch(comparison), _grids(comparison), _targets(comparison)]
    return [picture for picture in made if picture.panels]


def _losses(comparison: Comparison) -> Picture:
    several = len({group.global_size for group in comparison.groups}) > 1
    about = "The same runs twice: look for where small and large batches change places." if several else ""
    panels = list(_panels(comparison, ("loss",), ("step", "samples")))
    return Picture("loss", "Training loss by steps and by samples", about, panels)


def _evaluations(comparison: Comparison) -> Picture:
    panels = list(_panels(comparison, _evaluated(comparison), ("step", "samples")))
    return Picture("evaluations", "Evaluations by steps and by samples", "Each point is one evaluation.", panels)


def _by_time(comparison: Comparison) -> Picture:
    panels = list(_panels(comparison, ("loss", *_evaluated(comparison)[:1]), ("time_s",)))
    return Picture("time", "By time", "Seconds of training, without evaluations.", panels)


def _evaluated(comparison: Comparison) -> list[str]:
    """Return the names of the first few measures of the evaluations, the compared one first."""
    names = dict.fromkeys(name for run in comparison.runs for name in run.curves.evaluations if "/" in name)
    first = comparison.metric.name if comparison.metric else ""
    return sorted(names, key=lambda name: (name != first, not name.startswith("val/")))[:MOST_MEASURES]


def _panels(comparison: Comparison, names: Sequence[str], axes: Sequence[str]) -> Iterator[Panel]:
    """Yield a panel for each measure and axis that the runs have."""
    for name in names:
        for axis in axes:
            if curves := list(_curves(comparison, axis, name, evaluations=name != "loss")):
                shown = "training loss" if name == "loss" else name
                title = f"{shown[0].upper() + shown[1:] if name == 'loss' else shown} by {AXES[axis].partition(' ')[0]}"
                yield Panel(title, AXES[axis], shown, *_log(curves), curves)


def _course(comparison: Comparison) -> Picture:
    wanted = {
        "lr": ("Learning rate", "learning rate"),
        "global_size": ("Global batch", "samples per step"),
        "samples_per_s": ("Throughput", "samples per second"),
        "noise/scale": ("Gradient noise scale", "samples"),
    }
    panels = [
        Panel(title, "samples", label, *_log(curves), curves)
        for name, (title, label) in wanted.items()
        if (curves := list(_curves(comparison, "samples", name, evaluations=False)))
    ]
    return Picture("course", "Schedule, throughput and noise", "", panels)


def _curves(comparison: Comparison, axis: str, name: str, evaluations: bool) -> Iterator[Curve]:
    """Yield the curve of each run that has both columns; the first run of a group carries its label."""
    for index, group in enumerate(comparison.groups):
        label = group.label if len(comparison.groups) > 1 else ""
        for run in group.runs:
            columns = run.curves.evaluations if evaluations else run.curves.steps
            if axis in columns and name in columns:
                kind: Literal["step", "both", "line"] = "both" if evaluations else "line"
                kind = "step" if name == "global_size" else kind
                why = why_not_counted(run) or ""
                mark = "" if why in STILL_GOING else why
                yield Curve(columns[axis], columns[name], run_label(group, run), index, label, kind, mark=mark)
                label = ""


def _by_batch(comparison: Comparison) -> Picture:
    """Return the measure at the end by batch, a curve for each family, at the best learning rate."""
    name = comparison.metric.name if comparison.metric else ""
    curves = list(_by(comparison, comparison.best_lrs(), lambda values: values.last))
    for index, group in enumerate(comparison.groups):
        runs = [run for run in group.counted if name in run.measures]
        values: Column = [run.measures[name].last for run in runs]
        if len(runs) > 1 and curves:
            curves.append(Curve([group.global_size] * len(runs), values, group.label, index, kind="points"))
    title = f"{name} at the end, by batch"
    panels = [_over_batches(title, name, False, curves)] if curves else []
    return Picture("by-batch", "By batch", "Mean and standard deviation over seeds, and each seed.", panels)


def _over_batches(title: str, y_label: str, y_log: bool, curves: list[Curve]) -> Panel:
    """Return a panel whose ticks are the batches."""
    ticks = sorted({x for curve in curves for x in curve.x if x is not None and curve.kind != "guide"})
    return Panel(title, "global batch in samples", y_label, True, y_log, curves, ticks)


def _by(
    comparison: Comparison, pairs: Sequence[tuple[Group, Values]], get: Callable[[Values], Spread | None]
) -> Iterator[Curve]:
    """Yield a curve for each family through those of its groups in ``pairs``, which differ in batch."""
    families = dict.fromkeys(group.family for group in comparison.groups)
    for number, family in enumerate(families):
        points = [
            (group.global_size, value, group.label)
            for group, values in pairs
            if group.family == family and group.global_size and (value := get(values))
        ]
        if len(points) > 1 or (points and len(families) > 1):
            yield Curve(
                [x for x, _, _ in points],
                [value.mean for _, value, _ in points],
                family or "mean",
                None,
                family if len(families) > 1 else "",
                "both",
                [value.deviation for _, value, _ in points],
                [label for _, _, label in points],
                number,
            )


def _grids(comparison: Comparison) -> Picture:
    """Return a table by batch and learning rate for each family that has several of both."""
    name = comparison.metric.name if comparison.metric else ""
    panels = []
    for family in dict.fromkeys(group.family for group in comparison.groups):
        members = [(group, values) for group, values in comparison.pairs() if group.family == family and group.lr_peak]
        batches = sorted({group.global_size for group, _ in members if group.global_size})
        lrs = sorted({group.lr_peak for group, _ in members if group.lr_peak})
        several = [batch for batch in batches if sum(group.global_size == batch for group, _ in members) > 1]
        if len(several) < 2:
            continue
        cells = {(group.global_size, group.lr_peak): values for group, values in members}
        found = [[cells.get((batch, lr)) for lr in lrs] for batch in batches]
        means: list[Column] = [[cell.last.mean if cell and cell.last else None for cell in row] for row in found]
        texts = [[_cell(cell) for cell in row] for row in found]
        most = comparison.metric is not None and comparison.metric.direction == "max"
        known = [(mean, (r, c)) for r, row in enumerate(means) for c, mean in enumerate(row) if mean is not None]
        top = (max if most else min)([mean for mean, _ in known], default=None)
        bests = [cell for mean, cell in known if mean == top]
        best = bests[0] if len(bests) == 1 else None
        heat = Heat([f"{lr:.4g}" for lr in lrs], [f"{batch:,}" for batch in batches], means, texts, best, most)
        panels.append(Panel(f"{name} {family}".strip(), "learning rate", "global batch", heat=heat))
    return Picture("batch-by-lr", "Batch and learning rate", "Mean ± standard deviation over seeds.", panels)


def _cell(values: Values | None) -> str:
    if values is None:
        return ""
    return spread(values.last) if values.last else "no finished run"


def _targets(comparison: Comparison) -> Picture:
    """Return what the target took by batch, at its quickest learning rate, with the fit, and time against samples."""
    if len({group.global_size for group in comparison.groups}) < 2:
        return Picture("target", "", "", [])
    gets: dict[str, Callable[[Values], Spread | None]] = {
        "steps": lambda values: values.to_steps,
        "samples": lambda values: values.to_samples,
        "seconds": lambda values: values.to_time_s,
    }
    panels = []
    for unit, get in gets.items():
        curves = list(_by(comparison, comparison.quickest(), get))
        if curves and unit == "samples":
            curves += _fits(comparison)
        if curves:
            title = f"{unit.capitalize()} to {comparison.target}"
            panels.append(_over_batches(title, f"{unit} to the target", True, curves))
    if points := _time_against_samples(comparison):
        panels.append(
            Panel("Time against samples", "samples to the target", "seconds to the target", True, True, points)
        )
    about = "Down is better. In the last panel, a group is worth choosing if no other is both left of it and below it."
    return Picture("target", f"To {comparison.target}", about, panels)


def _time_against_samples(comparison: Comparison) -> list[Curve]:
    """Return a point for the quickest group of each batch, and a line through those that no other group beats."""
    families = list(dict.fromkeys(group.family for group in comparison.groups))
    found = [
        (values.to_samples.mean, values.to_time_s.mean, group)
        for group, values in comparison.quickest()
        if values.to_samples and values.to_time_s
    ]
    if len(found) < 2:
        return []
    indices = {id(group): index for index, group in enumerate(comparison.groups)}
    curves = [
        Curve([x], [y], group.label, indices[id(group)], "", "points", [], [group.label], families.index(group.family))
        for x, y, group in found
    ]
    best = sorted((x, y) for x, y, _ in found if not any(a <= x and b <= y and (a, b) != (x, y) for a, b, _ in found))
    front: tuple[Column, Column] = [x for x, _ in best], [y for _, y in best]
    return [*curves, Curve(*front, "not beaten in both", None, kind="guide")]


def _fits(comparison: Comparison) -> list[Curve]:
    curves = []
    for family, fit in comparison.fits.items():
        batches = [group.global_size for group in comparison.groups if group.family == family and group.global_size]
        if fit.critical_batch is None or not batches:
            continue
        low, high = min(batches), max(batches)
        xs: Column = [low * (high / low) ** (i / 40) for i in range(41)]
        name = f"fit, critical batch {fit.critical_batch:,.0f}"
        curves.append(Curve(xs, [fit.predict(x or 1) for x in xs], name, None, name, "guide"))
    return curves


def _log(curves: Sequence[Curve]) -> tuple[bool, bool]:
    """Return whether each axis of these curves spans so much that it should be logarithmic."""
    ends = [curve.x[-1] for curve in curves if curve.x and curve.x[-1]]
    ys = [y for curve in curves for y in curve.y if y is not None]
    x_log = len(ends) > 1 and max(ends) > RANGE_FOR_LOG * min(ends)  # type: ignore[type-var, operator]
    return x_log, bool(ys) and min(ys) > 0 and max(ys) > RANGE_FOR_LOG * min(ys)
