"""Add up the memory of a training step from its parts, on any engine and any number of ranks.

The parts were traced on one rank without allocating them (trainers/tuning/estimate.py). An engine's own buffers follow
from what it shards: see ``placed``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

from isobatch.scaling.plan import EnginePlacement

EQUAL = 0.02  # relative difference of two slopes that count as equal
BUCKET = 2_000_000_000  # bytes of DeepSpeed's largest bucket of gradients: 5e8 elements of 4 bytes


@dataclass(frozen=True, slots=True)
class Pass:
    """Describe the memory of a forward and backward over ``per_gpu`` samples, in bytes beyond what lasts.

    Attributes:
        alone: the peak of a step's only pass, with the gradients that it makes.
        held: the peak of a later pass, beyond the gradients that it adds to.
    """

    per_gpu: int
    alone: int
    held: int


@dataclass(frozen=True, slots=True)
class Footprint:
    """Hold the parts of a step's memory on one rank without sharding, in bytes.

    Attributes:
        gradients: of the trained parameters.
        update: temporary tensors of an optimizer step.
        average: the moving average of the weights.
        block: parameters of the largest group that engine=fsdp gathers at once; ``rest``: those in none of them.
        blocks: patterns of the names of the model's repeated blocks; empty if it has none.
        process: the memory of the process without the model; 0 on a GPU.
        passes: at least two sizes; empty if the forward couldn't be traced.
        why_not: why it couldn't; empty if it could.
    """

    parameters: int
    gradients: int
    optimizer: int
    buffers: int = 0
    update: int = 0
    average: int = 0
    block: int = 0
    rest: int = 0
    process: int = 0
    blocks: str = ""
    passes: tuple[Pass, ...] = ()
    why_not: str = ""


@dataclass(frozen=True, slots=True)
class Curve:
    """The peak of a step by per-GPU batch: max(step, fixed + activations), in bytes.

    Attributes:
        step: the peak of the optimizer step.
        fixed: what lasts over the passes.
        points: (per-GPU batch, bytes of a pass beyond ``fixed``), at least two, ascending.
    """

    step: int
    fixed: int
    points: tuple[tuple[int, int], ...]

    @property
    def per_sample(self) -> float:
        """Return the slope of the last two points, in bytes per sample."""
        return max(0.0, slope(*self.points[-2:]))

    def peak(self, per_gpu: float) -> float:
        """Return the peak in bytes, on the line through the last two points."""
        last, high = self.points[-1]
        return max(self.step, self.fixed + high + self.per_sample * (per_gpu - last))

    def largest(self, room: float, multiple: int = 1) -> int:
        """Return the largest per-GPU batch whose peak is at most ``room``, a whole multiple; 0 if there is none."""
        if self.step > room:
            return 0
        last, high = self.points[-1]
        if not self.per_sample:
            return 0 if self.peak(last) > room else 1 << 40
        found = last + (room - self.fixed - high) / self.per_sample
        return max(0, int(found) // multiple * multiple)


def curve(found: Footprint, engine: EnginePlacement, world: int, *, accumulates: bool) -> Curve | None:
    """Return the peak of a step on each of ``world`` ranks; None if the forward couldn't be traced.

    Args:
        accumulates: a step has several passes.
    """
    if not found.passes:
        return None
    step, fixed, alone = placed(found, engine, world)
    alone = alone and not accumulates
    points = tuple((one.per_gpu, one.alone if alone else one.held) for one in found.passes)
    return Curve(step, fixed - found.gradients if alone else fixed, points)


def placed(found: Footprint, engine: EnginePlacement, world: int) -> tuple[int, int, bool]:
    """Return the bytes at the optimizer step, those that last over the passes, and whether a pass may be alone.

    DDP's buckets hold the gradient over the whole run, so no pass is alone with it.
    """
    lasting = found.process + found.buffers
    whole = lasting + found.parameters + found.optimizer + found.average + found.gradients
    if engine.name in ("ddp", "accelerate") or (engine.name == "deepspeed" and not engine.stage):
        return whole + found.update, whole, world == 1 and engine.name != "deepspeed"
    parameters, gradients, state, average, update = (
        ceil(part / world) for part in (found.parameters, found.gradients, found.optimizer, found.average, found.update)
    )
    if engine.name == "fsdp":
        offloaded = parameters + gradients + state if engine.offloads else 0
        shards = lasting + parameters + gradients + state + average
        gathered = found.rest + 2 * found.block  # the next group is gathered while one computes
        return shards + update - offloaded, shards + gathered + found.block - offloaded, False
    bucket = min(found.gradients, BUCKET)
    offloaded = state + gradients if engine.offloads else 0
    if engine.stage == 3:
        shards = lasting + 2 * parameters + gradients + state + average
        return shards + update - offloaded, shards + bucket + found.rest + 2 * found.block - offloaded, False
    kept = lasting + found.parameters + gradients + state + average  # a copy of its part of the weights
    own = found.gradients if engine.stage == 1 else gradients
    shards = kept + own
    return shards + update + bucket - offloaded, shards + bucket - offloaded, False


def settled(passes: list[Pass], value: Callable[[Pass], int] = lambda one: one.held) -> bool:
    """Return whether the last three sizes lie on a line: two consecutive slopes are equal."""
    return straight([(one.per_gpu, value(one)) for one in passes], EQUAL)


def straight(points: Sequence[tuple[int, int]], tolerance: float) -> bool:
    """Return whether the last three points (per-GPU batch, bytes) lie on a line, within a relative tolerance."""
    if len(points) < 3:
        return False
    slopes = slope(*points[-3:-1]), slope(*points[-2:])
    return abs(slopes[1] - slopes[0]) <= tolerance * max(map(abs, slopes))


def slope(low: tuple[int, int], high: tuple[int, int]) -> float:
    """Return the bytes per sample between two points (per-GPU batch, bytes)."""
    return (high[1] - low[1]) / (high[0] - low[0])
