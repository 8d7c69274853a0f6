"""Find the largest per-GPU batch that fits in memory, by few probes. Pure functions of numbers.

The model is peak(B) = max(step, fixed + per-sample × B): the optimizer step doesn't depend on the batch, and small
batches hide behind it, so that a line through them promises too much. A line is trusted once two consecutive slopes
are equal, and the estimate (footprint.py) once it rises as two probes do. Until then, sizes grow by the estimate,
corrected by the last probe, or by an upper bound of the slope: all that a probe needed beyond ``lasting`` is taken to
grow with the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import lcm
from typing import Any, Literal, NamedTuple

from isobatch.scaling.geometry import counted
from isobatch.scaling.tuning.footprint import slope, straight

PROBES = 5  # at most, with the confirmation
EQUAL = 0.05  # relative difference of slopes that count as equal
RISE = 0.05  # relative rise of a line that isn't noise
TARGETS = (0.4, 0.7, 0.9)  # predicted share of the room of the next probe, as long as no line is trusted
BOUNDED = (0.6, 0.8, 0.9)  # the same where an upper bound predicts
AIM = 0.985  # share of the room that a trusted line is followed to
AFTER_OOM, HALF = 0.85, 0.5  # the most after memory ran out; after it ran out twice, or the process ended
LESS = 0.015  # less of it after each probe that didn't fit
ENOUGH = 0.96  # share of the largest size, or of the room, above which a probe needn't be followed by a larger one
AGREE = (0.85, 1.18)  # ratio of measured to estimated slope within which the estimate is followed
BENT, SAFE = 1.1, 1.03  # rise of an estimate that is beyond its bend, and what is added to it once it is corrected
CREDIBLE = (0.5, 2.0)  # ratio of measurement to estimate within which the estimate is used
EIGHTS = 8  # sizes are multiples of it, which suits the hardware
NEVER = 1 << 40  # samples; a batch that memory doesn't bound

Predict = Callable[[float], float]
"""Return the peak, in bytes, of a per-GPU batch."""


@dataclass(frozen=True, slots=True)
class Limit:
    """Hold a limit on memory in bytes, and where it comes from."""

    bytes: int
    source: str


@dataclass(frozen=True, slots=True)
class Probe:
    """Hold the peak, in bytes, of a step with this per-GPU batch, over all ranks; None: memory ran out.

    ``why``: why it counts as too large, if no error said that memory ran out.
    """

    per_gpu: int
    peak: int | None
    why: str = ""


class FittingProbe(NamedTuple):
    """Hold a probe that fit."""

    per_gpu: int
    peak: int


@dataclass(frozen=True, slots=True)
class Bounds:
    """Hold what a size has to keep to.

    Attributes:
        room: bytes that a step may need: the limit without its margin.
        least: the smallest size, ``first`` the first to try, and ``cap`` the largest that is of use.
        granule: every size is a multiple of it, except ``cap``.
        lasting: bytes in use before a step.
        permitted: whether a size can be planned.
    """

    room: float
    least: int
    first: int
    cap: int = NEVER
    granule: int = 1
    lasting: float = 0.0
    permitted: Callable[[int], bool] = lambda size: True

    def whole(self, size: float) -> int:
        """Return the largest permitted size up to ``size``; 0 if there is none."""
        if size >= self.cap:
            return self.cap
        stride = stride_at(size, self.granule)
        found = int(size) // stride * stride
        while found >= self.least and not self.permitted(found):
            found -= stride
        return found if found >= self.least else 0


def stride_at(size: float, granule: int) -> int:
    """Return the distance of two sizes near ``size``: a multiple of 8 and of ``granule``, or only of it below that."""
    eights = lcm(EIGHTS, granule)
    return eights if size >= eights else granule


def next_size(probes: Sequence[Probe], bounds: Bounds, prior: Predict | None = None) -> int | None:
    """Return the size to probe next; None if the search is over.

    No returned size is predicted to need more than the room, except the smallest, of which nothing is known.

    Args:
        prior: the estimated peak by size.
    """
    if not probes:
        return min(bounds.first, bounds.cap)
    fits, failed = _split(probes, bounds.room)
    if not fits:
        return bounds.least if min(failed) > bounds.least else None
    if len(probes) >= PROBES:
        return None
    best = fits[-1]
    lost = [probe.per_gpu * (HALF if probe.why else AFTER_OOM) for probe in probes if probe.peak is None]
    if all(probe.peak is None for probe in probes[-2:]):  # nothing predicts where memory runs out
        lost.append(probes[-1].per_gpu * HALF)
    most = min([bounds.cap, *(size - 1 for size in failed), *map(int, lost)])
    if best.per_gpu >= most:
        return None
    line = trusted_line(fits) or trusted_estimate(fits, prior)
    share = (best.peak - bounds.lasting) / max(1.0, bounds.room - bounds.lasting)
    enough = best.per_gpu >= ENOUGH * largest(line, bounds.room, most) if line else share >= ENOUGH
    if (line or failed) and enough:
        return None
    aim = AIM
    if line is None and len(probes) < PROBES - 1:
        aim = max((TARGETS if prior else BOUNDED)[len(probes) - 1], (1 + share) / 2)
    predict = line or _cautious(fits, bounds, prior)
    for wanted in (aim - LESS * len(failed), 1.0):  # the second: where a single stride is more than the first leaves
        left = (1 - wanted) * (bounds.room - bounds.lasting)
        size = bounds.whole(largest(predict, bounds.room - left, most))
        if size > best.per_gpu:
            return size
    return None


def _split(probes: Sequence[Probe], room: float) -> tuple[list[FittingProbe], list[int]]:
    """Return the probes that fit, by size, and the sizes that didn't; a size above one that didn't doesn't fit."""
    failed = sorted(probe.per_gpu for probe in probes if probe.peak is None or probe.peak > room)
    most = min(failed, default=NEVER)
    fits = [
        FittingProbe(probe.per_gpu, probe.peak) for probe in probes if probe.peak is not None and probe.per_gpu < most
    ]
    return sorted(fits), failed


def best_of(probes: Sequence[Probe], room: float) -> FittingProbe | None:
    """Return the largest probe within ``room``."""
    fits, _ = _split(probes, room)
    return fits[-1] if fits else None


def trusted_line(fits: Sequence[FittingProbe]) -> Predict | None:
    """Return the line through the last two probes, if the two last slopes are equal."""
    if len(fits) < 3:
        return None
    before, last = fits[-2:]
    if last.peak - before.peak < RISE * last.peak or not straight(fits, EQUAL):
        return None
    return _through(last, slope(before, last))


def trusted_estimate(fits: Sequence[FittingProbe], prior: Predict | None) -> Predict | None:
    """Return the estimate from the last probe on, if it rose as the last two probes did."""
    if prior is None or len(fits) < 2:
        return None
    low, high = fits[-2:]
    measured, estimated = (
        slope(low, high),
        slope(*(FittingProbe(fit.per_gpu, int(prior(fit.per_gpu))) for fit in (low, high))),
    )
    if high.peak - low.peak < RISE * high.peak or estimated <= 0 or not AGREE[0] <= measured / estimated <= AGREE[1]:
        return None
    ratio, known = measured / estimated, prior
    return lambda size: high.peak + ratio * (known(size) - known(high.per_gpu))


def _through(fit: FittingProbe, per_sample: float) -> Predict:
    return lambda size: fit.peak + per_sample * (size - fit.per_gpu)


def _cautious(fits: Sequence[FittingProbe], bounds: Bounds, prior: Predict | None) -> Predict:
    """Return a prediction that is more likely too large than too small, by the estimate or by an upper bound."""
    last = fits[-1]
    needed = max(1.0, last.peak - bounds.lasting)
    bound = _through(last, needed / last.per_gpu)
    steepest = max((slope(low, high) for low, high in pairwise(fits)), default=0.0)
    if prior is not None:
        ratio = needed / max(1.0, prior(last.per_gpu) - bounds.lasting)
        if CREDIBLE[0] <= ratio <= CREDIBLE[1]:
            lasting, known = bounds.lasting, prior
            seen = _through(last, steepest)
            # below the estimate's own bend, the ratio is of something else than what grows
            rises = known(last.per_gpu) > BENT * known(fits[0].per_gpu)
            factor = SAFE * ratio if rises else max(1.0, ratio)
            return lambda size: min(bound(size), max(seen(size), lasting + factor * (known(size) - lasting)))
    return bound


def largest(predict: Predict, room: float, most: int) -> int:
    """Return the largest size up to ``most`` whose predicted peak is at most ``room``; 0 if there is none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if predict(middle) <= room else (low, middle - 1)
    return low


Outcome = Literal["largest", "cap", "at least", "nothing"]


@dataclass(frozen=True, slots=True)
class Memory:
    """Hold the largest per-GPU batch that fits, and how it was found. Sizes in GB are in 1e9 bytes.

    Attributes:
        per_gpu: samples; it was run. 0: nothing fits.
        outcome: ``cap``: a larger one is of no use, since no rank gets more samples; ``at least``: a larger one may
            fit, but none is predicted to.
        limit_gb, limit_from: the memory that a rank may use, and what sets it; ``margin``: the share that stays free.
        peak_gb: the peak at ``per_gpu``; ``fixed_gb`` and ``per_sample_mb``: the line through the last two probes.
        probes: each a whole step: its per-GPU batch, and its peak, None if memory ran out; with ``why`` if no error
            said so.
        estimate: the largest per-GPU batch by the estimate, and the relative error of its peak at ``per_gpu``; None
            if the model couldn't be traced.
        outlook: what would fit, by the estimate, as ``action=plan plan.memory=true`` gives it; None if something fits.
    """

    per_gpu: int
    outcome: Outcome
    limit_gb: float
    limit_from: str
    margin: float
    peak_gb: float | None
    fixed_gb: float | None
    per_sample_mb: float | None
    probes: tuple[dict[str, Any], ...]
    estimate: dict[str, Any] | None
    outlook: dict[str, Any] | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"probes": list(self.probes)}


def outcome_of(best: FittingProbe | None, probes: Sequence[Probe], bounds: Bounds) -> Outcome:
    """Return how the search ended at ``best``."""
    if best is None:
        return "nothing"
    if best.per_gpu >= bounds.cap:
        return "cap"
    fits, failed = _split(probes, bounds.room)
    stride = best.per_gpu + max(EIGHTS, bounds.granule)
    line = trusted_line(fits)
    near = best.peak - bounds.lasting >= ENOUGH * (bounds.room - bounds.lasting)
    known = near or (line is not None and best.per_gpu >= ENOUGH * largest(line, bounds.room, bounds.cap))
    return "largest" if known or (failed and min(failed) <= stride) else "at least"


def concluded(
    probes: Sequence[Probe], bounds: Bounds, limit: Limit, margin: float, prior: Predict | None = None
) -> Memory:
    """Return what the probes found."""
    best = best_of(probes, bounds.room)
    fits, _ = _split(probes, bounds.room)
    fixed = per_sample = None
    if len(fits) > 1:
        per_sample = max(0.0, slope(*fits[-2:]))
        fixed = fits[-1].peak - per_sample * fits[-1].per_gpu
    size = best.per_gpu if best else 0
    estimate = None
    if prior is not None:
        error = None if best is None else prior(size) / best.peak - 1
        estimate = {"per_gpu": bounds.whole(largest(prior, bounds.room, bounds.cap)), "error": error}
    return Memory(
        per_gpu=size,
        outcome=outcome_of(best, probes, bounds),
        limit_gb=limit.bytes / 1e9,
        limit_from=limit.source,
        margin=margin,
        peak_gb=None if best is None else best.peak / 1e9,
        fixed_gb=None if fixed is None else fixed / 1e9,
        per_sample_mb=None if per_sample is None else per_sample / 1e6,
        probes=tuple(
            {"per_gpu": probe.per_gpu, "peak_gb": None if probe.peak is None else probe.peak / 1e9}
            | ({"why": probe.why} if probe.why else {})
            for probe in probes
        ),
        estimate=estimate,
    )


def from_json(found: Mapping[str, Any]) -> Memory:
    """Return a stored result. Raises ValueError if it isn't one."""
    try:
        fields = {name: found[name] for name in Memory.__dataclass_fields__}
        if type(fields["per_gpu"]) is not int or fields["per_gpu"] < 0:
            raise ValueError(f"per_gpu is {fields['per_gpu']!r}")
        return Memory(**{**fields, "probes": tuple(fields["probes"])})
    except (KeyError, TypeError) as error:
        raise ValueError(f"not the result of a search: {type(error).__name__}: {error}") from None


def told(found: Memory) -> str:
    """Return the result in one line, with its reason."""
    room = f"{found.limit_gb * (1 - found.margin):.3g} GB ({found.limit_from}, less {found.margin:.0%})"
    lost = "".join(
        f"; {counted(probe['per_gpu'], 'sample')} counted as too large, since {probe['why']}"
        for probe in found.probes
        if probe.get("why")
    )
    if not found.per_gpu:
        smallest = min((probe["per_gpu"] for probe in found.probes), default=1)
        return f"nothing fits: a step with {counted(smallest, 'sample')} per rank needs more than {room}{lost}"
    needs = f"{counted(found.per_gpu, 'sample')} need {found.peak_gb:.3g} GB of {room}{lost}"
    if found.outcome == "cap":
        return f"per-GPU batch {found.per_gpu:,}: all of a rank's samples fit; {needs}"
    kind = "the largest that fits" if found.outcome == "largest" else "the largest that is known to fit"
    return f"per-GPU batch {found.per_gpu:,}, {kind}; {needs}"
