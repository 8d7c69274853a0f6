"""Combine measurements into one recommended batch, with predictions and the agreement of what they rest on. Torch-free.

A step at batch B saves as much as it costs at the critical batch φ. Reaching what the run reaches at its own batch B₀
with D samples takes

    samples(B) = D · (1 + B/φ) / (1 + B₀/φ),    steps(B) = samples(B) / B,    seconds(B) = steps(B) · step time(B).

Source: McCandlish et al. 2018, arXiv:1812.06162, eq. 2.7 and 5.1; goodput of Pollux (Qiao et al., OSDI 2021).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from isobatch.scaling.geometry import counted
from isobatch.scaling.tuning.speed import Speed

FRUGAL = 1.05  # samples of the most frugal batch, relative to the fewest
EQUAL_TIME = 1.02  # of two batches whose times differ by less, the smaller one is better
AGREE = 2.0  # factor between witnesses up to which they agree
FEWEST_STEPS = 20  # of a candidate: a run of fewer says nothing about training
TRUST = ("branch", "noise", "law")  # witnesses, the most trusted first: branches train, the law is from other models


@dataclass(frozen=True, slots=True)
class Witness:
    """A measurement of the critical batch.

    Attributes:
        part: the part of ``action=tune`` that measured it.
        critical: the critical batch, in samples.
        low, high: its 95 % interval; None: not known.
    """

    part: str
    critical: float
    low: float | None = None
    high: float | None = None


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
    batch: int,
    samples: int,
    witnesses: Sequence[Witness],
    speed: Speed | None,
    sizes: Sequence[int],
    lr: Callable[[int], float | None],
    max_step_ms: float | None = None,
) -> Recommendation | None:
    """Return the recommended batch.

    Args:
        batch, samples: the run's own global batch, and the samples that it trains.
        witnesses: measurements of the critical batch.
        speed: the measured time of steps; None: not known.
        sizes: the global batches to compare.
        lr: returns the peak LR at a global batch; None if the run's rule doesn't hold there.
        max_step_ms: the longest step that a recommended batch may take.

    Returns:
        None if no candidate has a step of at most ``max_step_ms``.
    """
    witness = min(witnesses, key=lambda one: TRUST.index(one.part), default=None)
    critical = witness.critical if witness else None
    rows = [
        row
        for size in sorted({*sizes, batch})
        if (rate := lr(size)) is not None
        and (row := predict(size, batch, samples, rate, critical, speed, max_step_ms)) is not None
    ]
    if not rows:
        return None
    frugal = _frugal(rows) if witness else None
    if witness and speed:
        best = _fastest(rows)
        bounds = [best.global_size, frugal.global_size if frugal else best.global_size]
        for bound in filter(None, (witness.low, witness.high)):
            again = (predict(r.global_size, batch, samples, r.lr, bound, speed, max_step_ms) for r in rows)
            bounds.append(_fastest([row for row in again if row]).global_size)
        why = f"the best time to the target: critical batch {witness.critical:,.0f} ({witness.part}) and measured speed"
    elif witness:
        best = min(rows, key=lambda row: abs(math.log(row.global_size / witness.critical)))
        bounds = [best.global_size, frugal.global_size if frugal else best.global_size]
        why = f"the critical batch, {witness.critical:,.0f} ({witness.part}); tune.parts=[speed] would tell its time"
    else:
        best = next((row for row in rows if row.global_size == batch), rows[0])
        bounds = [best.global_size]
        why = "the run's own batch: no measurement tells what a larger one costs in samples"
    return Recommendation(best, frugal, min(bounds), max(bounds), tuple(rows), why, agreement(witnesses))


def predict(
    size: int,
    batch: int,
    samples: int,
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
    needed = None if critical is None else samples * (1 + size / critical) / (1 + batch / critical)
    steps = None if needed is None else needed / size
    seconds = None if steps is None or step_ms is None else steps * step_ms / 1000
    return Prediction(size, per_gpu, accumulation, lr, needed, steps, seconds, step_ms)


def over_run(course: Sequence[tuple[float, float]], batch: int, samples: int) -> float | None:
    """Return the critical batch of a whole run from the course of its noise scale φ, which is constant after its end.

    A step at batch B makes 1/(1 + φ/B) of the progress of a step without noise. So ds samples at the run's own batch B₀
    make ds/(B₀ + φ) of it, and the critical batch, the mean of φ over the progress, is Σ φ·w / Σ w, w = ds/(B₀ + φ).

    Args:
        course: (samples trained, noise scale), by ascending samples.
        batch: B₀, in samples; ``samples``: length of the run.

    Returns:
        None if the noise scale isn't known anywhere.

    Source: McCandlish et al. 2018, arXiv:1812.06162, section 2.3 and appendix D.

    >>> over_run([(100, 50.0), (200, 150.0)], batch=50, samples=400)
    110.0
    """
    if not course:
        return None
    ends = [at for at, _ in course[:-1]] + [max(samples, course[-1][0])]
    progress = [
        (end - start) / (batch + scale) for start, end, (_, scale) in zip([0, *ends], ends, course, strict=False)
    ]
    return sum(scale * part for (_, scale), part in zip(course, progress, strict=True)) / sum(progress)


def agreement(witnesses: Sequence[Witness]) -> str:
    """Return a sentence that tells how far the measurements of the critical batch agree."""
    said = ", ".join(f"{one.part} {one.critical:,.0f}{_interval(one)}" for one in witnesses)
    if not witnesses:
        return "no critical batch was measured"
    if len(witnesses) == 1:
        return f"one measurement of the critical batch: {said}"
    low, high = (pick(one.critical for one in witnesses) for pick in (min, max))
    verdict = "agree within" if high <= AGREE * low else "disagree by"
    trusted = min(witnesses, key=lambda one: TRUST.index(one.part)).part
    used = "" if high <= AGREE * low else f"; the recommendation uses {trusted}"
    return f"{counted(len(witnesses), 'measurement')} {verdict} × {high / low:.2g}: {said}{used}"


def _interval(witness: Witness) -> str:
    if witness.low is None and witness.high is None:
        return ""
    low, high = ("?" if bound is None else f"{bound:,.0f}" for bound in (witness.low, witness.high))
    return f" [{low}, {high}]"


def _frugal(rows: Sequence[Prediction]) -> Prediction:
    fewest = min(row.samples for row in rows if row.samples is not None)
    return [row for row in rows if row.samples is not None and row.samples <= FRUGAL * fewest][-1]


def _fastest(rows: Sequence[Prediction]) -> Prediction:
    least = min(row.seconds for row in rows if row.seconds is not None)
    return next(row for row in rows if row.seconds is not None and row.seconds <= EQUAL_TIME * least)
