"""Read a learning rate off a range test, in which it rises at each step until training diverges. Torch-free.

Source: Smith 2017, arXiv:1506.01186, section 3.3. Loss and log LR are smoothed with the same weights, so that the
smoothed curve doesn't lag behind the LR.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, NamedTuple

MEMORY = 10  # steps that the average remembers
WIDEST = 2.0  # factor by which the LR rises at most while the average remembers: a short test averages fewer steps
FEWEST = 20  # steps before a curve says anything
RISE = 0.1  # of its fall, by which the loss may be above its lowest value at a stable LR
DEVIATIONS = 3.0  # by which a change has to exceed the noise of the smoothed loss
SHARE = 0.5  # of the largest stable LR that is suggested at most


class Tried(NamedTuple):
    """A step of the range test; ``smoothed_lr`` and ``smoothed`` are averages up to it."""

    lr: float
    loss: float
    smoothed_lr: float
    smoothed: float


@dataclass(slots=True)
class RangeTest:
    """The steps of a range test. A loss that isn't finite ends it."""

    tried: list[Tried]
    ended: bool = False
    _memory: float = 1.0
    _weight: float = 0.0
    _loss: float = 0.0
    _log_lr: float = 0.0

    @classmethod
    def empty(cls) -> RangeTest:
        return cls([])

    def add(self, lr: float, loss: float) -> None:
        """Add a step, with rising learning rates."""
        if not math.isfinite(loss):
            self.ended = True
            return
        if self.tried:
            self._memory = max(1.0, min(MEMORY, math.log(WIDEST) / math.log(lr / self.tried[-1].lr)))
        self._weight = self._kept * self._weight + 1
        self._loss = self._kept * self._loss + loss
        self._log_lr = self._kept * self._log_lr + math.log(lr)
        self.tried.append(Tried(lr, loss, math.exp(self._log_lr / self._weight), self._loss / self._weight))

    @property
    def memory(self) -> int:
        """Return the steps that the average remembers."""
        return round(self._memory)

    @property
    def _kept(self) -> float:
        """Return the weight of the past in the average."""
        return 1 - 1 / self._memory

    @property
    def noise(self) -> float:
        """Return the standard deviation of the smoothed loss, from the middle change from one loss to the next."""
        changes = sorted(abs(after.loss - before.loss) for before, after in pairwise(self.tried))
        one = changes[len(changes) // 2] / (0.6745 * math.sqrt(2)) if changes else 0.0  # of a normal distribution
        return one * math.sqrt((1 - self._kept) / (1 + self._kept))

    @property
    def start(self) -> float:
        """Return the loss at first: the average of the first steps, whose LR is too low to change it."""
        return self.tried[min(self.memory, len(self.tried)) - 1].smoothed

    @property
    def lowest(self) -> int:
        """Return the step with the lowest smoothed loss. Averages of fewer steps than the start's don't count."""
        return min(range(self.memory - 1, len(self.tried)), key=lambda index: self.tried[index].smoothed)

    @property
    def least_change(self) -> float:
        """Return by how much a smoothed loss has to differ from the start to exceed the noise of both.

        An average of n steps has (1 + kⁿ)/(1 − kⁿ) times the variance of one of many, if it keeps k per step.
        """
        return DEVIATIONS * self.noise * math.sqrt(2 / (1 - self._kept**self.memory))

    def diverged(self) -> bool:
        """Return whether the loss isn't finite, or is as far above its start as it was below, and beyond its noise."""
        if self.ended or len(self.tried) < FEWEST:
            return self.ended
        lowest = self.tried[self.lowest].smoothed
        return self.tried[-1].smoothed > 2 * self.start - lowest + self.least_change


@dataclass(frozen=True, slots=True)
class Range:
    """What a range test found. A value that it doesn't show is None.

    Attributes:
        steepest: the LR at which the loss fell fastest; ``largest_stable``: above it, the loss rises.
        suggestion: the smaller of ``steepest`` and half of ``largest_stable``; ``why``: why it is this one.
        note: what wasn't found, and why; "" if everything was.
        curve: (LR, loss, smoothed LR, smoothed loss) of each step.
    """

    steepest: float | None
    largest_stable: float | None
    suggestion: float | None
    why: str
    note: str
    curve: tuple[Tried, ...]

    def plain(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return asdict(self)


def read(curve: RangeTest) -> Range:
    """Return what a range test found."""
    tried = curve.tried
    if len(tried) < FEWEST:
        why = f"the loss isn't finite after {len(tried)} steps" if curve.ended else f"{len(tried)} steps are too few"
        return _nothing(curve, f"no LR found: {why}; start from a lower LR")
    lowest = curve.lowest
    fall = curve.start - tried[lowest].smoothed
    if fall <= curve.least_change:
        end = "before it diverged" if curve.diverged() else f"up to an LR of {tried[-1].lr:.3g}"
        return _nothing(curve, f"no LR found: the loss didn't fall by more than its noise {end}")
    fallen = curve.start - max(RISE * fall, curve.least_change)
    falls = max(index for index in range(lowest + 1) if tried[index].smoothed >= fallen)
    steepest = tried[_steepest(curve, falls, lowest)].smoothed_lr
    allowed = tried[lowest].smoothed + max(RISE * fall, DEVIATIONS * curve.noise)
    last = max(index for index, one in enumerate(tried) if one.smoothed <= allowed)
    if last == len(tried) - 1 and not curve.ended:
        note = f"no largest stable LR found: the loss is still low at {tried[-1].lr:.3g}, the highest LR tried"
        return Range(steepest, None, steepest, "where the loss falls fastest", note, tuple(tried))
    stable = tried[last].smoothed_lr
    if steepest <= SHARE * stable:
        return Range(steepest, stable, steepest, "where the loss falls fastest", "", tuple(tried))
    return Range(steepest, stable, SHARE * stable, "half of the largest stable LR", "", tuple(tried))


def _nothing(curve: RangeTest, note: str) -> Range:
    return Range(None, None, None, "", note, tuple(curve.tried))


def _steepest(curve: RangeTest, falls: int, lowest: int) -> int:
    """Return the index at which the smoothed loss falls fastest by log LR, from where it falls to its lowest value.

    A slope is taken over as many steps as the average remembers, since neighbours share most of what they average.
    """
    tried, reach = curve.tried, max(1, min(curve.memory, lowest // 2))

    def slope(index: int) -> float:
        before, after = tried[index - reach], tried[index]
        return (after.smoothed - before.smoothed) / math.log(after.smoothed_lr / before.smoothed_lr)

    steepest = min(range(max(reach, falls), lowest + 1), key=slope, default=lowest)
    return max(0, steepest - reach // 2)
