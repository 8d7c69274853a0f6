"""From a config to its plan: units become samples, missing sizes are solved, the LR is derived."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from conf.identity import global_size_rules, identity
from scaling.advice import check_family
from scaling.geometry import counted, solve
from scaling.plan import Choice, Plan, Segment, Source
from scaling.rules import Recipe, Rule, make_rule
from scaling.schedule import Schedule
from scaling.stages import Laid, growth_of, lay, most_of, samples_after, sizes_up_to

if TYPE_CHECKING:
    from conf.schema import LearningRate, RunConfig
    from scaling.units import Duration


@dataclass(frozen=True, slots=True)
class Lengths:
    """Durations of one run in samples.

    Attributes:
        segments: whose steps a duration in steps counts; None where they aren't known yet.
    """

    segments: tuple[Segment, ...] | None
    train_samples: int | None
    units_per_sample: int | None
    run_samples: int | None = None

    def samples(self, key: str, duration: Duration) -> int | None:
        """See Duration.samples; a refusal names the key."""
        if self.segments is None and duration.unit == "st":
            return None
        if self.segments and len(self.segments) > 1 and duration.unit == "st":
            steps, stages = math.ceil(duration.value), [(one.start_sample, one.global_size) for one in self.segments]
            return samples_after(steps, stages)
        try:
            return duration.samples(
                global_size=self.segments[0].global_size if self.segments else 1,
                train_samples=self.train_samples,
                units_per_sample=self.units_per_sample,
                run_samples=self.run_samples,
            )
        except ValueError as error:
            raise ValueError(f"{key}{'' if key.endswith(' ') else '='}{error}") from None


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
    wanted = config.batch.schedule
    first, per_gpu, accumulation = _geometry(config, world, train_samples)
    base, base_batch, source, tuned_lr = _base(config, first)
    lengths = Lengths((first,), train_samples, config.task.units_per_sample)
    if wanted and not wanted.of_the_run:
        lengths = replace(lengths, segments=_laid(config, first, lengths).segments)
    samples = _duration(config, lengths)
    lengths = replace(lengths, run_samples=samples)
    if wanted and wanted.of_the_run and not wanted.for_decay:
        lengths = replace(lengths, segments=_laid(config, first, lengths).segments)
    for key, every in (
        ("log.every", config.log.every),
        ("evaluate.every", config.evaluate.every),
        ("checkpoint.every", config.checkpoint.every),
        ("noise.every", config.noise.every),
    ):
        if every is not None and every.unit != "min":
            lengths.samples(key, every)  # training uses them, but what they can't be is said before a worker starts
    half_life = None if config.ema is None else lengths.samples("ema", config.ema)
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
    )
    schedule = _schedule(config.lr, lengths, plan, tuned_lr)
    laid = _laid(config, first, lengths, schedule) if wanted else Laid((first,), schedule)
    return replace(plan, segments=laid.segments or (first,), schedule=laid.schedule)


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
    samples = lengths.samples("duration", duration)
    if samples == 0:
        raise ValueError(f"duration={duration} is no training at all; it has to be more than 0")
    return samples


def _laid(config: RunConfig, first: Segment, lengths: Lengths, schedule: Schedule | None = None) -> Laid:
    wanted = config.batch.schedule
    assert wanted
    return lay(
        wanted,
        first,
        last=_whole(config, "batch.global_size", _asked(config, lengths.train_samples)),
        per_sample=_size_of_a_sample(config),
        in_samples=partial(lengths.samples, f"batch.schedule={wanted}: "),
        run_samples=lengths.run_samples,
        train_samples=lengths.train_samples,
        schedule=schedule,
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
    if fresh.segments != stored.segments:
        raise ValueError(
            "a longer duration moves the stages of batch.schedule, and so changes what was trained already: start "
            "another run, or give the stages in sa, ep, st or tok from the start"
        )
    return replace(there, samples=fresh.samples, schedule=fresh.schedule, identity=fresh.identity)


def _geometry(config: RunConfig, world: int, train_samples: int | None) -> tuple[Segment, int | None, int | None]:
    """The first segment and what Plan solves its cuts from. All sizes leave here in samples."""
    batch, per_sample = config.batch, _size_of_a_sample(config)
    global_size = _asked(config, train_samples)
    if batch.schedule and (start := batch.schedule.start):
        unused = batch.schedule.kind != "ramp" or batch.schedule.last is not None
        if unused and "batch.global_size" in config.given and global_size != start:
            raise ValueError(
                f"batch.global_size={global_size} and batch.schedule={batch.schedule}, which begins with {start} and "
                "says itself what follows, contradict each other: leave batch.global_size out"
            )
        global_size = start
    # Solved in the unit that was asked in, so that a refusal's numbers are, too; what can't be parted is then a sample.
    key = f"batch.schedule={batch.schedule}: a first size of " if batch.schedule else "batch.global_size"
    cut = solve(
        world,
        global_size=_whole(config, key, global_size),
        per_gpu=_whole(config, "batch.per_gpu", batch.per_gpu),
        accumulation=batch.accumulation,
        granule=per_sample * (config.batchnorm.ghost_size or 1),
        even=batch.even,
    )
    first = Segment(0, cut.global_size // per_sample, _rule(config))
    # per_gpu bounds every later segment, too; an accumulation that was given without it stays what it is.
    return (first, None, cut.accumulation) if batch.per_gpu is None else (first, batch.per_gpu // per_sample, None)


def largest_batch(config: RunConfig, world: int) -> int:
    """The largest global batch of the run, in samples. Raises ValueError where it can't be, or isn't known yet."""
    first, _, _ = _geometry(config, world, config.task.train_samples)
    moving, per_sample = config.batch.schedule, _size_of_a_sample(config)
    if not moving:
        return first.global_size
    if moving.for_decay:
        most = most_of(moving, lambda size: size // per_sample, config.task.train_samples)
        return max(
            [first.global_size, *sizes_up_to(first.global_size, growth_of(config.lr.decay, config.lr.gamma), most)]
        )
    top = _asked(config, config.task.train_samples) if moving.kind == "ramp" and moving.last is None else moving.last
    return max(first.global_size, *(size // per_sample for size in (top or 0, *(size for _, size in moving.stages))))


def _asked(config: RunConfig, train_samples: int | None) -> int | None:
    """The global batch that is asked for, in ``batch.unit``; None where it follows from the others."""
    if not global_size_rules(config):
        return None
    if config.batch.global_size != "all":
        return config.batch.global_size
    if train_samples is None:
        raise ValueError(
            "batch.global_size=all needs the number of training samples: state it as task.train_samples=N"
            " (plan.open_data=true opens the data)"
        )
    return train_samples * _size_of_a_sample(config)


def _rule(config: RunConfig) -> Rule:
    """``lr.rule``, and what of the recipe it leaves alone, as it was given for this batch."""
    lr, decay = config.lr, "optimizer.weight_decay"
    keys = {"betas": ("optimizer.betas", "optimizer.momentum"), "eps": ("optimizer.eps",), "weight_decay": (decay,)}
    fixed = tuple(part for part, names in keys.items() if set(names) & set(config.given))
    if lr.peak is not None:
        fixed += ("lr",)
        if lr.scale_weight_decay:
            raise ValueError(
                "lr.scale_weight_decay=true goes by the LR of the tuning, which lr.peak takes the place of"
            )
    if lr.scale_weight_decay and (decay in config.given or config.optimizer.weight_decay is None):
        what = (
            f"given for this batch ({decay}={config.optimizer.weight_decay:g})" if decay in config.given else "unknown"
        )
        raise ValueError(
            f"lr.scale_weight_decay=true moves the weight decay from the batch of the tuning to this one, and it is "
            f"{what}: leave out one of the two, or state the tuned one: task.tuned.{config.optimizer.name}.weight_decay"
        )
    return make_rule(
        lr.rule,
        config.optimizer.family,
        power=lr.power,
        noise_scale=lr.noise_scale,
        scale_weight_decay=lr.scale_weight_decay,
        fixed=fixed,
    )


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
            f"{key}{'' if key.endswith(' ') else '='}{size} tokens isn't a whole number of samples of {per_sample} "
            "tokens; nearest: "
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
    recipe = Recipe(base or 0.0, optimizer.memory, optimizer.epsilon, optimizer.weight_decay)
    if tuned:
        if tuned.betas is not None and len(tuned.betas) != len(optimizer.memory):
            raise ValueError(
                f"task.tuned.{optimizer.name}.betas={list(tuned.betas)}: {optimizer.name} has {len(optimizer.memory)}, "
                f"as {list(optimizer.memory)}"
            )
        if tuned.eps is not None and optimizer.epsilon is None:
            raise ValueError(f"task.tuned.{optimizer.name}.eps={tuned.eps:g}: no rule knows an ε of {optimizer.name}")
        said = {
            name: getattr(tuned, name) for name in ("betas", "eps", "weight_decay") if name not in segment.rule.fixed
        }
        recipe = replace(recipe, **{name: value for name, value in said.items() if value is not None})
    if lr.peak is not None:
        law = segment.rule.law
        if (law.moves or law.stretches_warmup) and batch is None:
            raise ValueError(
                f"lr.rule={segment.rule.name} moves more than the LR, which lr.peak={lr.peak:g} gives, and doesn't "
                "know from which batch: give lr.base_batch, that of the tuning, or lr.rule=none"
            )
        tuned_at = batch if batch and (law.moves or law.stretches_warmup) else segment.global_size
        # Nobody chose the optimizer's usual LR for this run: a warmup to a given peak doesn't start there.
        return replace(recipe, lr=lr.peak), tuned_at, "peak", lr.base or (tuned.lr if tuned else None)
    if base is None or batch is None:
        missing = "lr.base" if base is None else "lr.base_batch"
        raise ValueError(
            f"no {missing} for optimizer={optimizer.name} with task {config.task.name}: give lr.base and lr.base_batch "
            "(the LR and the global batch it was tuned at), or lr.peak outright"
        )
    if lr.base is not None:
        return recipe, batch, "given" if lr.base_batch is not None else "paired", base
    of_another = any(key.startswith(("model.", "data._target_", "data.args", "task.args")) for key in config.given)
    there: Source = "usual" if not tuned else "adapted" if of_another else "tuned"
    return recipe, batch, "moved" if lr.base_batch is not None else there, base


def _schedule(lr: LearningRate, lengths: Lengths, plan: Plan, tuned_lr: float | None) -> Schedule | None:
    """The LR over samples, or None where the run's length isn't known yet."""
    warmup = lengths.samples("lr.warmup", lr.warmup)
    # What another decay would use isn't looked at: it may not fit this run, or not be known yet.
    cooldown = lengths.samples("lr.cooldown", lr.cooldown) if lr.decay == "wsd" else 0
    milestones = [lengths.samples("lr.milestones", each) for each in lr.milestones] if lr.decay == "step" else []
    if lengths.run_samples is None or warmup is None or cooldown is None or None in milestones:
        return None
    peak, warmup_from = plan.peak.lr, lr.warmup_from
    if warmup_from is None:
        warmup_from = tuned_lr if tuned_lr is not None and peak > tuned_lr else 0.0
    elif warmup and warmup_from > peak:
        raise ValueError(
            f"lr.warmup_from={warmup_from:g} is above the peak LR, to which the warmup climbs: use at most {peak}"
        )
    return Schedule(
        samples=lengths.run_samples,
        warmup_samples=_warmup(warmup, lengths.run_samples, plan),
        warmup_from=warmup_from,
        decay=lr.decay,
        final=lr.final,
        exponent=lr.exponent,
        milestones=tuple(milestones),  # type: ignore[arg-type]
        gamma=lr.gamma,
        cooldown_samples=cooldown,
    )


def _warmup(samples: int, run_samples: int, plan: Plan) -> int:
    """The warmup in samples, as the rule carries it from the batch of the tuning."""
    rule, batch = plan.segments[0].rule, plan.cut.global_size
    carried = rule.warmup(samples, plan.base_batch, batch)
    if carried > samples and carried > run_samples:
        largest = plan.base_batch * run_samples // samples
        raise ValueError(
            f"lr.rule={rule.name} makes the warmup as many times longer as the batch is larger, {carried:,} samples at "
            f"{plan.size(batch)}, and the run has {run_samples:,}; the largest batch at which it fits is "
            f"{plan.size(largest)}: use that, a longer duration, or a shorter lr.warmup"
        )
    return carried
