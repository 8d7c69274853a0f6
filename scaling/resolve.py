"""From a config to its plan: units become samples, missing sizes are solved, the LR is derived."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from conf.identity import global_size_rules, identity
from scaling.advice import check_family
from scaling.geometry import counted, solve
from scaling.plan import Choice, Plan, Segment, Source
from scaling.rules import Recipe, Rule, automatic
from scaling.schedule import Schedule

if TYPE_CHECKING:
    from conf.schema import LearningRate, RunConfig
    from scaling.units import Duration


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
    segment, per_gpu, accumulation = _geometry(config, world, train_samples)
    base, base_batch, source, tuned_lr = _base(config, segment)
    if config.duration.unit == "%":
        raise ValueError(f"duration={config.duration} is a share of itself; use ep, st, sa or tok")
    in_samples = partial(
        _samples,
        global_size=segment.global_size,
        train_samples=train_samples,
        units_per_sample=config.task.units_per_sample,
    )
    samples = in_samples("duration", config.duration)
    if samples == 0:
        raise ValueError(f"duration={config.duration} is no training at all; it has to be more than 0")
    in_samples = partial(in_samples, run_samples=samples)
    for key, every in (
        ("log.every", config.log.every),
        ("evaluate.every", config.evaluate.every),
        ("checkpoint.every", config.checkpoint.every),
    ):
        if every is not None and every.unit != "min":
            in_samples(key, every)  # training uses them, but what they can't be is said before a worker starts
    half_life = None if config.ema is None else in_samples("ema", config.ema)
    if half_life:
        base = replace(base, ema=0.5 ** (base_batch / half_life))
    peak = segment.rule.apply(base, segment.global_size / base_batch).lr
    return Plan(
        segments=(segment,),
        world=world,
        per_gpu=per_gpu,
        accumulation=accumulation,
        granule=1,
        even=config.batch.even,
        seed=config.seed,
        samples=samples,
        train_samples=train_samples,
        unit=config.batch.unit,
        units_per_sample=config.task.units_per_sample,
        task=config.task.name,
        family=config.task.family,
        optimizer=Choice(config.optimizer.name, "given" if "optimizer" in config.given else "the default"),
        base=base,
        base_batch=base_batch,
        base_source=source,
        schedule=_schedule(config.lr, in_samples, samples, peak, tuned_lr),
        identity=identity(config),
    )


def continued(fresh: Plan, stored: Plan, *, extends: bool) -> Plan:
    """The run of ``stored`` on the hardware that ``fresh``, the same config's plan of today, is for.

    Args:
        extends: ``fresh`` has a longer duration, which holds, with its schedule.

    Raises:
        ValueError: it can't be dealt there, or is extended by another global batch.
    """
    there = replace(stored, world=fresh.world, per_gpu=fresh.per_gpu, accumulation=fresh.accumulation)
    if not extends:
        return there
    if fresh.cut.global_size != stored.cut.global_size:
        raise ValueError(
            f"per-GPU batch × accumulation are {fresh.size(fresh.cut.global_size)} on {counted(fresh.world, 'rank')}, "
            f"and the run has {stored.size(stored.cut.global_size)} a step: extend it on a number of ranks that gives "
            "these; after that it goes on with any"
        )
    return replace(there, samples=fresh.samples, schedule=fresh.schedule, identity=fresh.identity)


def _geometry(config: RunConfig, world: int, train_samples: int | None) -> tuple[Segment, int | None, int | None]:
    """The segment and what Plan solves its cuts from. All sizes leave here in samples."""
    batch, per_sample = config.batch, _size_of_a_sample(config)
    global_size = batch.global_size if global_size_rules(config) else None
    if global_size == "all":
        if train_samples is None:
            raise ValueError(
                "batch.global_size=all needs the number of training samples: state it as task.train_samples=N"
                " (plan.open_data=true opens the data)"
            )
        global_size = train_samples * per_sample
    # Solved in the unit that was asked in, so that a refusal's numbers are, too; what can't be parted is then a sample.
    cut = solve(
        world,
        global_size=_whole(config, "batch.global_size", global_size),
        per_gpu=_whole(config, "batch.per_gpu", batch.per_gpu),
        accumulation=batch.accumulation,
        granule=per_sample,
        even=batch.even,
    )
    rule = automatic(config.optimizer.family) if config.lr.rule == "auto" else Rule(config.lr.rule, config.lr.power)
    segment = Segment(0, cut.global_size // per_sample, rule)
    # per_gpu bounds every later segment, too; an accumulation that was given without it stays what it is.
    return (segment, None, cut.accumulation) if batch.per_gpu is None else (segment, batch.per_gpu // per_sample, None)


def _size_of_a_sample(config: RunConfig) -> int:
    """What one sample counts in a size: ``batch.unit`` says what sizes are given in."""
    if config.batch.unit == "samples":
        return 1
    if config.task.units_per_sample is None:
        raise ValueError(
            f"batch.unit=tokens, but task {config.task.name} has no fixed number of tokens per sample: state it as "
            "task.units_per_sample=N, or use batch.unit=samples"
        )
    return config.task.units_per_sample


def _whole(config: RunConfig, key: str, size: int | None) -> int | None:
    """``size``, which has to be a whole number of samples."""
    per_sample = _size_of_a_sample(config)
    if size is not None and size % per_sample:
        near = [whole * per_sample for whole in (size // per_sample, size // per_sample + 1) if whole]
        raise ValueError(
            f"{key}={size} tokens isn't a whole number of samples of {per_sample} tokens; nearest: "
            f"{' or '.join(map(str, near))}"
        )
    return size


def _base(config: RunConfig, segment: Segment) -> tuple[Recipe, int, Source, float | None]:
    """The recipe the rules start from, its batch in samples, its source, and the base LR that warmup may start at.

    Strongest first: lr.base (command line or experiment), the task's ``tuned``, the optimizer's ``usual``.
    """
    optimizer, lr = config.optimizer, config.lr
    tuned = config.task.tuned.get(optimizer.name)
    stated = tuned or optimizer.usual
    base = lr.base or (stated.lr if stated else None)
    given_batch = _whole(config, "lr.base_batch", lr.base_batch)
    batch = given_batch // _size_of_a_sample(config) if given_batch else stated.batch if stated else None
    recipe = Recipe(lr=base or 0.0, betas=optimizer.memory, eps=optimizer.epsilon, weight_decay=optimizer.weight_decay)
    if lr.peak is not None:
        # Nobody chose the optimizer's usual LR for this run: a warmup to a given peak doesn't start there.
        return replace(recipe, lr=lr.peak), segment.global_size, "peak", lr.base or (tuned.lr if tuned else None)
    if base is None or batch is None:
        missing = "lr.base" if base is None else "lr.base_batch"
        raise ValueError(
            f"no {missing} for optimizer={optimizer.name} with task {config.task.name}: give lr.base and lr.base_batch "
            "(the LR and the global batch it was tuned at), or lr.peak outright"
        )
    if lr.base is not None:
        return recipe, batch, "given" if lr.base_batch is not None else "paired", base
    return recipe, batch, "moved" if lr.base_batch is not None else "tuned" if tuned else "usual", base


def _schedule(
    lr: LearningRate,
    in_samples: Callable[[str, Duration], int | None],
    run_samples: int | None,
    peak: float,
    tuned_lr: float | None,
) -> Schedule | None:
    warmup = in_samples("lr.warmup", lr.warmup)
    # What another decay would use isn't looked at: it may not fit this run, or not be known yet.
    cooldown = in_samples("lr.cooldown", lr.cooldown) if lr.decay == "wsd" else 0
    milestones = [in_samples("lr.milestones", each) for each in lr.milestones] if lr.decay == "step" else []
    if run_samples is None or warmup is None or cooldown is None or None in milestones:
        return None
    warmup_from = lr.warmup_from
    if warmup_from is None:
        warmup_from = tuned_lr if tuned_lr is not None and peak > tuned_lr else 0.0
    elif warmup and warmup_from > peak:
        raise ValueError(
            f"lr.warmup_from={warmup_from:g} is above the peak LR, to which the warmup climbs: use at most {peak}"
        )
    return Schedule(
        samples=run_samples,
        warmup_samples=warmup,
        warmup_from=warmup_from,
        decay=lr.decay,
        final=lr.final,
        exponent=lr.exponent,
        milestones=tuple(milestones),  # type: ignore[arg-type]
        gamma=lr.gamma,
        cooldown_samples=cooldown,
    )


def _samples(key: str, duration: Duration, **lengths: Any) -> int | None:
    """``duration`` in samples, see Duration.samples; a refusal names the key."""
    try:
        return duration.samples(**lengths)
    except ValueError as error:
        raise ValueError(f"{key}={error}") from None
