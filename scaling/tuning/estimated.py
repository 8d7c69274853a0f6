"""The estimate of a run's memory that ``action=plan plan.memory=true`` shows, and what would need less. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from math import lcm
from typing import Any

from isobatch.scaling.errors import UserError
from isobatch.scaling.geometry import counted
from isobatch.scaling.plan import EnginePlacement, Plan
from isobatch.scaling.tuning.footprint import Curve, Footprint, curve, placed
from isobatch.scaling.tuning.memory import EIGHTS, NEVER

ADAFACTOR = "optimizer=adafactor"  # whose state is small
GB, MB = 1e9, 1e6
MOST_GB = 10_000  # of one device; a larger number is in another unit


@dataclass(frozen=True, slots=True)
class Way:
    """Describe a change that needs less memory.

    Attributes:
        change: the overrides.
        per_gpu: the largest per-GPU batch with it; None: not known.
        fixed_gb: memory that doesn't depend on the batch.
    """

    change: str
    per_gpu: int | None
    fixed_gb: float
    per_sample_mb: float | None


@dataclass(frozen=True, slots=True)
class Estimate:
    """Hold the estimated memory of a step on one rank.

    Attributes:
        limit_gb: memory of a device, or of a rank's process; ``limit_from`` is where it comes from.
        margin: the share of it that stays free.
        process_gb: the process without the model; 0 on a GPU.
        update_gb: temporary tensors of an optimizer step.
        fixed_gb: what lasts over the passes, with the engine's buffers; ``step_gb``: the peak of the optimizer step.
        per_sample_mb: activations per sample; None: not known, for the reason ``why_not``.
        per_gpu: the largest per-GPU batch that fits; 0: none does.
        planned: the plan's per-GPU batch, and ``planned_gb`` its peak.
        automatic: the optimizer that optimizer=auto chose, without knowing of memory; empty if it was named.
        ways: changes that need less.
    """

    limit_gb: float
    limit_from: str
    margin: float
    parameters_gb: float
    gradients_gb: float
    optimizer_gb: float
    buffers_gb: float
    process_gb: float
    update_gb: float
    fixed_gb: float
    step_gb: float
    per_sample_mb: float | None
    per_gpu: int | None
    planned: int
    planned_gb: float | None
    why_not: str
    automatic: str
    ways: tuple[Way, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def from_json(text: str) -> Estimate:
    """Return the estimate that a child of this process sent."""
    fields = json.loads(text)
    return Estimate(**{**fields, "ways": tuple(Way(**way) for way in fields["ways"])})


def refuse_absurd(gb: float | None, key: str) -> None:
    """Raise UserError for more memory than any device has."""
    if gb is not None and gb > MOST_GB:
        fix = "give the memory of one device in GB (1e9 bytes), such as 80"
        raise UserError(f"{key}={gb:g} is more than any device has", fix, key, gb)


def whole(size: float, granule: int) -> int:
    """Round a per-GPU batch down to a multiple of 8 and of ``granule``, or only of ``granule`` if it is smaller."""
    eights = lcm(EIGHTS, granule)
    return int(size) // eights * eights if size >= eights else int(size) // granule * granule


def fitting(found: Footprint, engine: EnginePlacement, world: int, room: float, granule: int, cap: int) -> int | None:
    """Return the largest per-GPU batch within ``room`` bytes; None if the activations aren't known.

    A batch of ``cap`` samples is a step's only pass.
    """
    alone, several = (curve(found, engine, world, accumulates=accumulates) for accumulates in (False, True))
    if alone is None or several is None:
        step, fixed, _ = placed(found, engine, world)
        return 0 if max(step, fixed) > room else None
    if alone.peak(cap) <= room:
        return max(cap, whole(min(alone.largest(room), NEVER), granule))
    return whole(several.largest(room), granule)


def estimate(
    plan: Plan,
    found: Footprint,
    limit: tuple[float, str],
    margin: float,
    others: Mapping[str, Footprint],
    engines: Iterable[tuple[str, EnginePlacement, int]],
    automatic: str = "",
) -> Estimate:
    """Return the estimate for ``plan``.

    Args:
        limit: bytes, and where the limit comes from.
        others: footprints with other settings, by their overrides.
        engines: overrides, placement and ranks of other engines.
        automatic: see Estimate.
    """
    room, granule = limit[0] * (1 - margin), plan.granule
    cut = max((stage.cut for stage in plan.stages), key=lambda cut: cut.per_gpu)
    planned = cut.micro_batches[0][0]
    cap = -(-cut.global_size // cut.world)
    accumulates = cut.accumulation > 1
    step, fixed, _ = placed(found, plan.engine, plan.world)
    known = curve(found, plan.engine, plan.world, accumulates=accumulates)
    ways = [_way(change, one, plan.engine, plan.world, room, granule, cap) for change, one in others.items()]
    ways += [_way(change, found, engine, world, room, granule, cap) for change, engine, world in engines]
    return Estimate(
        limit_gb=limit[0] / GB,
        limit_from=limit[1],
        margin=margin,
        parameters_gb=found.parameters / GB,
        gradients_gb=found.gradients / GB,
        optimizer_gb=found.optimizer / GB,
        buffers_gb=found.buffers / GB,
        process_gb=found.process / GB,
        update_gb=found.update / GB,
        fixed_gb=(known.fixed if known else fixed) / GB,
        step_gb=step / GB,
        per_sample_mb=known.per_sample / MB if known else None,
        per_gpu=fitting(found, plan.engine, plan.world, room, granule, cap),
        planned=planned,
        planned_gb=known.peak(planned) / GB if known else None,
        why_not=found.why_not,
        automatic=automatic,
        ways=tuple(ways),
    )


def _way(
    change: str, found: Footprint, engine: EnginePlacement, world: int, room: float, granule: int, cap: int
) -> Way:
    known: Curve | None = curve(found, engine, world, accumulates=True)
    fixed = placed(found, engine, world)[1]
    return Way(
        change,
        fitting(found, engine, world, room, granule, cap),
        (known.fixed if known else fixed) / GB,
        known.per_sample / MB if known else None,
    )


def memory_row(found: Estimate) -> dict[str, Any]:
    """Return the estimate as columns of a table of plans."""
    return {"memory": None if found.planned_gb is None else size_of(found.planned_gb), "most per GPU": found.per_gpu}


def memory_rows(found: Estimate) -> Iterator[tuple[str, str]]:
    """Yield the estimate as labels and texts for the plan's table."""
    room = found.limit_gb * (1 - found.margin)
    free = f"of which {found.margin:.0%} stay free; estimated, without allocating it"
    yield "memory", f"{size_of(found.limit_gb)} ({found.limit_from}), {free}"
    parts = {
        "parameters": found.parameters_gb,
        "gradients": found.gradients_gb,
        "optimizer state": found.optimizer_gb,
        "buffers": found.buffers_gb,
        "process": found.process_gb,
    }
    yield "", ", ".join(f"{name} {size_of(gb)}" for name, gb in parts.items() if gb)
    if found.per_sample_mb is None:
        yield "", f"activations unknown: the loss can't run on fake tensors ({found.why_not})"
    else:
        step = f"the optimizer step needs {size_of(found.step_gb)}"
        yield (
            "",
            f"activations {size_of(found.per_sample_mb / 1e3)} per sample, above {size_of(found.fixed_gb)}; {step}",
        )
    yield "", _answer(found, room)
    if shorter := shorter_state(found):
        yield "", shorter
    for way in found.ways:
        yield "", f"{_largest(way.per_gpu)} with {way.change}"


def shorter_state(found: Estimate) -> str | None:
    """Return what optimizer=auto would have to know: another optimizer fits where memory is short for its choice."""
    short = found.per_gpu == 0 or (
        found.planned_gb is not None and found.planned_gb > found.limit_gb * (1 - found.margin)
    )
    other = next((way for way in found.ways if way.change == ADAFACTOR), None)
    if not (found.automatic and short and other and (other.per_gpu or 0) > (found.per_gpu or 0)):
        return None
    fits = f"{_largest(other.per_gpu)} per GPU instead of {_largest(found.per_gpu)}"
    return f"optimizer=auto chose {found.automatic} by the batch, and memory is short: {ADAFACTOR} fits {fits}"


def _answer(found: Estimate, room: float) -> str:
    if found.per_gpu is None:
        return "the largest per-GPU batch isn't known before it is measured"
    if found.per_gpu == 0:
        helps = [way.change for way in found.ways if way.per_gpu]
        what = f"{' or '.join(helps)} would fit" if helps else "none of the changes below is enough"
        return f"nothing fits: the smallest per-GPU batch needs more than {size_of(room)}; {what}"
    text = f"largest per-GPU batch: {_largest(found.per_gpu)}"
    if found.planned_gb is None:
        return text
    fits = "which fits" if found.planned_gb <= room else "which doesn't fit: a smaller batch.per_gpu accumulates"
    return f"{text}; the plan's {counted(found.planned, 'sample')} need {size_of(found.planned_gb)}, {fits}"


def _largest(per_gpu: int | None) -> str:
    if per_gpu is None:
        return "unknown"
    return "any number of samples" if per_gpu >= NEVER // 2 else counted(per_gpu, "sample") if per_gpu else "none"


def size_of(gb: float) -> str:
    """Format a size given in GB: ``1.5 GB``, ``12 MB``."""
    for unit, factor in (("GB", 1.0), ("MB", 1e3)):
        if gb * factor >= 0.1:
            return f"{gb * factor:.3g} {unit}"
    return f"{gb * 1e6:.3g} kB"
