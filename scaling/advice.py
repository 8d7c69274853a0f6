"""What a plan warns of: advice, never enforced."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scaling.plan import Plan

# The usual global batch by the task's family, (least, most, unit): what people start from. Ranges of common practice.
USUAL = {
    "images": (32, 512, "samples"),
    "detection": (8, 32, "samples"),
    "rnn": (16, 128, "samples"),
    "finetune": (16, 64, "samples"),
    "speech": (64, 256, "samples"),
    "rl": (64, 256, "samples"),
    "volumes": (4, 16, "samples"),
    "language": (250_000, 4_000_000, "tokens"),
}

FAR = 4  # times outside the usual range
IDLE = 0.05  # share of the work
LARGE = 4  # times the batch of the tuning, from which on a missing warmup is worth a word


def check_family(family: str | None) -> None:
    """Raises ValueError for a family that isn't known."""
    if family is not None and family not in USUAL:
        raise ValueError(f"task.family={family}: known families are {', '.join(USUAL)}; null says nothing")


def warnings(plan: Plan) -> list[str]:
    """Everything about ``plan`` that people regretted later, a sentence each."""
    return [text for check in (_rule, _warmup, _base, _idle, _wraps, _family) if (text := check(plan))]


def _rule(plan: Plan) -> str | None:
    law, batch, base = plan.segments[0].rule.law, plan.cut.global_size, plan.base_batch
    if plan.base_source == "peak" or (batch <= law.kappa_tested * base and batch <= law.batch_tested):
        return None
    return (
        f"lr.rule={plan.segments[0].rule.name} is far above its tested range: the global batch {batch} is "
        f"{batch / base:.4g} × the {base} of the base LR (tested to {law.kappa_tested:g} × and {law.batch_tested:g} "
        f"samples: {law.beyond}); tune the LR at this batch and give it as lr.peak"
    )


def _warmup(plan: Plan) -> str | None:
    kappa = plan.cut.global_size / plan.base_batch
    if plan.schedule is None or plan.schedule.warmup_samples or max(kappa, plan.cut.global_size / 1024) < LARGE:
        return None
    return (
        f"no warmup at a large batch ({plan.cut.global_size}, {kappa:.4g} × that of the base LR): "
        "large batches lost 1 to 2 points of accuracy without one (Goyal et al. 2017); try lr.warmup=5%"
    )


def _base(plan: Plan) -> str | None:
    if plan.base_source != "usual":
        return None
    return (
        f"the base LR {plan.base.lr:g} at {plan.base_batch} is only a usual starting point for {plan.optimizer.name}, "
        f"nobody tuned it for {plan.task}; tune it and give lr.base and lr.base_batch"
    )


def _idle(plan: Plan) -> str | None:
    if plan.cut.idle < IDLE:
        return None
    even = plan.cut.world * plan.cut.accumulation * plan.cut.granule
    near = [size for size in (plan.cut.global_size // even * even, -(-plan.cut.global_size // even) * even) if size]
    return (
        f"{plan.cut.idle:.0%} of the work idles: {plan.cut.global_size} samples don't divide among {plan.world} ranks "
        f"× {plan.cut.accumulation}; even global batches nearby: {' or '.join(map(str, near))}"
    )


def _wraps(plan: Plan) -> str | None:
    if plan.train_samples is None or plan.cut.global_size <= plan.train_samples:
        return None
    return (
        f"the global batch {plan.cut.global_size} is larger than the data ({plan.train_samples} samples): "
        "one step sees samples more than once; batch.global_size=all is full-batch descent"
    )


def _family(plan: Plan) -> str | None:
    if plan.family is None:
        return None
    least, most, unit = USUAL[plan.family]
    size = plan.cut.global_size * ((plan.units_per_sample or 1) if unit == "tokens" else 1)
    if least / FAR <= size <= most * FAR:
        return None
    return (
        f"a global batch of {size} {unit} is far from what people use for {plan.family} ({least} to {most}); "
        "expect to re-tune"
    )
