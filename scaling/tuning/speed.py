"""Model the time of a step by per-GPU batch and accumulation, from measured steps. Torch-free.

A step of ``n`` passes of ``b`` samples per rank takes fixed(b) + n·pass(b) seconds. ``fixed`` is what a step does once:
the update of the weights, and that part of the communication that doesn't overlap with a pass.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import truediv
from typing import Any, Literal

from isobatch.scaling.geometry import Cut, solve
from isobatch.scaling.plan import Plan

KNEE = 0.05  # a size this close to the fastest one is as good, and smaller, unless times spread more
NOISY = 0.2  # spread from which batches can hardly be told apart, so the speed is measured again
UNKNOWN = 0.5  # spread from which they can't be told apart at all
AGAIN = "run the command again on a quieter machine"
WAITS = 0.2  # share of a step spent waiting for data, from which the run is bound by data
FIXED = 0.3  # share of a step that isn't passes, from which ranks are bound by communication

Bound = Literal["data", "communication", "compute"]


@dataclass(frozen=True, slots=True)
class Timed:
    """The measured speed of one per-GPU batch.

    Attributes:
        per_gpu: samples of a pass on each rank.
        fixed_ms, pass_ms: see above.
        data_wait: share of a step in which ranks wait for their data.
        spread: of the repeated times of a step with one pass, see ``spread_of``.
    """

    per_gpu: int
    fixed_ms: float
    pass_ms: float
    data_wait: float
    spread: float = 0.0

    @property
    def step_ms(self) -> float:
        """Return the time of a step with one pass."""
        return self.fixed_ms + self.pass_ms

    @classmethod
    def of(cls, per_gpu: int, one_ms: Sequence[float], two_ms: Sequence[float], data_wait: float) -> Timed:
        """Return the speed from repeated times of a step with one pass and with two: their medians are taken."""
        one, two = statistics.median(one_ms), statistics.median(two_ms)
        passes = min(one, max(two - one, one / 10))  # noise may make either part negative
        return cls(per_gpu, one - passes, passes, data_wait, spread_of(one_ms))


def spread_of(times: Sequence[float]) -> float:
    """Return the distance between the quartiles of repeated times, as a share of their median; 0 of one time.

    The medians of two sizes that are equally fast differ by less in 88 % of cases with three times each, and in 95 %
    with five, for normal errors. Unlike a standard deviation, one outlier hardly changes it.
    """
    if len(times) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(times, n=4)
    return (high - low) / middle


def without_slow_rounds(times: Sequence[Sequence[float]]) -> list[list[float]]:
    """Divide the times of each round by how slow the machine was in it.

    That is the median over all sizes of a time relative to the size's own median. So what slows a whole round down
    neither blurs the comparison of sizes nor counts as spread.

    Args:
        times: of each size, one of each round. With fewer than three sizes they are returned as they are.

    >>> without_slow_rounds([[1.0, 2.0, 1.0], [3.0, 6.0, 3.0], [5.0, 10.0, 5.5]])
    [[1.0, 1.0, 1.0], [3.0, 3.0, 3.0], [5.0, 5.0, 5.5]]
    """
    if len(times) < 3:
        return [[*one] for one in times]
    own = [statistics.median(one) for one in times]
    slow = [statistics.median(map(truediv, each, own)) for each in zip(*times, strict=True)]
    return [list(map(truediv, one, slow)) for one in times]


@dataclass(frozen=True, slots=True)
class Speed:
    """The measured speed of several per-GPU batches.

    Attributes:
        world: ranks.
        sizes: by ascending size; at least one.
        granule, even, bitwise: how a plan cuts a global batch, see ``geometry.solve``.
    """

    world: int
    sizes: tuple[Timed, ...]
    granule: int = 1
    even: bool = False
    bitwise: bool = False

    def samples_per_s(self, timed: Timed) -> float:
        """Return the speed of steps with one pass, over all ranks."""
        return 1000 * self.world * timed.per_gpu / timed.step_ms

    @property
    def spread(self) -> float:
        """Return the spread of all sizes' times: the median, since each is of a few times only."""
        return statistics.median(timed.spread for timed in self.sizes)

    @property
    def knee(self) -> Timed:
        """Return the smallest size as fast as the fastest one, within 5 % or the spread of the times."""
        best = max(map(self.samples_per_s, self.sizes))
        return next(timed for timed in self.sizes if self.samples_per_s(timed) * (1 + self.tolerance) >= best)

    @property
    def tolerance(self) -> float:
        """Return the relative difference of two speeds that doesn't matter, or can't be measured."""
        return max(KNEE, self.spread)

    @property
    def bound(self) -> Bound:
        """Return what bounds the speed at the knee."""
        knee = self.knee
        if knee.data_wait >= WAITS:
            return "data"
        return "communication" if self.world > 1 and knee.fixed_ms >= FIXED * knee.step_ms else "compute"

    def fastest(self, global_size: int, max_step_ms: float = math.inf) -> tuple[int, int, float] | None:
        """Return the per-GPU batch, accumulation and milliseconds of the fastest step of ``global_size``.

        Only per-GPU batches up to the largest measured one are considered, times between two are interpolated.

        Args:
            global_size: samples, at least one granule per rank.
            max_step_ms: the longest step.

        Returns:
            None if every way takes longer than ``max_step_ms``, or none is even where it has to be.
        """
        ways = []
        for cut in self._cuts(global_size):
            size, passes = cut.micro_batches[0][0], cut.accumulation
            ways.append((self.fixed_ms(size) + passes * self.pass_ms(size), passes, size))
        step_ms, passes, size = min(ways, default=(math.inf, 0, 0))
        return (size, passes, step_ms) if ways and step_ms <= max_step_ms else None

    def _cuts(self, global_size: int) -> Iterator[Cut]:
        """Yield the ways to cut a global batch, by per-GPU batch: each measured one, or the whole share of a rank."""
        share = max(self.granule, -(-global_size // self.world))
        limits = {min(timed.per_gpu, share) for timed in self.sizes}
        if self.even:  # rarely at the measured sizes, so at all that divide the share, between these
            limits |= {size for size in range(self.sizes[0].per_gpu, max(limits) + 1) if share % size == 0}
        for limit in sorted(limits):
            cut = solve(self.world, global_size=global_size, per_gpu=limit, granule=self.granule, bitwise=self.bitwise)
            if cut.even or not self.even:
                yield cut

    def fixed_ms(self, per_gpu: int) -> float:
        return _interpolated(per_gpu, [(timed.per_gpu, timed.fixed_ms) for timed in self.sizes])

    def pass_ms(self, per_gpu: int) -> float:
        return _interpolated(per_gpu, [(timed.per_gpu, timed.pass_ms) for timed in self.sizes])

    def plain(self) -> dict[str, Any]:
        """Return the object of ``tune.json``."""
        rows = [
            {
                "per_gpu": timed.per_gpu,
                "samples_per_s": self.samples_per_s(timed),
                "step_ms": timed.step_ms,
                "pass_ms": timed.pass_ms,
                "fixed_ms": timed.fixed_ms,
                "data_wait": timed.data_wait,
                "spread": timed.spread,
            }
            for timed in self.sizes
        ]
        knee = self.knee.per_gpu
        return {"world_size": self.world, "sizes": rows, "knee": knee, "bound": self.bound, "spread": self.spread}

    @classmethod
    def parse(cls, plain: Mapping[str, Any]) -> Speed:
        """Return the speed that ``plain`` gave. Raises KeyError, TypeError or ValueError if it isn't one."""
        names = ("per_gpu", "fixed_ms", "pass_ms", "data_wait", "spread")
        sizes = tuple(Timed(*(row[name] for name in names)) for row in plain["sizes"])
        if not sizes or any(timed.step_ms <= 0 for timed in sizes):
            raise ValueError("no measured sizes")
        return cls(plain["world_size"], sizes)


def known_speed(parts: Mapping[str, Mapping[str, Any]], plan: Plan) -> Speed | None:
    """Return the measured speed among the results of all parts, for batches that are cut as the plan's.

    Returns:
        None if there is none, or if its times spread too much to tell anything.
    """
    found = Speed.parse(parts["speed"]) if "speed" in parts else None
    if found is None or unknown(found.spread):
        return None
    return replace(found, granule=plan.granule, even=plan.even, bitwise=plan.numerics == "bitwise")


def unknown(spread: float) -> str:
    """Return that the speed isn't known, if its times spread too much to tell anything; else ""."""
    return f"the speed isn't known here: repeated times spread by {spread:.0%}" if spread > UNKNOWN else ""


def sizes_to_time(most: int, granule: int = 1) -> list[int]:
    """Return the per-GPU batches to time: doublings of the granule up to ``most``, and ``most``.

    >>> sizes_to_time(100)
    [1, 2, 4, 8, 16, 32, 64, 100]
    """
    sizes, size = [], granule
    while size < most:
        sizes.append(size)
        size *= 2
    return [*sizes, most]


def _interpolated(x: float, points: Sequence[tuple[float, float]]) -> float:
    """Return the value at ``x`` on the straight lines between points; below the first one, its value."""
    at = bisect_left(points, x, key=lambda point: point[0])
    if at == 0:
        return points[0][1]
    if at == len(points):
        return points[-1][1]
    (left, low), (right, high) = points[at - 1], points[at]
    return low + (high - low) * (x - left) / (right - left)
