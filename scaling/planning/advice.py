"""Warn about common problems of a plan; nothing is enforced."""

from __future__ import annotations

import math
from itertools import pairwise

from isobatch.scaling.families import FAMILIES
from isobatch.scaling.geometry import counted, nearest_even
from isobatch.scaling.plan import Plan
from isobatch.scaling.rules import Rule
from isobatch.scaling.schedule import Segment

FAR = 4  # a batch this many times outside the usual range is warned about
IDLE = 0.05  # share of the work that may idle without a warning
FEW = 5  # steps of the shortest warmup without a warning
SHORT = 0.5  # a beta below this, after scaling by a rule, is warned about
SIMPLER = 1.5  # stages of a suggested schedule differ by this factor at least
SCALED, LARGE = 4, 4096  # × the tuned batch, or samples: a missing warmup is warned about from either on


def warnings(plan: Plan) -> list[str]:
    """Return the warnings about ``plan``, a sentence each; each is about the worst stage."""
    return [
        text
        for check in (_rule, _memory, _warmup, _jump, untuned_base, _idle, _wraps, _family, _sync, _linear_control)
        if (text := check(plan))
    ]


def lr_jump(before: Plan, after: Plan, sample: int) -> str | None:
    """Return a message if a longer duration changes the LR of a run that has reached ``sample``, else None."""
    old, new = before.schedule, after.schedule
    if old is None or new is None or old == new:
        return None
    was, now = (schedule.lr(sample, after.stage_at(sample).peak.lr) for schedule in (old, new))
    return (
        f"the run and its schedule are extended from {before.size(old.samples)} to {after.size(new.samples)}: "
        f"at sample {sample:,} the learning rate changes from {was:.4g} to {now:.4g}; a run planned at this "
        "length from the start would have used different learning rates so far"
    )


def _rule(plan: Plan) -> str | None:
    claims = [segment for segment in _reachable(plan) if segment.rule.law.beyond]
    if plan.base_source == "peak" or not claims:
        return None
    largest = max(claims, key=lambda segment: segment.global_size)
    batch, base, law = largest.global_size, plan.base_batch, largest.rule.law
    if batch <= law.kappa_tested * base and batch <= law.batch_tested:
        return None
    kappa = f"{law.kappa_tested:g} × and " if law.kappa_tested < math.inf else ""
    return (
        f"lr.rule={largest.rule.name} is far above its tested range: the global batch of {plan.size(batch)} is "
        f"{batch / base:,.6g} × that of the base LR (tested to {kappa}{law.batch_tested:g} samples: {law.beyond}); "
        "tune the LR at this batch and give it as lr.peak"
    )


def _reachable(plan: Plan) -> list[Segment]:
    """Return the segments of the plan, with the largest that its controller may choose."""
    if plan.control is None:
        return list(plan.segments)
    rule = plan.segments[0].rule if plan.control.lr == "rule" else Rule("none")
    return [*plan.segments, Segment(plan.control.every, plan.control.most, rule)]


def _warmup(plan: Plan) -> str | None:
    batch = plan.cut.global_size
    kappa = batch / plan.base_batch
    if plan.schedule is None or (kappa < SCALED and batch < LARGE):
        return None
    steps = plan.schedule.warmup_samples / batch
    if steps >= FEW:
        return None
    scaled = f", {kappa:,.6g} × that of the base LR" if kappa >= SCALED else ""
    longer = min(30, max(5, math.ceil(100 * FEW * batch / plan.schedule.samples)))
    warmup = f"a warmup of {steps:.2g} steps" if steps else "no warmup"
    return (
        f"{warmup} at a large batch ({plan.size(batch)}{scaled}): large batches lost 1 to 2 points of accuracy "
        f"without warmup (Goyal et al. 2017); try lr.warmup={longer}%"
    )


def _jump(plan: Plan) -> str | None:
    rises = [(after.peak.lr / before.peak.lr, after) for before, after in pairwise(plan.stages)]
    times, stage = max(rises, default=(0, plan.stages[0]), key=lambda rise: rise[0])
    if times < SCALED:
        return None
    return (
        f"the learning rate becomes {times:.3g} × as large in one step, at sample {stage.start:,}, where the batch "
        "grows: a run has one warmup, at its start; use more stages (curriculum, ramp), lr.rule=sqrt, or lr:hold"
    )


def _memory(plan: Plan) -> str | None:
    pairs = [zip(plan.base.betas, stage.peak.betas, strict=True) for stage in plan.stages]
    short = [beta for pair in pairs for was, beta in pair if beta < SHORT <= was]
    if not short:
        return None
    return (
        f"lr.rule={plan.segments[0].rule.name} gives a beta of {min(short):.3g}, which has hardly any memory and is at "
        "the end of the rule's range; compare with lr.rule=sqrt"
    )


def untuned_base(plan: Plan) -> str | None:
    """Return that the base LR is no more than a usual starting point; None if it was given or tuned."""
    if plan.base_source != "usual":
        return None
    return (
        f"the base LR {plan.base.lr:g} at a batch of {plan.size(plan.base_batch)} is only a usual starting point for "
        f"{plan.optimizer.name}, not tuned for {plan.task}; tune it and give lr.base and lr.base_batch"
    )


def _idle(plan: Plan) -> str | None:
    cut = max((stage.cut for stage in plan.stages), key=lambda cut: cut.idle)
    if cut.idle < IDLE or plan.measures:
        return None
    near = nearest_even(cut, plan.per_gpu, cut.accumulation)
    return (
        f"{cut.idle:.0%} of the work idles: {counted(cut.world, 'rank')} × accumulation {cut.accumulation} can't share "
        f"{plan.size(cut.global_size)} evenly; nearest global batches that are even: "
        f"{' or '.join(str(plan.sized(size)) for size in near)}"
    )


def _wraps(plan: Plan) -> str | None:
    largest = max(segment.global_size for segment in _reachable(plan))
    if plan.train_samples is None or largest <= plan.train_samples:
        return None
    return (
        f"the global batch of {plan.size(largest)} is larger than the data "
        f"({plan.size(plan.train_samples)}): one step sees samples more than once; batch.global_size=all is "
        "full-batch descent"
    )


def _family(plan: Plan) -> str | None:
    if plan.family is None:
        return None
    (least, most), unit = FAMILIES[plan.family].usual, FAMILIES[plan.family].unit
    per_sample = 1 if unit == "sample" else plan.units_per_sample
    known = plan.base_source == "tuned"  # batches near a tuned one are fine
    sizes = [
        segment.global_size * (per_sample or 1)
        for segment in _reachable(plan)
        if not (known and plan.base_batch / FAR <= segment.global_size <= plan.base_batch * FAR)
    ]
    if not sizes:
        return None
    far = [size for size in (max(sizes), min(sizes)) if not least / FAR <= size <= most * FAR]
    if per_sample is None or not far:
        return None
    return (
        f"a global batch of {counted(far[0], unit)} is far from the usual range for "
        f"{plan.family} ({least:,} to {most:,}); expect to re-tune"
    )


def _linear_control(plan: Plan) -> str | None:
    if plan.control is None or plan.control.lr != "rule" or plan.segments[0].rule.name != "linear":
        return None
    return (
        f"control={plan.control.name} with lr.rule=linear: where the loss stalls, noise dominates, the batch grows at "
        "once, and the LR with it, which can diverge; lr.rule=sqrt grows it less"
    )


def after_control(plan: Plan) -> str | None:
    """Return whether a schedule or a fixed batch would have done what the controller did; None if neither would.

    A course that only grew, with the LR by the rule or held, is that of ``batch.schedule`` with the same stages.
    """
    control, sizes = plan.control, [stage.cut.global_size for stage in plan.stages]
    if control is None or plan.samples is None or control.lr == "adascale" or len(plan.segments) > 1:
        return None
    if len(sizes) == 1:
        return (
            f"control={control.name} kept the batch at {plan.size(sizes[0])}: the same batch without control does the "
            "same, and measures nothing"
        )
    if sizes != sorted(sizes):
        return None
    kept = [plan.stages[0]]
    for stage in plan.stages[1:]:
        if stage is plan.stages[-1] or stage.cut.global_size >= SIMPLER * kept[-1].cut.global_size:
            kept.append(stage)
    exact = "the same" if len(kept) == len(sizes) else "nearly the same"
    words = [f"{stage.start}sa:{plan.sized(stage.cut.global_size)}" for stage in kept]
    hold = ["lr:hold"] if control.lr == "hold" else []
    text = " ".join(words + hold)
    return (
        f"control={control.name} only let the batch grow, which a schedule can do as well: "
        f'batch.schedule="{text}" is {exact} course without measurements'
    )


def _sync(plan: Plan) -> str | None:
    accumulation = max(stage.cut.accumulation for stage in plan.stages)
    if not plan.sync or accumulation == 1:
        return None
    return (
        f"batchnorm.mode=sync computes its statistics over one pass of all ranks, only a part of the global batch at "
        f"accumulation {accumulation}, so the run depends on it; batchnorm.mode=ghost doesn't"
    )
