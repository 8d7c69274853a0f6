"""Fit how many samples a target takes at each global batch, and predict it for other batches. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from isobatch.scaling.errors import UserError
from isobatch.scaling.geometry import counted
from isobatch.scaling.quantiles import student
from isobatch.scaling.tuning.critical import Array, candidates, growth, interval_of

Points = tuple[tuple[float, float], ...]

FEWEST = 3  # batches for two parameters
FOR_POWER = 6  # batches from which the sharpness of the bend is fitted, too
POWERS = 0.5 * 2 ** (np.arange(27) / 8)  # 0.5 to 4.8
LARGEST = 1e50  # numbers beyond it are taken for mistakes


@dataclass(frozen=True, slots=True)
class Fit:
    """The fitted law E(B) = E_min·(1 + (B/B_crit)^p)^(1/p), E in samples to the target.

    Attributes:
        least: E_min, the samples that small batches need; None without a fit.
        critical_batch: B_crit, where a step saves as much as it costs; None if the batches don't show it.
        interval: its 95 % interval (profile likelihood, equal relative errors); a side is None if it is open.
        batches: how many it is from.
        power: p; 1 unless there are six batches or more.
        note: why there is no critical batch; "" if there is one.
        points: batches and their samples, in order of the batch.
        plain: the fit with p = 1 where this one has another p; None where it is p = 1 itself.
    """

    least: float | None
    critical_batch: float | None
    interval: tuple[float | None, float | None]
    batches: int
    power: float = 1.0
    note: str = ""
    points: Points = ()
    plain: Fit | None = None

    def predict(self, batch: float) -> float | None:
        """Return the samples that ``batch`` needs to the target; None without a critical batch."""
        if self.least is None or self.critical_batch is None:
            return None
        return self.least * math.exp(float(growth(batch, self.critical_batch, self.power)))

    def expected(self, batch: float) -> tuple[float, float] | None:
        """Return the 95 % interval of the samples that one more run at ``batch`` would take; None without a fit.

        It has every outcome that, as one more point, could be fitted without the fit to all points getting
        significantly worse than that to the measured ones. For a straight line this is the usual prediction interval.
        It assumes that the law holds and that errors are relative and equal.
        """
        if self.critical_batch is None:
            return None
        profile = _profile(self.points, sharp=self.plain is not None)
        spare = profile.allowed - profile.errors
        centres = profile.levels + growth(batch, profile.criticals, profile.powers[:, None])
        n = len(self.points)
        halves = np.sqrt(np.maximum(spare, 0) * (n + 1) / n)
        low, high = (centres - halves)[spare >= 0].min(), (centres + halves)[spare >= 0].max()
        return float(np.exp(low)), float(np.exp(high))


@dataclass(frozen=True, slots=True)
class Predicted:
    """A predicted number with its 95 % interval."""

    value: float
    low: float
    high: float

    def times(self, factor: float) -> Predicted:
        return Predicted(self.value * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a target is predicted to take at one batch.

    Attributes:
        steps: samples / batch; ``seconds``: samples / speed; None where no speed was measured.
        efficiency: E_min / samples, the share of the samples that a small batch would need.
    """

    batch: float
    samples: Predicted
    steps: Predicted
    seconds: Predicted | None
    efficiency: float


class SpeedCurve:
    """Samples per second by batch: between measured batches interpolated in their logarithms, never beyond them."""

    def __init__(self, measured: Iterable[tuple[float, float]]) -> None:
        """Take pairs of a batch and its samples per second; pairs without positive, finite numbers are left out."""
        known = [(batch, speed) for batch, speed in measured if 0 < batch <= LARGEST and 0 < speed <= LARGEST]
        self.points = sorted(known)

    def at(self, batch: float) -> float | None:
        """Return the samples per second at ``batch``; None if it is outside of the measured batches."""
        if not self.points or not self.points[0][0] <= batch <= self.points[-1][0]:
            return None
        batches, speeds = np.log(self.points).T
        return float(np.exp(np.interp(math.log(batch), batches, speeds)))


def forecast(fitted: Fit, batch: float, speed: SpeedCurve | None = None) -> Forecast | None:
    """Return what the target is predicted to take at ``batch``; None if the fit has no critical batch."""
    samples, interval = fitted.predict(batch), fitted.expected(batch)
    if samples is None or interval is None or fitted.least is None:
        return None
    found = Predicted(samples, *interval)
    rate = speed.at(batch) if speed else None
    return Forecast(batch, found, found.times(1 / batch), found.times(1 / rate) if rate else None,
                    fitted.least / samples)  # fmt: skip


def fit(batches: Sequence[float], samples_to_target: Sequence[float], *, given: bool = False) -> Fit:
    """Fit E(B) = E_min·(1 + (B/B_crit)^p)^(1/p) by least squares of log E.

    With six batches or more p is fitted, too, and ``plain`` has the fit with p = 1. With fewer p is 1.

    Args:
        batches: global batches, in samples; a batch that was measured several times may be repeated.
        samples_to_target: what each of them took to one target: samples, or any other unit of data, such as epochs.
        given: a person gave these numbers, so that the reason calls them amounts; else they are of runs.

    Returns:
        A fit without critical batch, and with the reason, if there are fewer than three batches or if the samples
        don't bend: they allow any critical batch above, or below, all of the batches.

    Raises:
        UserError: a number isn't positive and finite.

    Source: McCandlish et al. 2018, arXiv:1812.06162, eq. 5.1, for p = 1.
    """
    points = tuple(sorted(zip(map(float, batches), map(float, samples_to_target), strict=True)))
    for batch, samples in points:
        if not (0 < batch <= LARGEST and 0 < samples <= LARGEST):
            problem = f"batch {batch:g} took {samples:g} to the target"
            raise UserError(problem, f"both must be positive numbers up to {LARGEST:g}")
    n = len({batch for batch, _ in points})
    if n < FEWEST:
        known = ("is given" if n == 1 else "are given") if given else "reached the target"
        problem = f"{counted(n, 'batch', 'batches')} {known}, and a fit needs {FEWEST}"
        return Fit(None, None, (None, None), n, note=problem, points=points)
    amounts = "the amounts" if given else "the samples to the target"
    plain = _fit(points, n, None, amounts)
    return plain if n < FOR_POWER else _fit(points, n, plain, amounts)


def _fit(points: Points, n: int, plain: Fit | None, amounts: str) -> Fit:
    """Return the fit with p = 1, or with any p beside the one with p = 1."""
    profile = _profile(points, sharp=plain is not None)
    row, column = np.unravel_index(profile.errors.argmin(), profile.errors.shape)
    low, high = interval_of(profile.criticals, (profile.errors <= profile.allowed).any(axis=0))
    power, smallest = float(profile.powers[row]), points[0][0]
    if high is None:
        straight = "go up and down too much from batch to batch to show it"
        if low:
            tells = low >= smallest  # a bound below all batches says nothing
            straight = f"don't bend: {f'it may be {_round(low)} or more' if tells else 'larger batches would tell'}"
        return Fit(None, None, (low, high), n, power, f"{amounts} {straight}", points, plain)
    if low is None:
        bound = f"{_round(high)} or less" if high >= smallest else f"below the smallest batch, {smallest:,g}"
        steep = f"grow in proportion to the batch: it is {bound}"
        return Fit(None, None, (low, high), n, power, f"{amounts} {steep}", points, plain)
    critical, least = float(profile.criticals[column]), math.exp(profile.levels[row, column])
    return Fit(least, critical, (low, high), n, power, "", points, plain)


def _round(bound: float) -> str:
    """Format a bound with three digits."""
    return f"{float(f'{bound:.3g}'):,g}" if bound < 1e6 else f"{bound:.3g}"


class _Profile(NamedTuple):
    """The sum of squared errors of log E for each p and critical batch, with the E_min that fits best.

    Attributes:
        powers [p], criticals [c]: what is tried; ``levels`` [p, c]: log E_min; ``errors`` [p, c].
        allowed: the largest error that isn't significantly worse than the least one.
    """

    powers: Array
    criticals: Array
    levels: Array
    errors: Array
    allowed: float


@lru_cache(maxsize=4)
def _profile(points: Points, sharp: bool) -> _Profile:
    """Return the profile for p = 1, or if ``sharp`` for many p."""
    batches, samples = np.array(points).T
    powers = POWERS if sharp else np.ones(1)
    criticals = candidates(batches)
    rest = np.log(samples) - growth(batches, criticals[:, None], powers[:, None, None])
    levels = rest.mean(-1)
    errors = ((rest - levels[..., None]) ** 2).sum(-1)
    freedom = len(points) - (3 if sharp else 2)
    allowed = float(errors.min()) * (1 + student(freedom) ** 2 / freedom) + 1e-12
    return _Profile(powers, criticals, levels, errors, allowed)
