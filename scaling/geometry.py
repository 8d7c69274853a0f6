"""Split a global batch into micro-batches over ranks: global = per-GPU × world size × accumulation.

Glossary: a *granule* is the smallest group of samples that must not be split (1, or BatchNorm's ghost size). A *pass*
is one forward/backward of every rank at once. Micro-batch j of a step is pass j // world of rank j % world. With
bitwise numerics, *pieces* is the number of micro-batches on any world, and each rank has a contiguous *block* of them.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt

from isobatch.scaling.errors import UserError

TOGETHER = "which have to stay in one micro-batch (batchnorm.ghost_size)"


@dataclass(frozen=True, slots=True)
class Cut:
    """Cut a global batch into world × accumulation consecutive micro-batches of nearly equal size.

    Sizes differ by at most one granule, larger ones first, so 100 samples on 3 ranks × 2 passes are
    17, 17, 17 | 17, 16, 16. Micro-batches beyond the number of granules are empty.

    >>> cut = Cut(global_size=100, per_gpu=17, world=3, accumulation=2)
    >>> cut.micro_batches, [cut.share(rank) for rank in range(3)]
    (((17, 4), (16, 2)), [34, 33, 33])

    With ``pieces`` the batch is cut into that many micro-batches on any world. Each rank gets a block of consecutive
    ones, so each rank can start the sums of a fixed tree over them. Block lengths differ by at most one, longer ones
    first. If a block is shorter than ``accumulation``, the rank's last pass is empty.

    >>> cut = Cut(global_size=100, per_gpu=20, world=3, accumulation=2, pieces=5)
    >>> cut.micro_batches, [cut.block(rank) for rank in range(3)]
    (((20, 5), (0, 1)), [range(0, 2), range(2, 4), range(4, 5)])
    >>> [cut.share(rank) for rank in range(3)], list(cut.passes(2))
    ([40, 40, 20], [(80, 100), (100, 100)])

    Attributes:
        global_size, per_gpu: samples; ``per_gpu`` is the limit of a micro-batch.
        world, accumulation: ranks; passes of each rank per optimizer step.
        granule: samples that must not be split; divides ``global_size``.
        pieces: micro-batches of a step, if not world × accumulation.
    """

    global_size: int
    per_gpu: int
    world: int
    accumulation: int
    granule: int = 1
    pieces: int | None = None

    def __post_init__(self) -> None:
        assert min(self.global_size, self.per_gpu, self.world, self.accumulation, self.granule) >= 1, self
        assert self.global_size % self.granule == 0, self
        assert self.pieces is None or self.accumulation == _ceil(self.pieces, self.world), self
        assert self.micro_batches[0][0] <= self.per_gpu, self

    def _granules_each(self) -> tuple[int, int]:
        """Return the granules of every micro-batch, and the number of micro-batches with one more."""
        return divmod(self.global_size // self.granule, self.pieces or self.world * self.accumulation)

    @property
    def micro_batches(self) -> tuple[tuple[int, int], ...]:
        """Return the sizes by j as run-lengths ((size, count), …); passes without a micro-batch come last, as 0."""
        base, larger = self._granules_each()
        passes = self.world * self.accumulation
        pieces = self.pieces or passes
        runs = ((base + 1) * self.granule, larger), (base * self.granule, pieces - larger), (0, passes - pieces)
        return tuple(run for run in runs if run[1])

    def block(self, rank: int) -> range:
        """Return the micro-batches j of ``rank``, one per pass: every world-th, or consecutive with ``pieces``."""
        if self.pieces is None:
            return range(rank, self.world * self.accumulation, self.world)
        base, larger = divmod(self.pieces, self.world)
        start = rank * base + min(rank, larger)
        return range(start, start + base + (rank < larger))

    def _start(self, j: int) -> int:
        """Return the number of samples before micro-batch j of a step."""
        base, larger = self._granules_each()
        return (j * base + min(j, larger)) * self.granule

    def micro(self, rank: int, index: int) -> tuple[int, int]:
        """Return the range [start, stop) of pass ``index`` of ``rank``, in samples from the start of the step."""
        block = self.block(rank)
        if index < len(block):
            return self._start(block[index]), self._start(block[index] + 1)
        return self._start(block.stop), self._start(block.stop)

    def passes(self, rank: int) -> Iterator[tuple[int, int]]:
        """Return the ranges of the ``accumulation`` passes of ``rank``."""
        return (self.micro(rank, index) for index in range(self.accumulation))

    def share(self, rank: int) -> int:
        """Return the number of samples of ``rank`` in one step."""
        base, larger = self._granules_each()
        block = self.block(rank)
        more = len(range(block.start, min(larger, block.stop), block.step))
        return (len(block) * base + more) * self.granule

    @property
    def filled(self) -> int:
        """Return the number of non-empty micro-batches of a step."""
        return sum(count for size, count in self.micro_batches if size)

    @property
    def even(self) -> bool:
        return len(self.micro_batches) == 1

    @property
    def idle(self) -> float:
        """Return the share of time that ranks wait for rank 0, the busiest one."""
        return 1 - self.global_size / (self.world * self.share(0))


@lru_cache
def halves(cut: Cut) -> tuple[Cut, Cut] | None:
    """Return the cuts of the two halves of a step, each over all ranks; None if the step can't be halved.

    The halves don't depend on the ranks: each has whole granules, and the first has the odd one. With ``pieces`` each
    has whole pieces, and they are the halves of the tree that sums them. Every rank runs the same number of passes, and
    no micro-batch is larger than ``per_gpu``.

    >>> [half.micro_batches for half in halves(Cut(global_size=100, per_gpu=17, world=3, accumulation=2)) or ()]
    [((17, 2), (16, 1)), ((17, 2), (16, 1))]
    >>> halves(Cut(global_size=8, per_gpu=8, world=1, accumulation=1, granule=8)) is None
    True
    """
    whole = cut.pieces or cut.global_size // cut.granule
    if whole < 2:
        return None
    first = whole - whole // 2
    size = cut._start(first) if cut.pieces else first * cut.granule
    most = cut.per_gpu // cut.granule

    def half(samples: int, pieces: int) -> Cut:
        passes = _ceil(pieces, cut.world) if cut.pieces else _ceil(samples // cut.granule, cut.world * most)
        return Cut(samples, cut.per_gpu, cut.world, passes, cut.granule, pieces if cut.pieces else None)

    return half(size, first), half(cut.global_size - size, whole - first)


def solve(
    world: int,
    *,
    global_size: int | None = None,
    per_gpu: int | None = None,
    accumulation: int | None = None,
    granule: int = 1,
    even: bool = False,
    bitwise: bool = False,
) -> Cut:
    """Solve global batch = per-GPU batch × world size × accumulation for the missing sizes.

    With ``global_size`` and ``per_gpu``: accumulation = ⌈granules / (world × ⌊per_gpu / granule⌋)⌉. Without
    ``per_gpu``: per_gpu = ⌈granules / (world × accumulation)⌉ granules, accumulation 1 unless given. Without
    ``global_size``: the product of the other sizes.

    Args:
        global_size, per_gpu, granule: samples.
        even: reject a cut whose micro-batches have different sizes.
        bitwise: derive ``pieces`` from the global and the per-GPU batch alone: ⌈granules / ⌊per_gpu / granule⌋⌉.

    Raises:
        UserError: the three sizes contradict each other, the granule doesn't fit, ``bitwise`` has no ``per_gpu``, or
            ``even`` has an uneven cut. The message names the nearest sizes that work.
        ValueError: a size is below 1, or too few sizes are given.
    """
    sizes = {"batch.global_size": global_size, "batch.per_gpu": per_gpu, "batch.accumulation": accumulation}
    for name, size in {**sizes, "the world size": world}.items():
        if size is not None and size < 1:
            raise ValueError(f"{name}={size}: has to be at least 1")
    if bitwise and per_gpu is None:
        problem = "numerics=bitwise needs batch.per_gpu, to cut a step the same way on any number of processes"
        raise UserError(problem, "give batch.per_gpu, which is then part of the run's identity", "batch.per_gpu")
    if per_gpu is not None and per_gpu < granule:
        problem = f"batch.per_gpu={per_gpu} is below {granule}, {TOGETHER}"
        raise UserError(problem, f"use {granule}", "batch.per_gpu", per_gpu)
    if global_size is None:
        if per_gpu is None:
            raise ValueError("at least one of batch.global_size and batch.per_gpu has to be given")
        global_size = per_gpu // granule * granule * world * (accumulation or 1)
    granules, rest = divmod(global_size, granule)
    if rest:
        near = [count * granule for count in (granules, granules + 1) if count]
        problem = f"a global batch of {global_size} isn't a multiple of {granule}, {TOGETHER}"
        raise UserError(problem, f"nearest: {_or(near)}", "batch.global_size", global_size)
    passes = _passes(world, granules, per_gpu and per_gpu // granule, accumulation)
    pieces = _ceil(granules, per_gpu // granule) if bitwise and per_gpu else None
    cut = Cut(global_size, per_gpu or _ceil(granules, world * passes) * granule, world, passes, granule, pieces)
    if accumulation not in (None, passes):
        raise _contradiction(cut, accumulation, even)
    if even and not cut.even:
        raise _uneven(cut, per_gpu, accumulation)
    return cut


def nearest_even(cut: Cut, per_gpu: int | None, accumulation: int | None) -> list[int]:
    """Return the nearest even global batches below and above that of an uneven cut, in samples."""
    most, stride = per_gpu and per_gpu // cut.granule, cut.world * (accumulation or 1)
    first, reach = cut.global_size // cut.granule // stride * stride, 100_000 * stride
    ways = range(first, max(0, first - reach), -stride), range(first + stride, first + reach, stride)
    bitwise = cut.pieces is not None
    near = [next((n for n in way if _fits(cut.world, n, most, accumulation, True, bitwise)), None) for way in ways]
    return [granules * cut.granule for granules in near if granules]


def _passes(world: int, granules: int, most: int | None, accumulation: int | None) -> int:
    """Return the passes of each rank if a micro-batch holds at most ``most`` granules."""
    return accumulation or 1 if most is None else _ceil(granules, world * most)


def _fits(world: int, granules: int, most: int | None, accumulation: int | None, even: bool, bitwise: bool) -> bool:
    """Return True if the sizes don't contradict each other, and are even if ``even`` asks for it."""
    passes = _passes(world, granules, most, accumulation)
    pieces = _ceil(granules, most) if bitwise and most else world * passes
    return accumulation in (None, passes) and not (even and (granules % pieces or pieces % world))


def _contradiction(cut: Cut, accumulation: int, even: bool) -> UserError:
    """Return an error that names the fixes; ``cut`` solves the global and per-GPU batch without ``accumulation``."""
    world, granule = cut.world, cut.granule
    granules, most = cut.global_size // granule, cut.per_gpu // granule
    smaller, larger = _ceil(granules, world * accumulation), most * world * accumulation
    alternatives = {
        f"batch.accumulation={cut.accumulation}": (granules, most, cut.accumulation),
        f"batch.per_gpu={smaller * granule}": (granules, smaller, accumulation),
        f"batch.global_size={larger * granule}": (larger, most, accumulation),
    }
    fits = [text for text, sizes in alternatives.items() if _fits(world, *sizes, even, cut.pieces is not None)]
    sizes = f"batch.global_size={cut.global_size}, batch.per_gpu={cut.per_gpu} and batch.accumulation={accumulation}"
    passes = f"on {counted(world, 'rank')} the first two need {counted(cut.accumulation, 'pass', 'passes')}"
    fix = f"leave one of the three out, or change one: {_or(fits)}"
    return UserError(f"{sizes} contradict each other: {passes}", fix, "batch.accumulation", accumulation)


def _uneven(cut: Cut, per_gpu: int | None, accumulation: int | None) -> UserError:
    """Return an error that names the nearest even sizes."""
    granules, most = cut.global_size // cut.granule, per_gpu and per_gpu // cut.granule
    ranks = counted(cut.world, "rank")
    sizes = (granules, most, accumulation, True, cut.pieces is not None)
    small = [divisor for divisor in range(1, min(isqrt(granules), 10**6) + 1) if granules % divisor == 0]
    divisors = {*small, *(granules // divisor for divisor in small)}  # all of them up to 10^12 granules
    worlds = sorted(world for world in divisors if _fits(world, *sizes))
    above = bisect(worlds, cut.world)
    near = worlds[max(0, above - 1) : above + 1]
    parts = " and ".join(f"{count} of {size}" for size, count in cut.micro_batches)
    asked = f"batch.global_size={cut.global_size} on {ranks} × accumulation {cut.accumulation}"
    problem = f"batch.even=true, but {asked} gives unequal micro-batches ({parts})"
    batches = f"nearest even global batches on {ranks}: {_or(nearest_even(cut, per_gpu, accumulation))}"
    fix = f"{batches}; nearest world sizes for {cut.global_size}: {_or(near)}"
    return UserError(problem, fix, "batch.even", True)


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Format a number with its noun: ``1 rank``, ``1,024 ranks``."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def _or(alternatives: Iterable[object]) -> str:
    return " or ".join(map(str, alternatives)) or "none"


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
