"""Say whether smaller batches ended in flatter minima, by the sharpness that action=tune measured. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from isobatch.scaling.report.compare.comparison import Comparison
from isobatch.scaling.report.compare.groups import Group
from isobatch.scaling.report.compare.values import Values
from isobatch.scaling.report.compare.words import number
from isobatch.scaling.report.run import Run
from isobatch.scaling.tuning.spread import Spread, alike, half_width

MEASURES = {"sharpness": "the largest curvature", "perturbed": "the loss added by a perturbation"}
APART = 1.1  # factor between two losses from which on they differ

Sized = Sequence[tuple[Group, Values]]


def flatness_of(comparison: Comparison) -> Iterator[str]:
    """Yield a sentence for each family of runs with several batches of which the sharpness is known."""
    best = comparison.best_lrs()
    for family in dict.fromkeys(group.family for group, _ in best):
        of_family = [(group, values) for group, values in best if group.family == family]
        parts = [text for name in MEASURES if (text := _compared(name, of_family))]
        if parts:
            of = f"{family}: " if family else ""
            yield f"{of}did smaller batches end flatter? {'; '.join(parts)}{_caveat(of_family)}"


def _caveat(groups: Sized) -> str:
    """Return why the ends of the smallest and the largest batch can't be compared as minima; "" if they can.

    Curvature changes with the loss along a run, so that a batch that learned less looks flatter or sharper for that.
    """
    measured = {group.global_size: group for group, values in groups if group.global_size and _known(values)}
    small, large = min(measured), max(measured)
    one, other = _loss(measured[small]), _loss(measured[large])
    found = list[str]()
    if one and other and max(one.mean, other.mean) > APART * min(one.mean, other.mean) and not alike(one, other):
        ends = f"{number(one.mean)} at batch {small:,}, {number(other.mean)} at batch {large:,}"
        found.append(f"their training losses differ ({ends})")
    falling = [f"batch {size:,}" for size in (small, large) if any(map(_still_falls, measured[size].counted))]
    if falling:
        found.append(f"the training loss still falls at the end of {' and '.join(falling)}")
    return f"; but {' and '.join(found)}, and curvature changes with the loss" if found else ""


def _known(values: Values) -> bool:
    """Return whether a measure of sharpness is known of runs that have finished."""
    return not values.open and any(getattr(values, name) for name in MEASURES)


def _loss(group: Group) -> Spread | None:
    """Return the training loss of a group's runs, of the samples at which their sharpness was measured."""
    tuned = [run.tuned.get("sharpness") or {} for run in group.counted]
    return Spread.of([part["loss"] for part in tuned if "loss" in part])


def _still_falls(run: Run) -> bool:
    """Return whether the last fifth of a run's training loss is below the fifth before it, beyond noise."""
    losses = [loss for loss in run.curves.steps.get("loss", ()) if loss is not None]
    part = len(losses) // 5
    before, last = Spread.of(losses[-2 * part : -part]), Spread.of(losses[len(losses) - part :])
    return bool(before and last and before.mean > APART * last.mean and not alike(before, last))


def _compared(name: str, groups: Sized) -> str:
    """Return how a measure of sharpness changes from the smallest batch to the largest; "" if that isn't known."""
    measured = {
        group.global_size: value
        for group, values in groups
        if group.global_size and _known(values) and (value := getattr(values, name))
    }
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
