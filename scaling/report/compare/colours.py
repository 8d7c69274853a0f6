"""Choose colours that people with any colour vision can tell apart, for light and for dark backgrounds. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from isobatch.scaling.report.compare.comparison import Comparison
from isobatch.scaling.report.compare.groups import failure_of

# Stops of viridis (Smith & van der Walt 2015), whose lightness grows evenly.
VIRIDIS = (
    "#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725",
)  # fmt: skip
LIGHT_RANGE, DARK_RANGE = (0.0, 0.72), (0.35, 1.0)  # parts of it that are seen on a light and a dark background
# Okabe & Ito 2008, without black and yellow.
DISTINCT = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DISTINCT_ON_DARK = ("#56b4e9", "#ff8a3d", "#2cc79a", "#e6a3c9", "#f0b429", "#9ccff0")

SHOWN = "of each batch, only the best learning rate, the quickest one and those with failed runs are drawn"


class Colour(NamedTuple):
    """A colour on a light and on a dark background."""

    light: str
    dark: str


@dataclass(frozen=True, slots=True)
class Style:
    """How a group is drawn. ``shown``: in plots, and in the page from the start, rather than once it is chosen."""

    colour: Colour
    dash: int
    shown: bool


def styles_of(comparison: Comparison) -> list[Style]:
    """Return the style of each group: its colour tells the batch, its dashes the family.

    Where all have one batch, the colour tells the group. Where there are several batches, only the groups that SHOWN
    names are shown at first.
    """
    groups = comparison.groups
    batches = sorted({group.global_size or 0 for group in groups})
    families = list(dict.fromkeys(group.family for group in groups))
    if len(batches) > 1:
        shown = {id(group) for group, _ in (*comparison.best_lrs(), *comparison.quickest())}
        shown |= {id(group) for group in groups if any(map(failure_of, group.runs))}
        colours = dict(zip(batches, ordered(len(batches)), strict=True))
        return [
            Style(colours[group.global_size or 0], families.index(group.family), id(group) in shown) for group in groups
        ]
    return [Style(colour, index // len(DISTINCT), True) for index, colour in enumerate(distinct(len(groups)))]


def note_on(styles: Sequence[Style]) -> str:
    """Return which groups plots show, as a sentence; "" if they show all."""
    return "" if all(style.shown for style in styles) else f"{SHOWN[0].upper()}{SHOWN[1:]}."


def ordered(count: int) -> list[Colour]:
    """Return ``count`` colours whose lightness grows, for values that have an order."""
    shares = [index / (count - 1) if count > 1 else 0.4 for index in range(count)]
    return [Colour(_at(share, LIGHT_RANGE), _at(share, DARK_RANGE)) for share in shares]


def distinct(count: int) -> list[Colour]:
    """Return ``count`` colours for values without an order, which repeat if there are many."""
    pairs = list(map(Colour, DISTINCT, DISTINCT_ON_DARK))
    return [pairs[index % len(pairs)] for index in range(count)]


def shade(goodness: float | None) -> tuple[str, str]:
    """Return the colours of a cell and of its text: the better its value, the lighter; "" without a value."""
    if goodness is None:
        return "", ""
    return VIRIDIS[min(len(VIRIDIS) - 1, int(goodness * len(VIRIDIS)))], "#111111" if goodness > 0.55 else "#ffffff"


def _at(share: float, within: Sequence[float]) -> str:
    place = (within[0] + share * (within[1] - within[0])) * (len(VIRIDIS) - 1)
    below = min(int(place), len(VIRIDIS) - 2)
    one, other = ([int(VIRIDIS[stop][i : i + 2], 16) for i in (1, 3, 5)] for stop in (below, below + 1))
    mixed = [round(a + (b - a) * (place - below)) for a, b in zip(one, other, strict=True)]
    return "#" + "".join(f"{part:02x}" for part in mixed)
