"""The plan: what every step of a run is, before anything has started. Frozen, torch-free, JSON both ways."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

from scaling.geometry import Cut, counted, solve
from scaling.rules import Recipe, Rule
from scaling.schedule import Schedule


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of the run with one global batch.

    It starts at the first step boundary at or after ``start_sample``; ``rule`` carries the plan's base recipe to
    ``global_size`` samples.
    """

    start_sample: int
    global_size: int
    rule: Rule


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step: the samples [start, stop) of the sample order, and what the optimizer is told.

    ``index`` counts from 0; ``expected_units`` is what the loss is divided by before backward.
    """

    index: int
    start: int
    stop: int
    expected_units: int
    recipe: Recipe
    cut: Cut


@dataclass(frozen=True, slots=True)
class Choice:
    """A name and the reason for it."""

    name: str
    why: str


Source = Literal["peak", "given", "paired", "moved", "tuned", "usual"]

BASE_SOURCES: dict[Source, str] = {
    "peak": "lr.peak, given outright",
    "given": "given (lr.base)",
    "paired": "given (lr.base), at the batch of the task's or the optimizer's own (lr.base_batch names another)",
    "moved": "of the task or the optimizer, at a batch given instead of its own (lr.base_batch)",
    "tuned": "tuned for this task and optimizer",
    "usual": "a usual starting point of the optimizer, not tuned for this task",
}


class _Stretch(NamedTuple):
    """A segment as it runs: from which sample and step, with which cut and peak recipe."""

    start: int
    first_step: int
    cut: Cut
    peak: Recipe


@dataclass(frozen=True)
class Plan:
    """A run by its global batch.

    Attributes:
        segments: at least one, by rising ``start_sample``, the first at 0.
        world: data-parallel ranks. ``per_gpu`` and ``accumulation`` are as asked (None: solved by ``Cut``).
        granule: samples that stay together in one micro-batch.
        even: uneven cuts are refused.
        samples: what ``duration`` asks for; None until the data is opened. The last step is whole, see ``added``.
        train_samples: samples of one epoch, None until the data is opened.
        units_per_sample: tokens per sample; None where the unit is the sample. ``unit`` is how sizes are printed.
        base, base_batch: the recipe, and the global batch it is for, from which the rules start.
        base_source: where they come from, a key of BASE_SOURCES. ``peak``: lr.peak was given outright; it is then the
            base itself, at the first segment's batch.
        schedule: of the LR over samples; None until ``samples`` is known.
    """

    segments: tuple[Segment, ...]
    world: int
    per_gpu: int | None
    accumulation: int | None
    granule: int
    even: bool
    seed: int
    samples: int | None
    train_samples: int | None
    unit: Literal["samples", "tokens"]
    units_per_sample: int | None
    task: str
    family: str | None
    optimizer: Choice
    base: Recipe
    base_batch: int
    base_source: Source
    schedule: Schedule | None
    identity: str

    def __post_init__(self) -> None:
        starts = [segment.start_sample for segment in self.segments]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)):
            raise ValueError(f"segments have to start at sample 0 and rise; they start at {starts}")
        for name in ("samples", "train_samples", "units_per_sample", "base_batch"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise ValueError(f"{name}={number}: has to be at least 1")
        if self.unit == "tokens" and self.units_per_sample is None:
            raise ValueError("sizes in tokens need units_per_sample, the tokens of a sample")
        self._stretches  # noqa: B018  (every segment's cut is checked before the start, not when it is reached)

    @cached_property
    def _stretches(self) -> list[_Stretch]:
        stretches: list[_Stretch] = []
        for segment in self.segments:
            start = first_step = 0
            if stretches:
                last = stretches[-1]
                # None of the last segment's, where one step of the segment before it went past both starts.
                steps = max(0, -(-(segment.start_sample - last.start) // last.cut.global_size))
                start, first_step = last.start + steps * last.cut.global_size, last.first_step + steps
            cut = solve(
                self.world,
                global_size=segment.global_size,
                per_gpu=self.per_gpu,
                accumulation=self.accumulation,
                granule=self.granule,
                even=self.even,
            )
            peak = segment.rule.apply(self.base, segment.global_size / self.base_batch)
            stretches.append(_Stretch(start, first_step, cut, peak))
        return stretches

    def _stretch_at(self, sample: int) -> _Stretch:
        return self._stretches[bisect_right(self._stretches, sample, key=lambda stretch: stretch.start) - 1]

    def step_at(self, sample: int) -> Step | None:
        """The step that starts at ``sample``; None where the run is over. O(log segments).

        Raises:
            AssertionError: ``sample`` lies inside a step, or the plan isn't complete yet.
        """
        assert self.samples is not None, "the plan waits for the data to be opened"
        assert self.schedule is not None, "the schedule waits for the data to be opened"
        assert sample >= 0, f"there is no sample {sample}"
        if sample >= self.samples:
            return None
        stretch = self._stretch_at(sample)
        steps, inside = divmod(sample - stretch.start, stretch.cut.global_size)
        assert inside == 0, f"sample {sample} is {inside} samples inside a step"
        return Step(
            index=stretch.first_step + steps,
            start=sample,
            stop=sample + stretch.cut.global_size,
            expected_units=stretch.cut.global_size * (self.units_per_sample or 1),
            recipe=replace(stretch.peak, lr=self.schedule.lr(sample, stretch.peak.lr)),
            cut=stretch.cut,
        )

    @property
    def cut(self) -> Cut:
        """The cut of the first segment."""
        return self._stretches[0].cut

    @property
    def peak(self) -> Recipe:
        """The recipe at the peak of the first segment."""
        return self._stretches[0].peak

    @property
    def steps(self) -> int | None:
        """Optimizer steps of the run: ⌈samples / global batch⌉, segment by segment."""
        if self.samples is None:
            return None
        last = self._stretch_at(max(0, self.samples - 1))
        return last.first_step - (-(self.samples - last.start) // last.cut.global_size)

    @property
    def added(self) -> int | None:
        """Samples by which the whole last step exceeds ``samples``."""
        if self.samples is None:
            return None
        last = self._stretch_at(max(0, self.samples - 1))
        return -(self.samples - last.start) % last.cut.global_size

    @property
    def epochs(self) -> float | None:
        """``samples`` in epochs."""
        return self.samples / self.train_samples if self.samples is not None and self.train_samples else None

    def extend(self, segment: Segment) -> Plan:
        """The same plan with another segment after its last one.

        Raises:
            ValueError: it doesn't start after the last one, or its batch can't be dealt.
        """
        return replace(self, segments=(*self.segments, segment))

    def dealt(self, world: int, per_gpu: int | None) -> Plan:
        """The same run on other hardware: nothing of a step changes but its cut."""
        return replace(self, world=world, per_gpu=per_gpu, accumulation=None)

    def sized(self, samples: int) -> int:
        """A size in ``unit``, as it is given and printed."""
        return samples * (self.units_per_sample or 1) if self.unit == "tokens" else samples

    def size(self, samples: int) -> str:
        """The same with its unit: ``1,024 samples``, ``1 token``."""
        return counted(self.sized(samples), self.unit.removesuffix("s"))

    @property
    def lr_why(self) -> str:
        """The derivation of the peak LR: ``peak 0.4 = 0.1 × 1024/256 (linear; Goyal et al. 2017); base LR: …``."""
        rule, sizes = self.segments[0].rule, (self.cut.global_size, self.base_batch)
        if self.base_source == "peak":
            return f"peak {self.peak.lr:.6g} ({BASE_SOURCES['peak']})"
        factor = rule.law.factor.format(ratio="/".join(str(self.sized(size)) for size in sizes), power=rule.power or 0)
        derived = f"peak {self.peak.lr:.6g} = {self.base.lr:.6g} × {factor} ({rule.name}; {rule.law.source})"
        return f"{derived}; base LR: {BASE_SOURCES[self.base_source]}"
