"""Say whether smaller batches ended in flatter minima, by the sharpness that action=tune measured. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from isobatch.scaling.report.compare.comparison import Comparison
from isobatch.scaling.report.compare.groups import Group
from isobatch.scaling.report.compare.values import Values
from isobatch.scaling.report.compare.words import number
from isobatch.scaling.report.run import Run
from isobatch.scaling.tuning.spread import Spread, alike

MEASURES = {"sharpness": "the largest curvature", "perturbed": "the loss added by a perturbation"}
APART = 1.1  # factor between two losses from which on they differ

Sized = Sequence[tuple[Group, Values]]


def flatness_of(comparison: Comparison) -> Iterator[str]:
    """Yield an answer for each family of runs with several batches of which the sharpness is known."""
    best = comparison.best_lrs()
    for family in dict.fromkeys(group.family for group, _ in best):
        of_family = [(group, values) for group, values in best if group.family == family]
        compared = [found for name in MEASURES if (found := _compared(name, of_family))]
        if compared:
            of = f"{family}: " if family else ""
            sentences = [answer for answer, _ in compared] + [chance for _, chance in compared] + [_caveat(of_family)]
            yield f"{of}did smaller batches end flatter? {'. '.join(filter(None, dict.fromkeys(sentences)))}"


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
    return f"But {' and '.join(found)}, and curvature changes with the loss" if found else ""


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


def _compared(name: str, groups: Sized) -> tuple[str, str] | None:
    """Return whether the smallest batch is flatter than the largest by a measure, and whether that may be chance.

    Return None if the measure isn't known at two batches.
    """
    measured = {
        group.global_size: value
        for group, values in groups
        if group.global_size and _known(values) and (value := getattr(values, name))
    }
    if len(measured) < 2:
        return None
    small, large = min(measured), max(measured)
    means = [measured[size].mean for size in sorted(measured)]
    in_order = means in (sorted(means), sorted(means, reverse=True))
    mixed = "" if in_order else ". The batches between them aren't in order"
    single = [size for size in (small, large) if measured[size].n == 1]
    where = "each" if len(single) == 2 else f"at batch {single[0]:,}" if single else ""
    chance = f"With one seed {where} this may be chance" if single else ""
    return f"{_answer(MEASURES[name], small, measured[small], large, measured[large])}{mixed}", chance


def _answer(measure: str, small: int, one: Spread, large: int, other: Spread) -> str:
    """Return which of two batches ended flatter."""
    if one.mean == other.mean:
        return f"No: by {measure}, batch {small:,} and batch {large:,} ended alike ({number(one.mean)})"
    if alike(one, other):
        ends = f"{number(one.mean)} at batch {small:,}, {number(other.mean)} at batch {large:,}"
        return f"Not clear: by {measure}, seeds differ as much as the batches ({ends})"
    word, flatter = ("Yes", small) if one.mean < other.mean else ("No", large)
    low, high = sorted((one.mean, other.mean))
    return f"{word}: by {measure}, batch {flatter:,} ended flatter ({number(low)} against {number(high)})"
