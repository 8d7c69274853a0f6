"""Combine measurements into one recommended batch, with predictions and the agreement of what they rest on. Torch-free.

A step at batch B saves as much as it costs at the critical batch φ. Reaching what the run reaches at its own batch B₀
with D samples takes

    samples(B) = D · (1 + B/φ) / (1 + B₀/φ),    steps(B) = samples(B) / B,    seconds(B) = steps(B) · step time(B).

Where the run's batch changes, D / (1 + B₀/φ) is a sum over its stretches.

Source: McCandlish et al. 2018, arXiv:1812.06162, eq. 2.7 and 5.1; goodput of Pollux (Qiao et al., OSDI 2021).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from isobatch.scaling.limits import LARGEST
from isobatch.scaling.plan import Plan
from isobatch.scaling.tuning.controllers import Timed, half_speed_of
from isobatch.scaling.tuning.speed import Speed
from isobatch.scaling.tuning.witnesses import Stretches, Witness, agreement

FRUGAL = 1.05  # samples of the most frugal batch, relative to the fewest
EQUAL_TIME = 0.02, 0.10  # relative difference of two times that doesn't matter: by how far they spread, within these


@dataclass(frozen=True, slots=True)
class Prediction:
    """The predicted cost of a batch; what isn't known is None.

    Attributes:
        global_size, per_gpu, accumulation: samples, samples, passes.
        lr: the peak LR, carried by the run's rule.
        samples, steps, seconds: to reach what the run reaches at its own batch.
        step_ms: the time of a step.
    """

    global_size: int
    per_gpu: int | None
    accumulation: int | None
    lr: float
    samples: float | None
    steps: float | None
    seconds: float | None
    step_ms: float | None


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The recommended batch.

    Attributes:
        best: the recommended batch: the best time to the target, where speed and critical batch are known.
        frugal: the largest batch that needs nearly as few samples as the smallest; None if that isn't known.
        low, high: the range of global batches between the two, widened by the interval of the critical batch.
        rows: the prediction for each candidate.
        why: the reason; ``agreement``: what the witnesses say of each other.
    """

    best: Prediction
    frugal: Prediction | None
    low: int
    high: int
    rows: tuple[Prediction, ...]
    why: str
    agreement: str

    def plain(self, command: Callable[[Prediction], str]) -> dict[str, Any]:
        """Return the object of ``tune.json``.

        Args:
            command: returns the command that trains with a batch.
        """
        other = self.frugal
        alternatives = [{"aim": "samples", **asdict(other), "command": command(other)}] if other else []
        return {
            **asdict(self.best),
            "aim": "time" if self.best.seconds is not None else "samples",
            "range": [self.low, self.high],
            "why": self.why,
            "command": command(self.best),
            "alternatives": alternatives,
            "agreement": self.agreement,
            "predictions": [asdict(row) for row in self.rows],
        }


def candidates(least: int, most: int, quantum: int = 1) -> list[int]:
    """Return the global batches to compare: powers of two and three halves of them, as multiples of ``quantum``.

    >>> candidates(8, 64)
    [8, 12, 16, 24, 32, 48, 64]
    """
    powers = [2**exponent * half // 2 for exponent in range(1, 60) for half in (2, 3)]
    sizes = {max(quantum, size // quantum * quantum) for size in powers if least <= size <= most}
    return sorted(sizes) or [max(quantum, most // quantum * quantum)]


def recommend(
    stretches: Stretches,
    witnesses: Sequence[Witness],
    speed: Speed | None,
    sizes: Sequence[int],
    lr: Callable[[int], float | None],
    max_step_ms: float | None = None,
) -> Recommendation | None:
    """Return the recommended batch.

    Of batches whose times can't be told apart it is the one nearest the run's own: the further a batch is from it, the
    more the prediction and the LR rest on a law instead of on the run.

    Args:
        stretches: the run's own global batch, and the samples that it trains.
        witnesses: measurements of the critical batch, the most trusted one first.
        speed: the measured time of steps; None: not known.
        sizes: the global batches to compare.
        lr: returns the peak LR at a global batch; None if the run's rule doesn't hold there.
        max_step_ms: the longest step that a recommended batch may take.

    Returns:
        None if no candidate has a step of at most ``max_step_ms``.
    """
    witness, own = witnesses[0] if witnesses else None, mean_batch(stretches)

    def predicted(critical: float | None) -> list[Prediction]:
        rates = ((size, lr(size)) for size in sorted({*sizes, stretches[0][0]}))
        rows = (
            predict(size, stretches, rate, critical, speed, max_step_ms) for size, rate in rates if rate is not None
        )
        return [row for row in rows if row]

    rows = predicted(witness.critical if witness else None)
    if not rows:
        return None
    frugal = _frugal(rows) if witness else None
    bounds = [frugal.global_size] if frugal else []
    if witness and speed:
        best, why = _fastest(rows, own, speed)
        why = f"the best time to the target: critical batch {witness.critical:,.0f} ({witness.name}) and {why}"
        bounds += [
            _fastest(predicted(bound), own, speed)[0].global_size for bound in (witness.low, witness.high) if bound
        ]
    elif witness:
        best = min(rows, key=lambda row: abs(math.log(row.global_size / witness.critical)))
        why = f"the critical batch, {witness.critical:,.0f} ({witness.name}); tune.parts=[speed] would tell its time"
    else:
        best = _nearest(rows, own)
        why = "the run's own batch: no measurement tells what a larger one costs in samples"
    bounds.append(best.global_size)
    return Recommendation(best, frugal, min(bounds), max(bounds), tuple(rows), why, agreement(witnesses))


def mean_batch(stretches: Stretches) -> float:
    """Return the samples of a run by its steps.

    >>> mean_batch([(32, 320), (64, 640)])
    48.0
    """
    return sum(samples for _, samples in stretches) / sum(samples / batch for batch, samples in stretches)


def predict(
    size: int,
    stretches: Stretches,
    lr: float,
    critical: float | None,
    speed: Speed | None,
    max_step_ms: float | None = None,
) -> Prediction | None:
    """Return the prediction for a global batch of ``size``; None if its step takes longer than ``max_step_ms``."""
    way = speed.fastest(size, max_step_ms or math.inf) if speed else None
    if speed and way is None:
        return None
    per_gpu, accumulation, step_ms = way or (None, None, None)
    needed = steps = None
    if critical is not None:
        needed = sum(samples * (1 + size / critical) / (1 + batch / critical) for batch, samples in stretches)
        steps = needed / size
    seconds = None if steps is None or step_ms is None else steps * step_ms / 1000
    return Prediction(size, per_gpu, accumulation, lr, needed, steps, seconds, step_ms)


def _frugal(rows: Sequence[Prediction]) -> Prediction:
    fewest = min(row.samples for row in rows if row.samples is not None)
    return [row for row in rows if row.samples is not None and row.samples <= FRUGAL * fewest][-1]


def _fastest(rows: Sequence[Prediction], own: float, speed: Speed) -> tuple[Prediction, str]:
    """Return the batch nearest the run's own among the fastest ones, and how many can't be told apart."""
    tolerance = min(max(EQUAL_TIME[0], speed.spread), EQUAL_TIME[1])
    least = min(row.seconds for row in rows if row.seconds is not None)
    equal = [row for row in rows if row.seconds is not None and row.seconds <= (1 + tolerance) * least]
    best, said = _nearest(equal, own), "measured speed"
    if len(equal) > 1:
        sizes = f"{equal[0].global_size:,} to {equal[-1].global_size:,}"
        said += f"; {sizes} take the same time within {tolerance:.0%}, and of these it is nearest the run's own"
    return best, said


def _nearest(rows: Sequence[Prediction], own: float) -> Prediction:
    return min(rows, key=lambda row: (round(abs(math.log(row.global_size / own)), 9), row.global_size))


def moving(plan: Plan, rows: Sequence[Prediction]) -> str:
    """Return the keys of a batch that moves for this hardware; "" where the times of steps aren't known."""
    half = half_speed_of([Timed(row.global_size, (row.step_ms,)) for row in rows if row.step_ms])
    if half is None or not 1 < half < LARGEST:
        return ""
    speed = f"half of this hardware's highest samples/s is reached at a batch of about {plan.size(round(half))}"
    return f"{speed}: control=goodput control.half_speed={plan.sized(round(half))} moves the batch while it trains"
