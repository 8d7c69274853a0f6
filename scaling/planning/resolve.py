"""From a config to its plan: units become samples, missing sizes are solved, the LR is derived."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from isobatch.conf.identity import identity
from isobatch.scaling.batch_schedule import OF_THE_DATA, in_place_of_decay, lay
from isobatch.scaling.geometry import counted
from isobatch.scaling.plan import Choice, Plan, Segment
from isobatch.scaling.planning.advice import check_family
from isobatch.scaling.planning.base_recipe import base_of, rule_of
from isobatch.scaling.planning.capabilities import check_engine, held
from isobatch.scaling.planning.engine_config import check_engine_config
from isobatch.scaling.planning.evaluations import check_evaluations
from isobatch.scaling.planning.lengths import Lengths, schedule_of
from isobatch.scaling.planning.sizes import asked, first_size, in_samples
from isobatch.scaling.schedule import Schedule

if TYPE_CHECKING:
    from isobatch.conf.schema import RunConfig


def resolve(config: RunConfig, world: int, train_samples: int | None = None) -> Plan:
    """The plan of ``config`` on ``world`` ranks.

    Args:
        train_samples: length of the opened training data; None: what the task's YAML states, if it does.

    Raises:
        ValueError: what was asked can't be met; the message names the nearest plans that can, or the key that would do.
    """
    train_samples = config.task.train_samples if train_samples is None else train_samples
    if train_samples == 0:
        raise ValueError("the training data has 0 samples; a run needs at least 1")
    check_family(config.task.family)
    check_engine(config)
    wanted = config.batch.schedule
    size, per_gpu, accumulation = first_size(config, world, train_samples)
    first = Segment(0, size, rule_of(config))
    base, base_batch, source, tuned_lr = base_of(config, first)
    lengths = Lengths((first,), train_samples, config.task.units_per_sample)
    if wanted and not wanted.of_the_run:
        lengths = replace(lengths, segments=_laid(config, first, lengths))
    samples = _duration(config, lengths)
    lengths = replace(lengths, run_samples=samples)
    if wanted and not wanted.for_decay:
        lengths = replace(lengths, segments=_laid(config, first, lengths))
    for key, every in (
        ("log.every=", config.log.every),
        ("evaluate.every=", config.evaluate.every),
        ("checkpoint.every=", config.checkpoint.every),
        ("noise.every=", config.noise.every),
    ):
        if every is not None and every.unit != "min":
            lengths.samples(key, every)  # training uses them, but what they can't be is said before a worker starts
    half_life = None if config.ema is None else lengths.samples("ema=", config.ema)
    if half_life:
        base = replace(base, ema=0.5 ** (base_batch / half_life))
    automatic = config.chosen.get("optimizer")
    plan = Plan(
        segments=(first,),
        world=world,
        per_gpu=per_gpu,
        accumulation=accumulation,
        granule=config.batchnorm.ghost_size or 1,
        even=config.batch.even,
        seed=config.seed,
        samples=samples,
        train_samples=train_samples,
        unit=config.batch.unit,
        units_per_sample=config.task.units_per_sample,
        task=config.task.name,
        family=config.task.family,
        optimizer=Choice(
            config.optimizer.name, automatic or ("given" if "optimizer" in config.given else "the default")
        ),
        base=base,
        base_batch=base_batch,
        base_source=source,
        schedule=None,
        identity=identity(config),
        sync=config.batchnorm.mode == "sync",
        numerics=config.numerics,
        engine=held(config.engine),
    )
    check_engine_config(config, plan)
    segments, schedule = lengths.segments, schedule_of(config.lr, lengths, plan, tuned_lr)
    if wanted and wanted.for_decay:
        segments = _grown(config, first, train_samples, schedule)
        if segments and schedule:
            schedule = replace(schedule, held_until=segments[-1].start_sample)
    # not before the data is opened; until then nothing is said of the steps
    known = {"samples": None} if segments is None else {"segments": segments, "schedule": schedule}
    plan = replace(plan, **known)
    check_evaluations(config, plan, lengths)
    return plan


def _duration(config: RunConfig, lengths: Lengths) -> int | None:
    """The run's length in samples."""
    duration, moving = config.duration, config.batch.schedule
    if duration.unit == "%":
        raise ValueError(f"duration={duration} is a share of itself; use ep, st, sa or tok")
    if duration.unit == "st" and moving and moving.of_the_run:
        raise ValueError(
            f"duration={duration} depends on the batch, which batch.schedule={moving} lays over the duration: give the "
            "duration in ep, sa or tok"
        )
    samples = lengths.samples("duration=", duration)
    if samples == 0:
        raise ValueError(f"duration={duration} is no training at all; it has to be more than 0")
    return samples


def _laid(config: RunConfig, first: Segment, lengths: Lengths) -> tuple[Segment, ...] | None:
    """The segments of a batch schedule that says itself when the batch moves; None: not known yet."""
    wanted, last = config.batch.schedule, asked(config, lengths.train_samples)
    assert wanted
    return lay(
        wanted,
        first,
        last=None if last is None else in_samples(config, "batch.global_size=", last),
        batch=partial(in_samples, config, f"batch.schedule={wanted}: "),
        in_samples=partial(lengths.samples, f"batch.schedule={wanted}: "),
        run_samples=lengths.run_samples,
    )


def _grown(
    config: RunConfig, first: Segment, train_samples: int | None, schedule: Schedule | None
) -> tuple[Segment, ...] | None:
    """Those of one whose larger batches stand in for the decay of the LR, up to a tenth of the data if to no size."""
    wanted = config.batch.schedule
    assert wanted
    most = None if train_samples is None else train_samples // OF_THE_DATA
    if wanted.last is not None:
        most = in_samples(config, f"batch.schedule={wanted}: ", wanted.last)
    return None if schedule is None or most is None else in_place_of_decay(wanted, first, most, schedule)


def continued(fresh: Plan, stored: Plan, *, extends: bool) -> Plan:
    """The run of ``stored`` on the hardware and with the engine of ``fresh``, the same config's plan of today.

    Args:
        extends: ``fresh`` has a longer duration, which holds, with its schedule.

    Raises:
        ValueError: it can't be dealt there, or is extended by another global batch.
    """
    hardware = {name: getattr(fresh, name) for name in ("world", "per_gpu", "accumulation", "engine")}
    there = replace(stored, **hardware)
    if not extends:
        return there
    if fresh.cut.global_size != stored.cut.global_size:
        raise ValueError(
            f"per-GPU batch × accumulation are {fresh.size(fresh.cut.global_size)} on {counted(fresh.world, 'rank')}, "
            f"and the run has {stored.size(stored.cut.global_size)} a step: extend it on a number of ranks that gives "
            "these; after that it goes on with any"
        )
    if fresh.segments != stored.segments:
        raise ValueError(
            "a longer duration moves the stages of batch.schedule, and so changes what was trained already: start "
            "another run, or give the stages in sa, ep, st or tok from the start"
        )
    return replace(there, samples=fresh.samples, schedule=fresh.schedule, identity=fresh.identity)
