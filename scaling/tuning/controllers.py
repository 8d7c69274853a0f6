"""Controllers of the global batch: pure functions from the numbers of measured steps to the next batch.

Glossary: G is the mean gradient, Σ the covariance of one sample's gradient, φ = tr Σ/|G|² the gradient noise scale in
samples (see noise.py), b the batch that the controller chose. Both averages are over the measurements so far, the
latest count most. Below φ, a larger batch takes fewer steps and hardly more samples; above it, nearly as many steps.

Every controller asks for a batch after each measurement. It is chosen once ``patience`` measurements in a row asked for
a change in the same direction by at least an eighth, and it is at most twice, at least half the batch before it. Each
run's ``metrics.jsonl`` holds the numbers, so ``replay`` finds the same decisions again.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, NamedTuple

from annotated_types import Len

from isobatch.scaling.control import FEWEST, MOST_CHANGE, Control
from isobatch.scaling.learned import Interval, belief, extended, trial_of
from isobatch.scaling.limits import LARGEST, Count, Positive, Size

LEAST_CHANGE = 1.125  # a smaller change isn't worth micro-batches of another size
LATEST = 9  # times of a step that are remembered, of each batch


@dataclass(frozen=True, slots=True)
class Measurement:
    """Hold what a controller sees after a measured step. A number is None if it isn't known.

    Attributes:
        samples: position in the run after the step.
        global_size: samples of the step.
        growth: factor by which a schedule multiplies the chosen batch.
        grad_sq, trace: averages of |G|² and tr Σ.
        loss: mean loss over the samples since the previous measurement.
        step_s: seconds per step since then, if all of these steps had the same batch.
        hardware: a number for the hardware that the steps are timed on; None if their time doesn't count.
    """

    samples: int
    global_size: int
    growth: float
    grad_sq: float | None
    trace: float | None
    loss: float | None
    step_s: float | None
    hardware: int | None = None

    @property
    def noise_scale(self) -> float | None:
        """Return φ in samples; infinite while noise hides |G|², 0 without noise, None if it wasn't measured."""
        if self.grad_sq is None or self.trace is None:
            return None
        if not self.trace:
            return 0.0
        return self.trace / self.grad_sq if self.grad_sq > 0 else math.inf


class Timed(NamedTuple):
    """Hold the latest times of a step at a global batch, in seconds."""

    global_size: Size
    times_s: Annotated[tuple[Positive, ...], Len(1, LATEST)]


@dataclass(frozen=True, slots=True)
class Memory:
    """Hold what a controller remembers between measurements.

    Attributes:
        size: the batch chosen last, in samples.
        asked: the batch asked for last, before rounding.
        count: measurements so far.
        larger, smaller: measurements in a row, until the last one, that asked for a larger or smaller batch.
        timed: speeds seen so far, by batch, on this ``hardware``.
        intervals: the losses seen so far, for bandit.
    """

    size: Size
    asked: Positive
    count: Count = 0
    larger: Count = 0
    smaller: Count = 0
    timed: tuple[Timed, ...] = ()
    hardware: Count | None = None
    intervals: tuple[Interval, ...] = ()

    def __post_init__(self) -> None:
        if len({one.global_size for one in self.timed}) < len(self.timed):
            raise ValueError(f"{[one.global_size for one in self.timed]} aren't different batches that were timed")


def first_memory(size: int) -> Memory:
    """Return the memory at the start of a run whose first batch is ``size`` samples."""
    return Memory(size, float(size))


def norm_test(control: Control, memory: Memory, seen: Measurement) -> float:
    """Double the batch while tr Σ/b > η²·|G|²: the noise of the step's gradient exceeds η of its length.

    It never shrinks. With η = 1 the batch stops near φ. The published η of 0.05 to 0.3 lead to 11 to 400 × φ.
    Source: Byrd et al. 2012; Lau et al. 2024, arXiv:2412.21124, who measure tr Σ between workers.
    """
    assert control.eta
    assert seen.grad_sq is not None
    assert seen.trace is not None
    noisy = seen.trace / memory.size > control.eta**2 * max(0.0, seen.grad_sq)
    return memory.size * (2.0 if noisy else 1.0)


def noise(control: Control, memory: Memory, seen: Measurement) -> float:
    """b = factor·φ. At φ the run takes about twice the fewest steps and twice the fewest samples.

    φ isn't the critical batch, and can be far from it (Merrill et al. 2025).
    Source: McCandlish et al. 2018, arXiv:1812.06162.
    """
    assert control.factor
    assert seen.noise_scale is not None
    return control.factor * seen.noise_scale


def variance(control: Control, memory: Memory, seen: Measurement) -> float:
    """b + α·φ at each measurement: the batch grows by the variance over the squared mean of the gradient.

    How far it grows depends on the number of measurements, so α belongs to one ``every``. It never shrinks.
    """
    assert control.alpha
    assert seen.noise_scale is not None
    return min(memory.asked, MOST_CHANGE * memory.size) + control.alpha * seen.noise_scale


def goodput(control: Control, memory: Memory, seen: Measurement) -> float:
    """b = √(h·φ): it maximises samples per second × efficiency, b/(h + b) × φ/(φ + b).

    h is ``half_speed``, the batch at which the hardware reaches half of its highest speed: a step of b samples takes
    time in proportion to h + b. If it isn't given, it is fitted to the times of the steps so far; until two batches
    were timed, it counts as b, so that b moves towards φ.
    Source: Qiao et al. 2021 (Pollux, OSDI); h is Hockney's n½.
    """
    assert seen.noise_scale is not None
    half = half_speed_in(control, memory)
    return math.sqrt((memory.size if half is None else half / seen.growth) * seen.noise_scale)


def bandit(control: Control, memory: Memory, seen: Measurement) -> float | None:
    """√(h·B_c), or B_c/4 to save samples, with the critical batch B_c that the run's own loss tells (see learned.py).

    Trials at √2 and 1/√2 of it keep it learning. At B_c/4 a sample makes 4/5 of the progress that it makes at the
    smallest batch. It returns None between the trials' starts.
    """
    trial = trial_of(len(memory.intervals))
    if trial is None:
        return None
    assert control.prior
    critical = belief(memory.intervals, control.prior).critical
    best = critical / 4
    if control.per == "second":
        half = half_speed_in(control, memory)
        best = math.sqrt(critical * (memory.size if half is None else half / seen.growth))
    return best * 2 ** (trial / 2)


def half_speed_in(control: Control, memory: Memory) -> float | None:
    """Return h in samples, as given or timed; None if it isn't known, or isn't used."""
    if control.half_speed is not None or not control.by_clock:
        return control.half_speed
    return half_speed_of(memory.timed)


def half_speed_of(timed: Iterable[Timed]) -> float | None:
    """Return h of a fit of step time = c·(h + global batch), by least squares; None if fewer than two were timed.

    Of each batch the median counts, since the first step of a size may take longer, and weighs as many measurements.
    h is at least a sample, also if the time is in proportion to the batch, and LARGEST if the time doesn't grow.

    >>> half_speed_of([Timed(32, (0.5,)), Timed(96, (1.0,))])
    32.0
    """
    points = [(len(one.times_s), one.global_size, statistics.median(one.times_s)) for one in timed]
    if len(points) < 2:
        return None
    weight = sum(count for count, _, _ in points)
    batch = sum(count * size for count, size, _ in points) / weight
    time = sum(count * step_s for count, _, step_s in points) / weight
    covariance = sum(count * (size - batch) * (step_s - time) for count, size, step_s in points)
    slope = covariance / sum(count * (size - batch) ** 2 for count, size, _ in points)
    return min(max(1.0, time / slope - batch), LARGEST) if slope > 0 else LARGEST


class Controller(NamedTuple):
    """Hold the function that asks for a batch, or for none, and its description."""

    ask: Callable[[Control, Memory, Measurement], float | None]
    summary: str


CONTROLLERS = {
    "norm-test": Controller(norm_test, "doubles while tr Σ/b > η²·|G|² (Byrd et al. 2012; Lau et al. 2024)"),
    "noise": Controller(noise, "factor × the gradient noise scale (McCandlish et al. 2018)"),
    "variance": Controller(variance, "grows by α × the gradient noise scale at each measurement"),
    "goodput": Controller(goodput, "√(half_speed × gradient noise scale): most progress per second (Pollux)"),
    "bandit": Controller(bandit, "learns the critical batch from the loss, by trials of other batches"),
}


def observed(control: Control, memory: Memory, seen: Measurement, rest: int) -> Memory:
    """Return the memory after one more measurement; its ``size`` is the decision.

    Args:
        rest: samples of the run from where the decision would take effect. It isn't taken if a step is longer.
    """
    intervals = memory.intervals
    if control.name == "bandit":
        intervals = extended(intervals, seen.samples, seen.loss, seen.global_size / seen.growth)
    memory = replace(
        memory,
        count=memory.count + 1,
        timed=_timed(memory.timed if seen.hardware == memory.hardware else (), seen),
        hardware=seen.hardware,
        intervals=intervals,
    )
    asked = None if memory.count < FEWEST else CONTROLLERS[control.name].ask(control, memory, seen)
    if asked is None:
        return memory
    within = min(max(asked, control.least, memory.size / MOST_CHANGE), control.most, memory.size * MOST_CHANGE)
    change = within / memory.size
    larger = memory.larger + 1 if change >= LEAST_CHANGE else 0
    smaller = memory.smaller + 1 if change <= 1 / LEAST_CHANGE else 0
    memory = replace(memory, asked=within, larger=larger, smaller=smaller)
    size = control.allowed(within)
    step = min(size * seen.growth, control.limit or math.inf)
    if max(larger, smaller) < control.in_a_row or size == memory.size or step > rest:
        return memory
    return replace(memory, size=size, larger=0, smaller=0)


def _timed(timed: tuple[Timed, ...], seen: Measurement) -> tuple[Timed, ...]:
    """Return the speeds with one more."""
    if seen.step_s is None:
        return timed
    found = {one.global_size: one.times_s for one in timed}
    found[seen.global_size] = (*found.get(seen.global_size, ()), seen.step_s)[-LATEST:]
    return tuple(Timed(*one) for one in found.items())


PREFIX = "control/"


def values(seen: Measurement, memory: Memory, rest: int) -> dict[str, float | None]:
    """Return what a line of metrics holds of a measurement, beside ``noise/grad_sq`` and ``noise/trace``.

    Args:
        rest: see ``observed``; it is logged, since the run may be lengthened later.
    """
    numbers = {"size": memory.size, "asked": memory.asked, "growth": seen.growth, "rest": rest}
    numbers |= {} if seen.hardware is None else {"hardware": seen.hardware}
    return {f"{PREFIX}{name}": value for name, value in (numbers | {"loss": seen.loss, "step_s": seen.step_s}).items()}


def measurement_of(line: Mapping[str, Any]) -> Measurement | None:
    """Return the measurement in a line of ``metrics.jsonl``, or None if it holds none."""
    if f"{PREFIX}size" not in line:
        return None
    return Measurement(
        samples=line["samples"],
        global_size=line["global_size"],
        growth=line[f"{PREFIX}growth"],
        grad_sq=line.get("noise/grad_sq"),
        trace=line.get("noise/trace"),
        loss=line[f"{PREFIX}loss"],
        step_s=line[f"{PREFIX}step_s"],
        hardware=line.get(f"{PREFIX}hardware"),
    )


def replay(control: Control, size: int, lines: Iterable[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """Return the decisions of a run, from its metrics alone: (start_sample, size) each.

    Args:
        size: the first batch, in samples.
        lines: the content of ``metrics.jsonl``.
    """
    memory, found = first_memory(size), []
    for line in lines:
        if seen := measurement_of(line):
            after = observed(control, memory, seen, line[f"{PREFIX}rest"])
            if after.size != memory.size:
                found.append((seen.samples + control.every, after.size))
            memory = after
    return found
