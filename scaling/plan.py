"""The plan: every step of a run, computed before it starts. Frozen, torch-free, convertible to and from JSON."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, Literal, NamedTuple

from annotated_types import Len

from isobatch.scaling.control import Control, Part, course_of
from isobatch.scaling.errors import UserError
from isobatch.scaling.geometry import Cut, counted, halves, solve
from isobatch.scaling.limits import LARGEST, Identity, Seed, Size, Text
from isobatch.scaling.rules import OutOfRange, Recipe, Rule
from isobatch.scaling.schedule import Schedule, Segment, boundaries


@dataclass(frozen=True, slots=True)
class Step:
    """Describe one optimizer step: its samples [start, stop) of the sample order, and its recipe.

    ``index`` counts from 0. The loss is divided by ``expected_units`` before backward.

    Attributes:
        measured: the step measures the gradient noise, from the gradients of its micro-batches or of its halves.
        halves: the cuts of its two halves, if it measures these.
    """

    index: int
    start: int
    stop: int
    expected_units: int
    recipe: Recipe
    cut: Cut
    measured: bool = False
    halves: tuple[Cut, Cut] | None = None

    @property
    def parts(self) -> tuple[Cut, ...]:
        """Return the cuts of the consecutive parts of the step whose gradients are reduced by themselves."""
        return self.halves or (self.cut,)


@dataclass(frozen=True, slots=True)
class Choice:
    """Hold a name and the reason for it."""

    name: Text
    why: Text


Source = Literal["peak", "given", "paired", "moved", "tuned", "adapted", "usual"]


@dataclass(frozen=True, slots=True)
class EnginePlacement:
    """Describe where an engine keeps a run's tensors.

    Attributes:
        stage: stage of DeepSpeed's ZeRO.
        shards: tensors that are sharded over the ranks; every rank holds all other tensors whole.
        offloads: tensors in the host's memory.
    """

    name: Text
    stage: int | None = None
    shards: tuple[Text, ...] = ()
    offloads: tuple[Text, ...] = ()


@dataclass(frozen=True, slots=True)
class Intervals:
    """Hold the intervals of a run in samples; None: never, in minutes, or not known until the data is opened.

    Attributes:
        keep: of the checkpoints that are never removed.
        noise_parts: 2 measures the gradient noise from two halves of the global batch; None from its micro-batches.
    """

    log: Size | None
    evaluate: Size | None
    save: Size | None
    noise: Size | None
    keep: Size | None = None
    noise_parts: Literal[2] | None = None


def crossed(every: int | None, before: int, after: int) -> bool:
    """Return whether a multiple of ``every`` lies in (before, after]; None has no multiples."""
    return every is not None and after // every > before // every


class Stage(NamedTuple):
    """Describe a segment in a run: its first sample and step, its cut and its peak recipe."""

    start: int
    first_step: int
    cut: Cut
    peak: Recipe


@dataclass(frozen=True)
class Plan:
    """Describe every step of a run by its global batch.

    The types state the range of each field; ``plan_json.from_json`` checks them when it reads a stored plan. The plan
    itself validates that its fields are consistent.

    Attributes:
        segments: at least one, sorted by ``start_sample``, the first at 0.
        world: data-parallel ranks. ``per_gpu`` and ``accumulation`` are as requested (None: solved by ``Cut``).
        granule: samples that must stay in one micro-batch.
        even: reject uneven cuts.
        samples: the requested duration; None until the data is opened. The last step is whole, see ``added``.
        train_samples: samples of one epoch; None until the data is opened.
        units_per_sample: tokens per sample; None if the unit is the sample. ``unit`` is the unit of printed sizes.
        base, base_batch: the recipe that the rules start from, and the global batch it was tuned at.
        base_source: where the base comes from. ``peak``: the base LR is lr.peak, and the batch is that of the first
            segment unless the rule moves more than the LR.
        schedule: the LR over samples; None until ``samples`` is known.
        sync: BatchNorm computes its statistics over one pass of all ranks.
        numerics: ``bitwise`` cuts each step by ``per_gpu`` alone, the same way on any world.
        engine: the engine's placement of tensors on the current hardware.
        control: the controller that moves the batch, if any.
        decisions: the segments that it chose so far. The segments of a schedule that doubles the batch multiply them.
        measures: ``per_gpu`` will be measured at the start, and the cut is one without accumulation until then.
        intervals: of the current command. They aren't part of the run: plans that differ only in them are equal.
    """

    segments: Annotated[tuple[Segment, ...], Len(1)]
    world: Size
    per_gpu: Size | None
    accumulation: Size | None
    granule: Size
    even: bool
    seed: Seed
    samples: Size | None
    train_samples: Size | None
    unit: Literal["samples", "tokens"]
    units_per_sample: Size | None
    task: Text
    family: Text | None
    optimizer: Choice
    base: Recipe
    base_batch: Size
    base_source: Source
    schedule: Schedule | None
    identity: Identity
    sync: bool = False
    numerics: Literal["fast", "bitwise"] = "fast"
    engine: EnginePlacement = EnginePlacement("ddp")
    control: Control | None = None
    decisions: tuple[Segment, ...] = ()
    measures: bool = field(default=False, compare=False)
    intervals: Intervals = field(default=Intervals(None, None, None, None), compare=False)

    def __post_init__(self) -> None:
        starts = [segment.start_sample for segment in self.segments]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)):
            raise ValueError(f"segments start at {starts}; they have to start at sample 0 and rise")
        if self.base.lr <= 0:
            raise ValueError(f"the base LR is {self.base.lr:g}: has to be more than 0")
        if self.schedule and self.schedule.samples != self.samples:
            raise ValueError(f"the schedule has {self.schedule.samples} samples, but the run has {self.samples}")
        if self.unit == "tokens" and self.units_per_sample is None:
            raise ValueError("sizes in tokens need units_per_sample, the tokens of a sample")
        if self.numerics == "bitwise" and self.sync:
            statistics = "whose statistics depend on the number of ranks"
            problem = f"numerics=bitwise doesn't support batchnorm.mode=sync, {statistics}"
            fix = "use batchnorm.mode=ghost, or null, which normalises each micro-batch"
            raise UserError(problem, fix, "batchnorm.mode", "sync")
        decided = [decision.start_sample for decision in self.decisions]
        if (decided and not self.control) or decided != sorted(set(decided)) or 0 in decided:
            raise ValueError(f"decisions start at {decided}; they need a controller, and have to rise from above 0")
        self.stages  # noqa: B018  (validate the cut of every segment before the run starts)

    def decide(self, start_sample: int, size: int, noise_scale: float | None = None) -> Plan:
        """Return the plan with one more decision of the controller: the batch is ``size`` from ``start_sample`` on.

        Args:
            noise_scale: in samples, for the LR of AdaScale; None: not known, so as if all were noise.
        """
        assert self.control, "a plan without a controller takes no decisions"
        rule = self.segments[0].rule.later
        if self.control.lr == "hold":
            rule = replace(rule, fixed=("lr", *rule.fixed))
        if self.control.lr == "adascale":
            rule = Rule("noise", self.control.power, noise_scale or float(LARGEST), fixed=rule.fixed)
        return replace(self, decisions=(*self.decisions, Segment(start_sample, size, rule)))

    @property
    def _course(self) -> list[Part]:
        """Return the segments as decided so far."""
        limit = self.control.limit if self.control else None
        return course_of(self.segments, self.decisions, self.granule, limit)

    @cached_property
    def stages(self) -> list[Stage]:
        """Return the stages: each segment starts at the first step boundary at or after its start."""
        stages: list[Stage] = []
        begins = boundaries([(segment.start_sample, segment.global_size) for segment, _ in self._course])
        for (segment, moves), (start, first_step) in zip(self._course, begins, strict=True):
            cut = solve(
                self.world,
                global_size=segment.global_size,
                per_gpu=self.per_gpu,
                accumulation=self.accumulation,
                granule=self.granule,
                even=self.even,
                bitwise=self.numerics == "bitwise",
            )
            self._refuse_empty_passes(cut)
            stage = Stage(start, first_step, cut, self._carried(segment, moves, stages))
            if stages and start == stages[-1].start:
                stages.pop()  # the previous stage has no step
            if not stages or self.samples is None or start < self.samples:
                stages.append(stage)
        return stages

    def _refuse_empty_passes(self, cut: Cut) -> None:
        if self.sync and not cut.micro_batches[-1][0]:
            passes = f"{counted(cut.world, 'rank')} × accumulation {cut.accumulation}"
            step = f"{self.size(cut.global_size)} per step are fewer than {passes}"
            problem = f"batchnorm.mode=sync needs a sample on every rank in every pass, but {step}"
            fix = "use a larger batch.global_size, fewer ranks or passes, or batchnorm.mode=ghost"
            raise UserError(problem, fix, "batchnorm.mode", "sync")

    def _carried(self, segment: Segment, moves: tuple[tuple[Rule, int], ...], before: list[Stage]) -> Recipe:
        recipe, batch = (before[0].peak, before[0].cut.global_size) if before else (self.base, self.base_batch)
        try:
            for rule, size in moves:
                recipe, batch = rule.apply(recipe, batch, size), size
            return recipe
        except OutOfRange as error:
            key = "control.most" if self.decisions else "batch.global_size"
            use = "smaller stages" if before and not self.decisions else f"{key}={self.sized(error.largest)}"
            problem = f"a global batch of {self.size(segment.global_size)}: {error}"
            ways = f"use {use}, lr.rule=sqrt, or give optimizer.betas for this batch"
            fix = f"the largest batch at which it holds is {self.size(error.largest)}: {ways}"
            raise UserError(problem, fix, "lr.rule", segment.rule.name) from None

    def stage_at(self, sample: int) -> Stage:
        """Return the stage that contains ``sample``."""
        return self.stages[bisect_right(self.stages, sample, key=lambda stage: stage.start) - 1]

    def step_at(self, sample: int) -> Step | None:
        """Return the step that starts at ``sample``, or None after the last step. O(log segments).

        Raises:
            AssertionError: ``sample`` lies inside a step, or the plan isn't complete yet.
        """
        assert self.samples is not None, "the plan waits for the data to be opened"
        assert self.schedule is not None, "the schedule waits for the data to be opened"
        assert sample >= 0, f"there is no sample {sample}"
        if sample >= self.samples:
            return None
        stage = self.stage_at(sample)
        steps, inside = divmod(sample - stage.start, stage.cut.global_size)
        assert inside == 0, f"sample {sample} is {inside} samples inside a step"
        stop = sample + stage.cut.global_size
        measured, parts = self._measured(stage.cut, sample, stop)
        return Step(
            index=stage.first_step + steps,
            start=sample,
            stop=stop,
            expected_units=stage.cut.global_size * (self.units_per_sample or 1),
            recipe=replace(stage.peak, lr=self.schedule.lr(sample, stage.peak.lr)),
            cut=stage.cut,
            measured=measured,
            halves=parts,
        )

    def keeps(self, samples: int) -> bool:
        """Return whether the checkpoint after ``samples`` samples, at the end of a step, is never to be removed."""
        return samples > 0 and crossed(
            self.intervals.keep, samples - self.stage_at(samples - 1).cut.global_size, samples
        )

    def _measured(self, cut: Cut, before: int, after: int) -> tuple[bool, tuple[Cut, Cut] | None]:
        """Return whether the step of the samples (before, after] measures the noise, and the halves it measures."""
        every, parts = self.noise
        if not crossed(every, before, after):
            return False, None
        if parts is None:
            return cut.filled > 1, None
        found = self.halves(cut)
        return found is not None, found

    @property
    def noise(self) -> tuple[int | None, Literal[2] | None]:
        """Return the interval between measurements of the gradient noise, and the parts that are compared."""
        if self.control and self.control.by_noise:
            return self.control.every, 2
        return self.intervals.noise, self.intervals.noise_parts

    def halves(self, cut: Cut) -> tuple[Cut, Cut] | None:
        """Return the two halves of a step; None if it can't be halved."""
        found = halves(cut)
        if found and self.sync and not all(half.micro_batches[-1][0] for half in found):
            return None  # synchronised BatchNorm needs a sample on every rank in every pass
        if found and self.even and not all(half.even for half in found):
            return None
        return found

    @property
    def cut(self) -> Cut:
        """Return the cut of the first segment."""
        return self.stages[0].cut

    @property
    def peak(self) -> Recipe:
        """Return the recipe at the peak of the first segment."""
        return self.stages[0].peak

    def temperature(self, stage: Stage) -> float | None:
        """Return SGD's noise ηN/(B(1−m)) at a stage's peak, with N samples per epoch; None for other optimizers.

        The linear rule keeps it constant, so it compares two plans (Smith & Le 2018, arXiv:1710.06451).
        """
        if self.optimizer.name != "sgd" or self.train_samples is None or not stage.peak.betas:
            return None
        return stage.peak.lr * self.train_samples / (stage.cut.global_size * (1 - stage.peak.betas[0]))

    @property
    def steps(self) -> int | None:
        """Return the number of optimizer steps: ⌈samples / global batch⌉, summed over the stages."""
        if self.samples is None:
            return None
        last = self.stage_at(max(0, self.samples - 1))
        return last.first_step - (-(self.samples - last.start) // last.cut.global_size)

    @property
    def added(self) -> int | None:
        """Return the samples by which the whole last step exceeds ``samples``."""
        if self.samples is None:
            return None
        last = self.stage_at(max(0, self.samples - 1))
        return -(self.samples - last.start) % last.cut.global_size

    @property
    def epochs(self) -> float | None:
        """Return ``samples`` in epochs."""
        return self.samples / self.train_samples if self.samples is not None and self.train_samples else None

    def extend(self, segment: Segment) -> Plan:
        """Return the plan with ``segment`` appended. Raises ValueError if its start doesn't come after the others."""
        return replace(self, segments=(*self.segments, segment))

    @property
    def settled(self) -> Plan:
        """Return the plan with its decisions so far as segments, and without a controller."""
        return replace(self, segments=tuple(part.alone for part in self._course), control=None, decisions=())

    @property
    def largest(self) -> int:
        """Return the largest global batch, in samples, that a stage has or the controller may choose."""
        most = (self.control.limit or self.control.most) if self.control else 0
        return max(most, *(stage.cut.global_size for stage in self.stages))

    def boundary(self, sample: int) -> int:
        """Return the first step boundary at or after ``sample``, as planned so far."""
        stage = self.stage_at(sample)
        return sample + -(sample - stage.start) % stage.cut.global_size

    def dealt(self, world: int, per_gpu: int | None) -> Plan:
        """Return the plan on other hardware; only the cut of a step changes, not its micro-batches if bitwise."""
        assert self.numerics == "fast" or per_gpu == self.per_gpu, "batch.per_gpu is part of a bitwise run's identity"
        return replace(self, world=world, per_gpu=per_gpu, accumulation=None, measures=False)

    def sized(self, samples: int) -> int:
        """Convert ``samples`` to ``unit``."""
        return samples * (self.units_per_sample or 1) if self.unit == "tokens" else samples

    def size(self, samples: int) -> str:
        """Format a size with its unit: ``1,024 samples``, ``1 token``."""
        return counted(self.sized(samples), self.unit.removesuffix("s"))
