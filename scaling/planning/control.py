"""Convert the config of a batch controller to samples, and check that the run can follow it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from isobatch.conf.controllers import Bandit, NoControl
from isobatch.conf.schema import RunConfig
from isobatch.scaling.batch_schedule import OF_THE_DATA
from isobatch.scaling.control import FEWEST, MOST_CHANGE, Control
from isobatch.scaling.errors import UserError
from isobatch.scaling.plan import Plan
from isobatch.scaling.planning.lengths import Lengths
from isobatch.scaling.planning.prior import first_belief
from isobatch.scaling.planning.sizes import in_samples, largest_for_decay, size_of_a_sample
from isobatch.scaling.rules import make_rule
from isobatch.scaling.units import Duration

MOST_INTERVALS = 2000  # of a bandit: a fit of them took 0.2 s
QUANTUM = 8  # samples: sizes that are multiples of it suit GPUs, and micro-batches of few sizes are compiled less often


def controlled(config: RunConfig, plan: Plan, lengths: Lengths) -> Plan:
    """Return ``plan`` with the controller of ``config``, or without its length if the bounds aren't known yet.

    Raises:
        UserError: another key contradicts the controller, or its bounds can't be met.
    """
    wanted = config.control
    if isinstance(wanted, NoControl):
        return plan
    _refuse_contradictions(config)
    every, most = lengths.samples("control.every=", wanted.every), _size(config, "most")
    limit = largest_for_decay(config, plan.train_samples) if config.batch.schedule else None
    if most is None and plan.train_samples is not None:
        tenth = min(plan.train_samples // OF_THE_DATA, limit or plan.train_samples)
        most = max(plan.cut.global_size, tenth // plan.granule * plan.granule)
    if every is None or most is None:
        return replace(plan, samples=None, schedule=None)
    prior = first_belief(config, wanted, plan.cut.global_size) if isinstance(wanted, Bandit) else None
    own = wanted.model_dump(exclude={"least", "most", "quantum", "every", "prior"})
    if own.get("half_speed"):
        own["half_speed"] /= size_of_a_sample(config)
    sizes = {
        "least": _size(config, "least") or plan.cut.global_size,
        "most": most,
        "quantum": _size(config, "quantum") or -(-QUANTUM // plan.granule) * plan.granule,
    }
    _refuse_bounds(plan, sizes, limit)
    control = Control(
        least=sizes["least"],
        most=sizes["most"],
        quantum=sizes["quantum"],
        every=every,
        power=make_rule("noise", config.optimizer.family, noise_scale=1.0).power,
        limit=limit,
        prior=prior,
        **own,
    )
    if control.by_clock and plan.numerics == "bitwise":
        problem = f"numerics=bitwise, but control={control.name} decides by the speed of the hardware"
        raise UserError(problem, "give control.half_speed (action=tune names it)", "control.half_speed")
    if control.by_noise:
        _refuse_other_measurements(config, wanted.every)
    _refuse_too_few(config, plan, control)
    _refuse_too_many(plan, control)
    plan = replace(plan, control=control)
    _refuse_unfit(plan, control)
    return plan


def _size(config: RunConfig, name: str) -> int | None:
    """Return one of the controller's sizes in samples; None if it isn't given."""
    size = getattr(config.control, name)
    return None if size is None else in_samples(config, f"control.{name}=", size)


def _refuse_contradictions(config: RunConfig) -> None:
    """Raise UserError if another key contradicts a controller."""
    name, batch = config.control.name, config.batch
    if batch.per_gpu is None:
        problem = f"control={name} moves the global batch, and without batch.per_gpu the micro-batch would grow with it"
        fix = "give batch.per_gpu, the most samples that fit in memory (action=tune measures it), or batch.per_gpu=auto"
        raise UserError(problem, fix, "batch.per_gpu")
    if batch.schedule and batch.schedule.kind != "doubling":
        problem = f"batch.schedule={batch.schedule} and control={name} both set the batch"
        fix = "leave out one of the two; only batch.schedule=doubling goes together with control"
        raise UserError(problem, fix, "batch.schedule", batch.schedule)
    if batch.even:
        problem = f"batch.even=true rejects sizes that give unequal micro-batches, and control={name} may choose them"
        fix = "leave batch.even out; multiples of batch.per_gpu × the number of GPUs are even, see control.quantum"
        raise UserError(problem, fix, "batch.even", True)
    if config.duration.unit == "st":
        problem = f"duration={config.duration} counts steps, whose number depends on the decisions of control={name}"
        raise UserError(problem, "give the duration in ep, sa or tok", "duration", config.duration)


def _refuse_other_measurements(config: RunConfig, every: Duration) -> None:
    """Raise UserError if the noise can't be measured from two halves of a step at the controller's interval."""
    name = config.control.name
    if config.noise.every is not None:
        problem = f"control={name} measures the gradient noise itself, at control.every={every}"
        raise UserError(
            problem, "leave noise.every out; control.every takes its place", "noise.every", config.noise.every
        )
    if config.batchnorm.mode == "sync":
        problem = (
            f"control={name} measures two halves of a step, of which batchnorm.mode=sync takes statistics, so "
            "measuring changes the run"
        )
        raise UserError(problem, "use batchnorm.mode=ghost", "batchnorm.mode", "sync")


def _refuse_too_few(config: RunConfig, plan: Plan, control: Control) -> None:
    """Raise UserError if the run ends before the controller's first decision takes effect."""
    needed = FEWEST + control.patience  # the last one passes until the decision takes effect
    apart = max(control.every, plan.cut.global_size)
    if plan.samples is None or plan.samples > needed * apart:
        return
    every = f"control.every={getattr(config.control, 'every', '')} is {plan.size(control.every)}"
    if apart > control.every:
        every = f"a step is {plan.size(apart)}"
    problem = f"{every}, so the run of {plan.size(plan.samples)} ends before the first decision takes effect"
    fix = f"give at most {max(1, (plan.samples - 1) // needed)}sa, or a longer duration"
    if apart > control.every:
        fix = f"give a longer duration, more than {needed * apart}sa, or a smaller batch.global_size"
    raise UserError(problem, fix, "control.every")


def _refuse_too_many(plan: Plan, control: Control) -> None:
    """Raise UserError if a bandit, which fits all intervals at each decision, has too many of them."""
    apart = max(control.every, control.least)
    if control.name == "bandit" and plan.samples is not None and plan.samples > MOST_INTERVALS * apart:
        problem = (
            f"control.every={control.every}sa makes {plan.samples // apart:,} intervals, which control=bandit fits"
        )
        fix = f"give at least {-(-plan.samples // MOST_INTERVALS)}sa, for at most {MOST_INTERVALS:,}"
        raise UserError(problem, fix, "control.every", control.every)


def _refuse_bounds(plan: Plan, sizes: Mapping[str, int], limit: int | None) -> None:
    """Raise UserError if the bounds contradict the first batch or a schedule, or sizes aren't whole granules.

    Args:
        limit: see ``Control``.
    """
    start, most = plan.cut.global_size, sizes["most"]
    for key, side, wrong in (("least", "most", sizes["least"] > start), ("most", "least", most < start)):
        if wrong:
            size, first = plan.sized(sizes[key]), plan.sized(start)
            problem = f"control.{key}={size}, but the run starts with a batch of {first}"
            raise UserError(problem, f"give at {side} {first}, or another batch.global_size", f"control.{key}", size)
    if sizes["least"] == most:
        problem = f"control.least and control.most are both {plan.sized(start)}, so the batch can't move"
        raise UserError(problem, f"give control.most={plan.sized(4 * start)}, for example", "control.most", start)
    if limit and most > limit:
        problem = (
            f"control.most={plan.sized(most)} is above {plan.sized(limit)}, up to which batch.schedule=doubling "
            "multiplies the batch"
        )
        fix = f'give a smaller one, or batch.schedule="doubling to:{plan.sized(2 * most)}"'
        raise UserError(problem, fix, "control.most", plan.sized(most))
    for key, size in sizes.items():
        if size % plan.granule:
            near = max(1, round(size / plan.granule)) * plan.granule
            whole = f"{plan.size(plan.granule)}, which have to stay in one micro-batch (batchnorm.ghost_size)"
            problem = f"control.{key}={plan.sized(size)} isn't a multiple of {whole}"
            raise UserError(problem, f"nearest: {plan.sized(near)}", f"control.{key}", plan.sized(size))


def _refuse_unfit(plan: Plan, control: Control) -> None:
    """Raise UserError if no batch is near, or the smallest or largest can't be dealt, has no recipe, or no halves."""
    for key in ("least", "most"):
        size = getattr(control, key)
        try:
            stages = plan.decide(1, size).stages
        except UserError as error:
            fix = error.fix.replace("use smaller stages", f"give a smaller control.{key}")
            raise UserError(f"control.{key}={plan.sized(size)}: {error.problem}", fix, f"control.{key}") from None
        if control.by_noise and not all(plan.halves(stage.cut) for stage in (plan.stages[0], *stages)):
            wanted = "batch.global_size" if size == plan.cut.global_size else f"control.{key}"
            problem = f"control={control.name} measures two halves of a step, and {plan.size(size)} can't be halved"
            fix = f"give {wanted}={plan.sized(2 * plan.granule)} or more"
            if plan.numerics == "bitwise":
                fix = "give a smaller batch.per_gpu"
            raise UserError(problem, fix, wanted, plan.sized(size))
    start = plan.cut.global_size
    if {control.allowed(start * MOST_CHANGE), control.allowed(start / MOST_CHANGE)} == {start}:
        problem = (
            f"control.quantum={plan.sized(control.quantum)} leaves no batch from half to twice the first one, "
            f"{plan.sized(start)}, which is how far a decision goes"
        )
        fix = f"give control.quantum={plan.sized(start)} or less"
        raise UserError(problem, fix, "control.quantum", plan.sized(control.quantum))
