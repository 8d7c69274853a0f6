"""The estimate of a run's memory that ``action=plan plan.memory=true`` shows, and what would need less. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from isobatch.scaling.errors import UserError
from isobatch.scaling.geometry import Cut, counted
from isobatch.scaling.plan import EnginePlacement, Plan
from isobatch.scaling.tuning.footprint import Footprint, curve, placed
from isobatch.scaling.tuning.memory import NEVER, stride_at

ADAFACTOR = "optimizer=adafactor"  # whose state is small
GB, MB = 1e9, 1e6
CPU_BIAS = " (on a CPU up to a third too low)"  # measured, see trainers/tuning/memory.md
MOST_GB = 10_000  # of one device; a larger number is in another unit


@dataclass(frozen=True, slots=True)
class Way:
    """Describe a change that needs less memory.

    Attributes:
        change: the overrides.
        per_gpu: the largest per-GPU batch with it; None: not known.
        fixed_gb: memory that doesn't depend on the batch.
        planned_gb: the peak at the per-GPU batch that the command plans with the change.
        accumulation: passes of a step, if the change is a smaller per-GPU batch.
        planned: that per-GPU batch; None in a file that was written before it was kept.
    """

    change: str
    per_gpu: int | None
    fixed_gb: float
    per_sample_mb: float | None
    planned_gb: float | None
    accumulation: int | None = None
    planned: int | None = None

    def helps(self, own: Way) -> bool:
        """Return whether it needs less than the settings of ``own``, or fits a larger per-GPU batch."""
        needs, needed = (way.fixed_gb if way.planned_gb is None else way.planned_gb for way in (self, own))
        return needs < needed or (self.per_gpu or 0) > (own.per_gpu or 0)


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
        least_gb: the peak at the smallest per-GPU batch.
        per_gpu: the largest per-GPU batch that fits; 0: none does. A step of this run uses ``share`` samples of it.
        planned: the plan's per-GPU batch, and ``planned_gb`` its peak.
        automatic: the optimizer that optimizer=auto chose, without knowing of memory; empty if it was named.
        ways: changes that need less, or fit a larger per-GPU batch.
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
    least_gb: float
    per_gpu: int | None
    share: int
    planned: int
    planned_gb: float | None
    why_not: str
    automatic: str
    ways: tuple[Way, ...]

    @property
    def room_gb(self) -> float:
        """Return what a step may need."""
        return self.limit_gb * (1 - self.margin)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def from_json(fields: Mapping[str, Any]) -> Estimate:
    """Return the estimate that ``as_json`` returned."""
    return Estimate(**{**fields, "ways": tuple(Way(**way) for way in fields["ways"])})


def refuse_absurd(gb: float | None, key: str) -> None:
    """Raise UserError for more memory than any device has."""
    if gb is not None and gb > MOST_GB:
        fix = "give the memory of one device in GB (1e9 bytes), such as 80"
        raise UserError(f"{key}={gb:g} is more than any device has", fix, key, gb)


def refuse_too_small(found: Estimate) -> None:
    """Raise UserError for a given memory that is less than the weights or the bare process, if no change helps."""
    least = max(found.process_gb, found.parameters_gb)
    if not found.limit_from.startswith("cluster.") or found.limit_gb >= least or any(way.per_gpu for way in found.ways):
        return
    problem = f"{found.limit_from} leaves {size_of(found.limit_gb)} to a rank, but {needs_of(found)}"
    raise UserError(problem, f"give {found.limit_from} in GB (1e9 bytes), such as 80", found.limit_from)


def needs_of(found: Estimate) -> str:
    """Return what lasts over a run, without activations."""
    state = size_of(found.parameters_gb + found.gradients_gb + found.optimizer_gb)
    process = f", and the process without them {size_of(found.process_gb)}" if found.process_gb else ""
    return f"weights, gradients and optimizer state need {state}{process}"


def what_helps(found: Estimate) -> str:
    """Return what fits instead, where nothing does."""
    fits = [f"{way.change} ({_largest(way.per_gpu)} per GPU)" for way in found.ways if way.per_gpu]
    helps = f"with {' or '.join(fits)} it fits" if fits else "no change that the estimate knows is enough"
    if fits and (shorter := shorter_state(found)):
        helps += f"; {shorter}"
    bias = CPU_BIAS if found.process_gb else ""
    return f"by the estimate{bias}, {needs_of(found)}; {helps}"


@dataclass(frozen=True, slots=True)
class Sizes:
    """Hold the sizes of a plan that its memory depends on.

    Attributes:
        room: bytes that a step may need.
        share: the most samples of a rank in a step; a per-GPU batch of as many is a step's only pass.
        planned: the plan's per-GPU batch; ``accumulates``: in several passes.
    """

    room: float
    granule: int
    share: int
    planned: int
    accumulates: bool

    @classmethod
    def of(cls, plan: Plan, room: float) -> Sizes:
        """Return the sizes of the plan's largest passes."""
        cut = largest_cut(plan)
        share, planned = -(-cut.global_size // cut.world), cut.micro_batches[0][0]
        return cls(room, plan.granule, share, planned, cut.accumulation > 1)

    def whole(self, size: float) -> int:
        """Round a per-GPU batch down."""
        stride = stride_at(size, self.granule)
        return int(size) // stride * stride

    def largest(self, found: Footprint, engine: EnginePlacement, world: int) -> int | None:
        """Return the largest per-GPU batch that fits; None if the activations aren't known."""
        alone, several = (curve(found, engine, world, accumulates=accumulates) for accumulates in (False, True))
        if alone is None or several is None:
            step, fixed, _ = placed(found, engine, world)
            return 0 if max(step, fixed) > self.room else None
        if alone.peak(self.share) <= self.room:
            return max(self.share, self.whole(min(alone.largest(self.room), NEVER)))
        return self.whole(several.largest(self.room))

    def way(self, change: str, found: Footprint, engine: EnginePlacement, world: int) -> Way:
        """Return what a change of the settings needs."""
        known = curve(found, engine, world, accumulates=self.accumulates)
        return Way(
            change,
            self.largest(found, engine, world),
            (known.fixed if known else placed(found, engine, world)[1]) / GB,
            known.per_sample / MB if known else None,
            known.peak(self.planned) / GB if known else None,
            planned=self.planned,
        )


def estimate(
    plan: Plan,
    found: Footprint,
    limit: tuple[float, str],
    margin: float,
    others: Mapping[str, Footprint],
    engines: Mapping[str, Plan],
    automatic: str = "",
) -> Estimate:
    """Return the estimate for ``plan``.

    Args:
        limit: bytes, and where the limit comes from.
        others: footprints with other settings, by their overrides.
        engines: plans of the run with other engines, by their overrides.
        automatic: see Estimate.
    """
    sizes = Sizes.of(plan, room := limit[0] * (1 - margin))
    step, fixed, _ = placed(found, plan.engine, plan.world)
    own = sizes.way("", found, plan.engine, plan.world)
    known = curve(found, plan.engine, plan.world, accumulates=sizes.accumulates)
    ways = [*accumulating(plan, found, sizes)]
    ways += [sizes.way(change, one, plan.engine, plan.world) for change, one in others.items()]
    ways += [Sizes.of(one, room).way(change, found, one.engine, one.world) for change, one in engines.items()]
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
        fixed_gb=own.fixed_gb,
        step_gb=step / GB,
        per_sample_mb=own.per_sample_mb,
        least_gb=(known.peak(plan.granule) if known else max(step, fixed)) / GB,
        per_gpu=own.per_gpu,
        share=sizes.share,
        planned=sizes.planned,
        planned_gb=own.planned_gb,
        why_not=found.why_not,
        automatic=automatic,
        ways=tuple(way for way in ways if way.helps(own)),
    )


def largest_cut(plan: Plan) -> Cut:
    """Return the cut of the stage with the largest passes."""
    return max((stage.cut for stage in plan.stages), key=lambda cut: cut.per_gpu)


def accumulating(plan: Plan, found: Footprint, sizes: Sizes) -> Iterator[Way]:
    """Yield the same global batch in smaller passes: the per-GPU batch is halved until it fits."""
    known = curve(found, plan.engine, plan.world, accumulates=True)
    if known is None or plan.numerics == "bitwise":  # there the per-GPU batch is part of the run
        return
    size = sizes.planned
    while size := size // 2 // plan.granule * plan.granule:
        try:
            accumulation = largest_cut(plan.dealt(plan.world, size)).accumulation
        except UserError:  # batch.even can't have this size
            continue
        if known.peak(size) <= sizes.room:
            change = f"batch.per_gpu={plan.sized(size)}"
            yield Way(change, size, known.fixed / GB, known.per_sample / MB, known.peak(size) / GB, accumulation, size)
            return


def memory_row(found: Estimate) -> dict[str, Any]:
    """Return the estimate as columns of a table of plans."""
    return {"memory": None if found.planned_gb is None else size_of(found.planned_gb), "most per GPU": found.per_gpu}


def memory_rows(found: Estimate) -> Iterator[tuple[str, str]]:
    """Yield the estimate as labels and texts for the plan's table."""
    on_gpu = not found.process_gb
    free = f"of which {found.margin:.0%} stay free" + (", also for the context of CUDA" if on_gpu else "")
    how = "estimated, without allocating it" + ("" if on_gpu else CPU_BIAS)
    yield "memory", f"{size_of(found.limit_gb)} ({found.limit_from}), {free}; {how}"
    parts = {
        "parameters": found.parameters_gb,
        "gradients": found.gradients_gb,
        "optimizer state": found.optimizer_gb,
        "buffers": found.buffers_gb,
        "the process without them": found.process_gb,
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
    yield "", _answer(found)
    if shorter := shorter_state(found):
        yield "", shorter
    for way in found.ways:
        yield "", told_way(way)
    if not found.ways:
        yield "", "no change that the estimate knows needs less"


def told_way(way: Way) -> str:
    """Return what a change needs, and the largest per-GPU batch with it."""
    if way.planned_gb is None:
        return f"{way.change}: {size_of(way.fixed_gb)} without activations"
    if way.accumulation:
        return f"{way.change}: {size_of(way.planned_gb)}, with accumulation {way.accumulation}"
    most = "no size fits" if way.per_gpu == 0 else f"at most {_largest(way.per_gpu)}"
    return f"{way.change}: {size_of(way.planned_gb)} at {counted(way.planned or 0, 'sample')}; {most}"


def shorter_state(found: Estimate) -> str | None:
    """Return what optimizer=auto would have to know: another optimizer fits where memory is short for its choice."""
    short = found.per_gpu == 0 or (found.planned_gb is not None and found.planned_gb > found.room_gb)
    other = next((way for way in found.ways if way.change == ADAFACTOR), None)
    if not (found.automatic and short and other and (other.per_gpu or 0) > (found.per_gpu or 0)):
        return None
    fits = f"{_largest(other.per_gpu)} per GPU instead of {_largest(found.per_gpu)}"
    return f"optimizer=auto chose {found.automatic} by the batch, and memory is short: {ADAFACTOR} fits {fits}"


def _answer(found: Estimate) -> str:
    room = size_of(found.room_gb)
    if found.per_gpu is None:
        return "the largest per-GPU batch isn't known before it is measured"
    if found.per_gpu == 0:
        helps = [way.change for way in found.ways if way.per_gpu]
        nothing = "; none of the changes below is enough" if found.ways else ""
        what = f"; {' or '.join(helps)} would fit" if helps else nothing
        return f"nothing fits: the smallest per-GPU batch needs {size_of(found.least_gb)}, more than {room}{what}"
    text = f"largest per-GPU batch: {_largest(found.per_gpu)}"
    if found.per_gpu > found.share:
        text += f", of which a step of this run uses {found.share:,}"
    if found.planned_gb is None:
        return text
    fits = "which fits" if found.planned_gb <= found.room_gb else f"which doesn't fit into {room}"
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
