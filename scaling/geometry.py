"""How one global batch is dealt to ranks and micro-batches: global = per-GPU × world size × accumulation.

Glossary: a *granule* is the fewest samples that may not be parted (1, or BatchNorm's ghost size); a *pass* is one
forward/backward of every rank at once; micro-batch j of a step is pass j // world of rank j % world.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cut:
    """One global batch, cut into world × accumulation consecutive micro-batches as equal as they can be.

    Sizes differ by at most one granule, the larger ones first, so 100 samples on 3 ranks × 2 passes are
    17, 17, 17 | 17, 16, 16. Micro-batches beyond the number of granules are empty.

    >>> cut = Cut(global_size=100, per_gpu=17, world=3, accumulation=2)
    >>> cut.micro_batches, [cut.share(rank) for rank in range(3)]
    (((17, 4), (16, 2)), [34, 33, 33])

    Attributes:
        global_size, per_gpu: samples; ``per_gpu`` is the most that a micro-batch may hold.
        world, accumulation: ranks; passes of each rank per optimizer step.
        granule: samples that stay together; divides ``global_size``.
    """

    global_size: int
    per_gpu: int
    world: int
    accumulation: int
    granule: int = 1

    def __post_init__(self) -> None:
        assert min(self.global_size, self.per_gpu, self.world, self.accumulation, self.granule) >= 1, self
        assert self.global_size % self.granule == 0, self
        assert self.micro_batches[0][0] <= self.per_gpu, self

    def _dealt(self) -> tuple[int, int]:
        """Granules that every micro-batch has, and how many micro-batches have one more."""
        return divmod(self.global_size // self.granule, self.world * self.accumulation)

    @property
    def micro_batches(self) -> tuple[tuple[int, int], ...]:
        """Sizes in samples, in the order j, as run-lengths ((size, how many), …)."""
        base, larger = self._dealt()
        smaller = self.world * self.accumulation - larger
        runs = (((base + 1) * self.granule, larger), (base * self.granule, smaller))
        return tuple(run for run in runs if run[1])

    def micro(self, rank: int, index: int) -> tuple[int, int]:
        """The range [start, stop) of pass ``index`` of ``rank``, in samples from the start of the step."""
        base, larger = self._dealt()
        j = index * self.world + rank
        start = j * base + min(j, larger)
        return start * self.granule, (start + base + (j < larger)) * self.granule

    def passes(self, rank: int) -> Iterator[tuple[int, int]]:
        """The ranges of all passes of ``rank``: always exactly ``accumulation`` of them."""
        return (self.micro(rank, index) for index in range(self.accumulation))

    def share(self, rank: int) -> int:
        """Samples of ``rank`` in one step."""
        base, larger = self._dealt()
        more = max(0, -(-(larger - rank) // self.world))
        return (self.accumulation * base + more) * self.granule

    @property
    def even(self) -> bool:
        return len(self.micro_batches) == 1

    @property
    def idle(self) -> float:
        """Share of the work that idles: what all ranks could do while the busiest one (rank 0) does its share."""
        return 1 - self.global_size / (self.world * self.share(0))


def solve(
    world: int,
    *,
    global_size: int | None = None,
    per_gpu: int | None = None,
    accumulation: int | None = None,
    granule: int = 1,
    even: bool = False,
) -> Cut:
    """Solve whatever isn't given of global batch = per-GPU batch × world size × accumulation.

    With ``global_size`` and ``per_gpu``: accumulation = ⌈granules / (world × ⌊per_gpu / granule⌋)⌉. Without
    ``per_gpu``: per_gpu = ⌈granules / (world × accumulation)⌉ granules, accumulation 1 unless given. Without
    ``global_size``: the product of the others.

    Args:
        global_size, per_gpu, granule: samples.
        even: refuse a cut whose micro-batches aren't all of one size.

    Raises:
        ValueError: a size below 1, three sizes that contradict each other, a granule that doesn't fit, or an uneven
            cut under ``even``; with the nearest sizes that would do.
    """
    given = {"batch.global_size": global_size, "batch.per_gpu": per_gpu, "batch.accumulation": accumulation}
    for name, size in {**given, "the world size": world}.items():
        if size is not None and size < 1:
            raise ValueError(f"{name}={size}: has to be at least 1")
    if per_gpu is not None and per_gpu < granule:
        raise ValueError(
            f"batch.per_gpu={per_gpu} is below {granule} samples, which have to stay together; use {granule} or more"
        )
    if global_size is None:
        if per_gpu is None:
            raise ValueError("of batch.global_size and batch.per_gpu at least one has to be given")
        accumulation = accumulation or 1
        global_size = per_gpu // granule * granule * world * accumulation
    if global_size % granule:
        low = global_size // granule * granule
        near = " or ".join(str(size) for size in (low, low + granule) if size)
        raise ValueError(
            f"batch.global_size={global_size} isn't a multiple of {granule} samples, which have to stay together; "
            f"nearest: {near}"
        )
    granules = global_size // granule
    if per_gpu is None:
        accumulation = accumulation or 1
        per_gpu = -(-granules // (world * accumulation)) * granule
    else:
        needed = -(-granules // (world * (per_gpu // granule)))
        if accumulation not in (None, needed):
            raise ValueError(_contradiction(global_size, per_gpu, accumulation, world, granule, needed))
        accumulation = needed
    cut = Cut(global_size, per_gpu, world, accumulation, granule)
    if even and not cut.even:
        raise ValueError(_uneven(cut, given["batch.per_gpu"]))
    return cut


def _contradiction(global_size: int, per_gpu: int, accumulation: int, world: int, granule: int, needed: int) -> str:
    granules, ranks = global_size // granule, _count(world, "rank")
    fits = [f"batch.accumulation={needed}", f"batch.global_size={per_gpu // granule * granule * world * accumulation}"]
    smaller = -(-granules // (world * accumulation))
    if -(-granules // (world * smaller)) == accumulation:
        fits.insert(1, f"batch.per_gpu={smaller * granule}")
    return (
        f"batch.global_size={global_size}, batch.per_gpu={per_gpu} and batch.accumulation={accumulation} contradict "
        f"each other on {ranks}: {global_size} samples in micro-batches of at most {per_gpu} take "
        f"{_count(needed, 'pass')}. Give two of the three, or one of these instead: {', '.join(fits)}"
    )


def _uneven(cut: Cut, per_gpu: int | None) -> str:
    accumulation = cut.accumulation if per_gpu is None else None

    def fits(world: int, size: int) -> bool:
        asked = solve(world, global_size=size, per_gpu=per_gpu, accumulation=accumulation, granule=cut.granule)
        return asked.even

    sizes_that_fit = _nearest(cut.global_size, cut.granule, lambda size: fits(cut.world, size))
    worlds_that_fit = _nearest(cut.world, 1, lambda world: fits(world, cut.global_size))

    sizes = " and ".join(f"{count} of {size}" for size, count in cut.micro_batches)
    return (
        f"batch.even=true, but batch.global_size={cut.global_size} on {_count(cut.world, 'rank')} × "
        f"{_count(cut.accumulation, 'pass')} gives unequal micro-batches ({sizes}); nearest even global batches on "
        f"{_count(cut.world, 'rank')}: {sizes_that_fit}; nearest world sizes for {cut.global_size}: {worlds_that_fit}"
    )


def _nearest(value: int, stride: int, fits: Callable[[int], bool]) -> str:
    """The nearest multiples of ``stride`` below and above ``value`` that fit; the search is bounded."""
    reach = 100_000 * stride
    below = next(filter(fits, range(value - stride, max(0, value - reach), -stride)), None)
    above = next(filter(fits, range(value + stride, value + reach, stride)), None)
    return " or ".join(str(found) for found in (below, above) if found) or "none"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 'es' if noun.endswith('s') else 's'}"
