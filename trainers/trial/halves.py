"""Fetch a batch whole and in two halves, and decide from their losses whether the loss is a sum over samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from isobatch.scaling.errors import UserError
from isobatch.scaling.order import indices
from isobatch.trainers.data.fetch import Fetch, fetches_many
from isobatch.trainers.data.fingerprint import digests, fetched
from isobatch.trainers.trial.untouched import copied

LOSS_TOLERANCE = 1e-5  # relative to |L₁| + |L₂|; correct losses in fp32 stay below 1e-6
GRADIENT_TOLERANCE = 3e-5  # relative to |g₁| + |g₂|; correct gradients stay below 2e-6
NOISY_MEAN = (0.35, 0.65)  # range of L / (L₁ + L₂) for a mean of noisy losses; a sum has about 1

Verdict = Literal["sum", "mean", "coupled"]
TWICE = 8  # most samples fetched twice; a single sample with a rare random flip may be equal by chance
OWN = "draws from a generator of its own, or from a clock: use the default generators of torch, numpy or Python"


@dataclass(frozen=True, slots=True)
class Halves:
    """Hold the same samples, collated as one batch and as two.

    Attributes:
        start, middle, stop: positions of the samples; [start, middle) is the first half.
        whole, first, second: the batches.
        unkeyed: collate drew random numbers, so the halves may differ from the whole.
    """

    start: int
    middle: int
    stop: int
    whole: Any
    first: Any
    second: Any
    unkeyed: bool

    @property
    def samples(self) -> tuple[int, int, int]:
        """Return the number of samples of the whole, the first and the second half."""
        return self.stop - self.start, self.middle - self.start, self.stop - self.middle


def halves(fetch: Fetch, start: int, middle: int, stop: int) -> Halves:
    """Fetch the samples at [start, stop) once, so that random numbers of the dataset are the same in the halves."""
    samples, _ = fetch.samples(start, indices(fetch.seed, fetch.length, start, stop).tolist())
    whole, unkeyed = fetch.collated(start, copied(samples))  # collate may change them in place
    first, _ = fetch.collated(start, copied(samples[: middle - start]))
    second, _ = fetch.collated(middle, samples[middle - start :])
    return Halves(start, middle, stop, whole, first, second, unkeyed is not None)


def own_generators(fetch: Fetch) -> list[str]:
    """Fetch a few samples twice with the same keys, and report the first step whose results differ."""
    rows = indices(fetch.seed, fetch.length, 0, min(TWICE, fetch.length)).tolist()
    samples, again = (list(fetched(fetch.data, fetch.seed, rows)) for _ in range(2))
    if differ(samples, again):
        return [f"the dataset's {'__getitems__' if fetches_many(fetch.data) else '[index]'} {OWN}, or augment()"]
    if fetch.augment:
        samples, again = (fetch.samples(0, rows)[0] for _ in range(2))
        if differ(samples, again):
            return [f"augment() {OWN}, or the generator that it gets"]
    batches, again = ([fetch.collated(0, copied([sample]))[0] for sample in samples] for _ in range(2))
    return [f"collate() {OWN}"] if differ(batches, again) else []


def differ(first: Sequence[Any], second: Sequence[Any]) -> bool:
    """Return True if the contents of two lists of samples or batches differ."""
    return list(map(digests, first)) != list(map(digests, second))


@dataclass(frozen=True, slots=True)
class Draw:
    """Hold the losses of a batch and of its two halves.

    Attributes:
        whole, first, second: (sum of losses, units) of the batch and of each half.
        gradient_off: |g − g₁ − g₂| / (|g₁| + |g₂|); 0 if no gradient was computed.
        samples: number of samples of the batch and of each half.
        measures: the loss's measures by name.
    """

    whole: tuple[float, float]
    first: tuple[float, float]
    second: tuple[float, float]
    samples: tuple[int, int, int]
    gradient_off: float = 0.0
    measures: Mapping[str, Draw] = field(default_factory=dict)

    @property
    def finite(self) -> bool:
        return all(math.isfinite(number) for pair in (self.whole, self.first, self.second) for number in pair)

    @property
    def size(self) -> float:
        return abs(self.first[0]) + abs(self.second[0])

    @property
    def counts_samples(self) -> bool:
        """Return True if the units of the halves add up to those of the whole."""
        units = self.first[1] + self.second[1]
        return abs(self.whole[1] - units) <= LOSS_TOLERANCE * units

    @property
    def is_sum(self) -> bool:
        """Return True if loss, units and gradient of the halves add up to those of the whole."""
        loss_off = abs(self.whole[0] - self.first[0] - self.second[0])
        near = loss_off <= LOSS_TOLERANCE * self.size
        return near and self.counts_samples and self.gradient_off <= GRADIENT_TOLERANCE

    @property
    def is_mean(self) -> bool:
        """Return True if the loss of the whole is the mean of the halves' losses, weighted by samples or by units."""
        (_, first, second), units = self.samples, self.first[1] + self.second[1]
        weights = [(first, second), *([(self.first[1], self.second[1])] if units else [])]
        means = [(a * self.first[0] + b * self.second[0]) / (a + b) for a, b in weights]
        return any(abs(self.whole[0] - mean) <= LOSS_TOLERANCE * self.size for mean in means)

    @property
    def lies_between(self) -> bool:
        """Return True if the loss of the whole lies strictly between those of the halves, like a weighted mean.

        Examples are a mean over tokens while the units are samples, and a mean with class weights. Losses of different
        signs prove nothing. The largest loss of a batch isn't a mean: it equals that of one half.
        """
        low, high = sorted((abs(self.first[0]), abs(self.second[0])))
        margin, same_sign = LOSS_TOLERANCE * self.size, self.first[0] * self.second[0] > 0
        inside = low + margin < abs(self.whole[0]) < high - margin
        return same_sign and inside and self.whole[0] * self.first[0] > 0 and self.counts_samples

    def __str__(self) -> str:
        by = 0 if abs(self.whole[0] - self.first[0] - self.second[0]) > LOSS_TOLERANCE * self.size else 1
        whole, first, second = (f"{pair[by]:.6g}" for pair in (self.whole, self.first, self.second))
        if by and self.gradient_off > GRADIENT_TOLERANCE:
            return f"the gradient of {self.samples[0]} samples is {self.gradient_off:.1g} off the sum over their halves"
        unit = " units" if by else ""
        return f"{self.samples[0]} samples give {whole}{unit}, and their halves {first} and {second}"


def judge(draws: Sequence[Draw], noisy: bool = False) -> tuple[Verdict, Draw | None]:
    """Return the verdict on the loss, and a draw that shows it.

    Args:
        noisy: random numbers, or rounding in low precision, hide all but the factor of two between sum and mean.
    """
    usable = [draw for draw in draws if draw.finite and abs(draw.whole[0]) + draw.size > 0]
    if noisy:
        ratios = [draw.whole[0] / halves for draw in usable if (halves := draw.first[0] + draw.second[0])]
        whole, halves = sum(draw.whole[0] for draw in usable), sum(draw.first[0] + draw.second[0] for draw in usable)
        low, high = NOISY_MEAN
        near = [ratio for ratio in ratios if low < ratio < high]
        halved = len(near) > 0.7 * len(ratios) and halves and low < whole / halves < high
        return ("mean", usable[0]) if halved else ("sum", None)
    off = [draw for draw in usable if not draw.is_sum]
    if not off:
        return "sum", None
    exact = all(draw.is_mean for draw in off)
    weighted = len(off) > 1 and all(draw.is_mean or draw.lies_between for draw in off)  # a single draw proves little
    return ("mean" if exact or weighted else "coupled"), off[0]


def judge_totals(method: str, draws: Mapping[str, Sequence[Draw]], noisy: bool) -> list[str]:
    """Judge the sums and counts that ``task.<method>`` returned by name.

    Returns:
        Descriptions of those that aren't sums over samples.

    Raises:
        UserError: one of them is a mean, counted as several samples.
    """
    depends = []
    for name, of_name in draws.items():
        verdict, draw = judge(of_name, noisy)
        if draw and verdict == "mean" and draw.counts_samples:
            problem = f"task.{method} returns a mean as the sum of {name!r}: {draw}, counted as that many samples"
            raise UserError(problem, "return the sum with the count, or the mean with 1", "task")
        if draw and not draw.whole[0] == draw.first[0] == draw.second[0]:  # a constant is no sum, and no mistake
            depends.append(f"{name!r} of task.{method} isn't a sum over samples: {draw}")
    return depends
