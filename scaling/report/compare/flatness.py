"""Say whether smaller batches ended in flatter minima, by the sharpness that action=tune measured. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from isobatch.scaling.report.compare.comparison import Comparison
from isobatch.scaling.report.compare.values import Values
from isobatch.scaling.report.compare.words import number
from isobatch.scaling.tuning.spread import Spread, half_width

MEASURES = {"sharpness": "the largest curvature", "perturbed": "the loss added by a perturbation"}


def flatness_of(comparison: Comparison) -> Iterator[str]:
    """Yield a sentence for each family of runs with several batches of which the sharpness is known."""
    best = comparison.best_lrs()
    for family in dict.fromkeys(group.family for group, _ in best):
        of_family = [(group.global_size, values) for group, values in best if group.family == family]
        parts = [text for name in MEASURES if (text := _compared(name, of_family))]
        if parts:
            of = f"{family}: " if family else ""
            yield f"{of}did smaller batches end flatter? {'; '.join(parts)}"


def _compared(name: str, groups: Sequence[tuple[int | None, Values]]) -> str:
    """Return how a measure of sharpness changes from the smallest batch to the largest; "" if that isn't known."""
    measured = {size: value for size, values in groups if size and not values.open and (value := getattr(values, name))}
    if len(measured) < 2:
        return ""
    small, large = min(measured), max(measured)
    one, other = measured[small], measured[large]
    ends = f"{number(one.mean)} at batch {small:,}, {number(other.mean)} at batch {large:,}"
    means = [measured[size].mean for size in sorted(measured)]
    in_order = means in (sorted(means), sorted(means, reverse=True))
    mixed = "" if in_order else ", not in order between them"
    return f"{_verdict(one, other)} by {MEASURES[name]} ({ends}{mixed})"


def _verdict(small: Spread, large: Spread) -> str:
    if small.mean == large.mean:
        return "no difference"
    flatter = "yes" if small.mean < large.mean else "no"
    half = half_width(small, large)
    if half is None:
        return f"{flatter}, though perhaps by chance, as too few seeds tell,"
    return flatter if abs(small.mean - large.mean) > half else "seeds differ as much"
