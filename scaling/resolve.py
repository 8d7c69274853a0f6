"""From a config to its plan: units become samples, missing sizes are solved, the LR is derived."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from conf.identity import identity
from scaling.advice import check_family
from scaling.geometry import solve
from scaling.plan import Choice, Plan, Segment
from scaling.rules import Recipe, Rule, automatic
from scaling.schedule import Schedule
from scaling.units import Duration

if TYPE_CHECKING:
    from conf.schema import RunConfig


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
    samples = _samples(config, "duration", config.duration, segment.global_size, train_samples, None)
    if samples == 0:
        raise ValueError(f"duration={config.duration} is no training at all; it has to be more than 0")
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
        schedule=_schedule(config, segment, base, base_batch, tuned_lr, train_samples, samples),
        identity=identity(config),
    )


def _geometry(config: RunConfig, world: int, train_samples: int | None) -> tuple[Segment, int | None, int | None]:
    """The segment and what Plan solves its cuts from. All sizes leave here in samples."""
    batch, given = config.batch, config.given
    global_size: int | str | None = batch.global_size
    if batch.per_gpu and batch.accumulation and not {"batch.global_size"} & set(given):
        global_size = None
    if global_size == "all":
        if train_samples is None:
            raise ValueError(
                "batch.global_size=all needs the number of training samples: state it as task.train_samples=N"
                " (action=plan plan.open_data=true shows it)"
            )
        in_samples: int | None = train_samples
    else:
        in_samples = _in_samples(config, "batch.global_size", global_size)  # type: ignore[arg-type]
    per_gpu = _in_samples(config, "batch.per_gpu", batch.per_gpu)
    cut = solve(world, global_size=in_samples, per_gpu=per_gpu, accumulation=batch.accumulation, even=batch.even)
    rule = automatic(config.optimizer.family) if config.lr.rule == "auto" else Rule(config.lr.rule, config.lr.power)
    # per_gpu bounds every later segment, too; an accumulation that was given without it stays what it is.
    return Segment(0, cut.global_size, rule), per_gpu, cut.accumulation if per_gpu is None else None


def _in_samples(config: RunConfig, key: str, size: int | None) -> int | None:
    """``size`` in samples: ``batch.unit`` says what it was given in."""
    if size is None or config.batch.unit == "samples":
        return size
    tokens = config.task.units_per_sample
    if tokens is None:
        raise ValueError(
            f"batch.unit=tokens, but task {config.task.name} has no fixed units_per_sample; use batch.unit=samples"
        )
    if size % tokens:
        near = [whole * tokens for whole in (size // tokens, size // tokens + 1) if whole]
        raise ValueError(
            f"{key}={size} tokens isn't a whole number of samples of {tokens} tokens; nearest: "
            f"{' or '.join(map(str, near))}"
        )
    return size // tokens


def _base(config: RunConfig, segment: Segment) -> tuple[Recipe, int, str, float | None]:
    """The recipe the rules start from, its batch in samples, its source, and the base LR that warmup may start at.

    Strongest first: lr.base (command line or experiment), the task's ``tuned``, the optimizer's ``usual``.
    """
    optimizer, lr = config.optimizer, config.lr
    tuned, usual = config.task.tuned.get(optimizer.name), optimizer.usual
    stated = tuned or usual
    base = lr.base if lr.base is not None else stated.lr if stated else None
    batch = _in_samples(config, "lr.base_batch", lr.base_batch) or (stated.batch if stated else None)
    recipe = Recipe(lr=base or 0.0, betas=optimizer.memory, eps=optimizer.epsilon, weight_decay=optimizer.weight_decay)
    if lr.peak is not None:
        return replace(recipe, lr=lr.peak), segment.global_size, "peak", base
    if base is None or batch is None:
        missing = "lr.base" if base is None else "lr.base_batch"
        raise ValueError(
            f"no {missing} for optimizer={optimizer.name} with task {config.task.name}: give lr.base and lr.base_batch "
            "(the LR and the global batch it was tuned at), or lr.peak outright"
        )
    source = "given" if lr.base is not None or lr.base_batch is not None else "tuned" if tuned else "usual"
    return recipe, batch, source, base


def _schedule(
    config: RunConfig,
    segment: Segment,
    base: Recipe,
    base_batch: int,
    tuned_lr: float | None,
    train_samples: int | None,
    run_samples: int | None,
) -> Schedule | None:
    lr = config.lr

    def samples(key: str, duration: Duration) -> int | None:
        return _samples(config, key, duration, segment.global_size, train_samples, run_samples)

    warmup, cooldown = samples("lr.warmup", lr.warmup), samples("lr.cooldown", lr.cooldown)
    milestones = [samples("lr.milestones", milestone) for milestone in lr.milestones]
    if run_samples is None or warmup is None or cooldown is None or None in milestones:
        return None
    peak = segment.rule.apply(base, segment.global_size / base_batch).lr
    warmup_from = lr.warmup_from
    if warmup_from is None:
        warmup_from = tuned_lr if tuned_lr is not None and peak > tuned_lr else 0.0
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


def _samples(
    config: RunConfig,
    key: str,
    duration: Duration,
    global_size: int,
    train_samples: int | None,
    run_samples: int | None,
) -> int | None:
    if key == "duration" and duration.unit == "%":
        raise ValueError(f"duration={duration} is a share of itself; use ep, st, sa or tok")
    try:
        return duration.samples(
            global_size=global_size,
            train_samples=train_samples,
            units_per_sample=config.task.units_per_sample,
            run_samples=run_samples,
        )
    except ValueError as error:
        raise ValueError(f"{key}={error}") from None
