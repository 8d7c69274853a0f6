"""Resolve a config to a plan: convert units to samples, solve missing sizes, derive the LR."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from isobatch.conf.identity import identity
from isobatch.conf.schema import RunConfig
from isobatch.scaling.batch_schedule import in_place_of_decay, segments_for
from isobatch.scaling.errors import UserError
from isobatch.scaling.geometry import counted
from isobatch.scaling.plan import Choice, Plan
from isobatch.scaling.planning.base_recipe import Base, base_of, rule_of
from isobatch.scaling.planning.capabilities import check_engine, placement
from isobatch.scaling.planning.control import controlled
from isobatch.scaling.planning.engine_config import check_engine_config
from isobatch.scaling.planning.lengths import Lengths, intervals_of, schedule_of
from isobatch.scaling.planning.sizes import (
    Sizes,
    asked,
    evaluation_batch,
    first_sizes,
    in_samples,
    largest_for_decay,
)
from isobatch.scaling.schedule import Schedule, Segment


def resolve(config: RunConfig, world: int, train_samples: int | None = None) -> Plan:
    """Return the plan of ``config`` on ``world`` ranks.

    Args:
        train_samples: length of the opened training data; None: the length in the task's YAML, if any.

    Raises:
        UserError: the config can't be met; the message names the nearest values that work, or the key to change.
    """
    train_samples = config.task.train_samples if train_samples is None else train_samples
    if train_samples == 0:
        raise UserError("the training data has 0 samples", "a run needs at least 1", "task.train_samples", 0)
    check_engine(config)
    sizes = first_sizes(config, world, train_samples)
    first = Segment(0, sizes.global_size, rule_of(config))
    base = base_of(config, first)
    lengths = _lengths(config, first, train_samples)
    plan = _unscheduled(config, world, sizes, first, base, lengths)
    check_engine_config(config, plan)
    plan = controlled(config, _scheduled(config, plan, lengths, base.tuned_lr), lengths)
    _check_evaluations(config, plan)
    return plan


def _lengths(config: RunConfig, first: Segment, train_samples: int | None) -> Lengths:
    """Return the lengths of the run, with its segments unless they depend on the LR's decay."""
    wanted = config.batch.schedule
    lengths = Lengths((first,), train_samples, config.task.units_per_sample)
    if wanted and not wanted.depends_on_duration:
        lengths = replace(lengths, segments=_segments(config, first, lengths))
    lengths = replace(lengths, run_samples=_duration(config, lengths))
    if wanted and not wanted.for_decay:  # repeated to check that the last stage starts within the run
        lengths = replace(lengths, segments=_segments(config, first, lengths))
    return lengths


def _unscheduled(config: RunConfig, world: int, sizes: Sizes, first: Segment, base: Base, lengths: Lengths) -> Plan:
    """Return the plan with only its first segment, and without a schedule."""
    recipe = base.recipe
    half_life = None if config.ema is None else lengths.samples("ema=", config.ema)
    if half_life:
        recipe = replace(recipe, ema=0.5 ** (base.batch / half_life))
    chosen = config.chosen.get("optimizer") or ("given" if "optimizer" in config.given else "the default")
    return Plan(
        segments=(first,),
        world=world,
        per_gpu=sizes.per_gpu,
        accumulation=sizes.accumulation,
        granule=config.batchnorm.ghost_size or 1,
        even=config.batch.even,
        seed=config.seed,
        samples=lengths.run_samples,
        train_samples=lengths.train_samples,
        unit=config.batch.unit,
        units_per_sample=config.task.units_per_sample,
        task=config.task.name,
        family=config.task.family,
        optimizer=Choice(config.optimizer.name, chosen),
        base=recipe,
        base_batch=base.batch,
        base_source=base.source,
        schedule=None,
        identity=identity(config),
        sync=config.batchnorm.mode == "sync",
        numerics=config.numerics,
        engine=placement(config.engine),
        measures=config.batch.per_gpu == "auto",
        intervals=intervals_of(config, replace(lengths, segments=(first,))),
    )


def _scheduled(config: RunConfig, plan: Plan, lengths: Lengths, tuned_lr: float | None) -> Plan:
    """Return ``plan`` with its segments and schedule, or without its length if the segments aren't known yet."""
    wanted, first = config.batch.schedule, plan.segments[0]
    segments, schedule = lengths.segments, schedule_of(config.lr, lengths, plan, tuned_lr)
    if wanted and wanted.for_decay:
        segments = _segments_for_decay(config, first, largest_for_decay(config, plan.train_samples), schedule)
        if segments and schedule:
            schedule = replace(schedule, held_until=segments[-1].start_sample)
    if segments is None:  # without segments, the steps aren't known either
        return replace(plan, samples=None)
    return replace(plan, segments=segments, schedule=schedule)


def _duration(config: RunConfig, lengths: Lengths) -> int | None:
    """Return the run's length in samples."""
    duration, moving = config.duration, config.batch.schedule
    if duration.unit == "%":
        raise UserError(f"duration={duration} is a share of itself", "use ep, st, sa or tok", "duration", duration)
    if duration.unit == "st" and moving and moving.depends_on_duration:
        problem = f"duration={duration} depends on the batch, but batch.schedule={moving} depends on the duration"
        raise UserError(problem, "give the duration in ep, sa or tok", "duration", duration)
    samples = lengths.samples("duration=", duration)
    if samples == 0:
        raise UserError(f"duration={duration} trains nothing", "give more than 0", "duration", duration)
    return samples


def _segments(config: RunConfig, first: Segment, lengths: Lengths) -> tuple[Segment, ...] | None:
    """Return the segments of a batch schedule that doesn't replace the decay, or None if they aren't known yet."""
    wanted, last = config.batch.schedule, asked(config, lengths.train_samples)
    assert wanted
    return segments_for(
        wanted,
        first,
        last=None if last is None else in_samples(config, "batch.global_size=", last),
        batch=partial(in_samples, config, f"batch.schedule={wanted}: "),
        in_samples=partial(lengths.samples, f"batch.schedule={wanted}: "),
        run_samples=lengths.run_samples,
    )


def _segments_for_decay(
    config: RunConfig, first: Segment, most: int | None, schedule: Schedule | None
) -> tuple[Segment, ...] | None:
    """Return the segments of a schedule that grows the batch, up to ``most``, instead of decaying the LR."""
    wanted = config.batch.schedule
    assert wanted
    return None if schedule is None or most is None else in_place_of_decay(wanted, first, most, schedule)


def _check_evaluations(config: RunConfig, plan: Plan) -> None:
    """Validate the evaluation keys against the plan.

    Raises:
        UserError: ``evaluate.per_gpu`` isn't a whole number of samples, or ``checkpoint.best`` is set but the run
            never evaluates.
    """
    evaluation_batch(config, plan)
    wanted, best, every = config.evaluate, config.checkpoint.best, plan.intervals.evaluate
    if not best or wanted.first or wanted.last:
        return
    never = f"checkpoint.best={best} needs an evaluation, but evaluate.last=false with evaluate.every="
    if wanted.every is None:
        problem = f"{never}null never evaluates"
        raise UserError(problem, "give evaluate.every=1ep, or leave one of the two keys out", "checkpoint.best", best)
    if every is None or plan.samples is None:
        return
    last = plan.stage_at(plan.samples - 1)
    start = plan.samples + (plan.added or 0) - last.cut.global_size
    if every > start:
        problem = (
            f"{never}{wanted.every} never evaluates: the run's last step starts at sample {start:,}, before the first "
            f"evaluation is due (sample {every:,})"
        )
        fix = "give a shorter evaluate.every, or leave evaluate.last=false out"
        raise UserError(problem, fix, "checkpoint.best", best)


def continued(fresh: Plan, stored: Plan, *, extends: bool) -> Plan:
    """Return the plan of a resumed run: ``stored``, with the hardware, engine and intervals of ``fresh``.

    Args:
        extends: take the longer duration and the schedule of ``fresh``, too.

    Raises:
        UserError: the batch can't be split on this hardware, or the extended run would have another global batch.
    """
    current = ("world", "per_gpu", "accumulation", "measures", "engine", "intervals")
    resumed = replace(stored, **{name: getattr(fresh, name) for name in current})
    if not extends:
        return resumed
    if fresh.cut.global_size != stored.cut.global_size:
        problem = (
            f"per-GPU batch × accumulation is {fresh.size(fresh.cut.global_size)} on {counted(fresh.world, 'rank')}, "
            f"but the run has {stored.size(stored.cut.global_size)} per step"
        )
        fix = "extend it on a number of ranks that gives the same batch; after that it resumes on any number"
        raise UserError(problem, fix, "batch.global_size", fresh.cut.global_size)
    if fresh.segments != stored.segments:
        problem = "a longer duration moves the stages of batch.schedule, including those already trained"
        fix = "start another run, or give the stages in sa, ep, st or tok from the start"
        raise UserError(problem, fix, "batch.schedule")
    return replace(resumed, samples=fresh.samples, schedule=fresh.schedule, identity=fresh.identity)
