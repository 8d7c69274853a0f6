"""Print a plan as a plain-text table, and explain how its recipe follows from the tuned one."""

from __future__ import annotations

import math
import shutil
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

from isobatch.scaling.control import FEWEST, MOST_CHANGE, Control
from isobatch.scaling.geometry import Cut, counted
from isobatch.scaling.plan import EnginePlacement, Plan, Source, Stage
from isobatch.scaling.planning.advice import FEW, warnings
from isobatch.scaling.planning.capabilities import BITWISE_COST
from isobatch.scaling.rules import PARTS, Recipe
from isobatch.scaling.tuning.controllers import CONTROLLERS

WIDTHS = (60, 110)  # least and most columns of the table
LABEL = 15
MOST = 12  # most lines about stages
BITWISE = (
    "bitwise: identical weights on any number of processes of one machine type; a step took {:g} × as long as a fast "
    "one, up to {:g} × where it is mostly communication (benchmarks/results.md)"
)
BASE_SOURCES: dict[Source, str] = {
    "peak": "given as lr.peak",
    "given": "given (lr.base)",
    "paired": "given (lr.base), at the batch of the task's or the optimizer's base LR (lr.base_batch sets another)",
    "moved": "of the task or the optimizer, at the batch given as lr.base_batch",
    "tuned": "tuned for this task and optimizer",
    "adapted": "tuned for this task and optimizer, with another model, data or arguments",
    "usual": "a usual starting point of the optimizer, not tuned for this task",
}
TIMESCALE = "λ₀·κ·η₀/η; Bergsma et al. 2025"  # formula of lr.scale_weight_decay


def table(plan: Plan, full: bool = False, more: Iterable[tuple[str, str]] = ()) -> str:
    """Return the plan as lines of ``label  value``, followed by warnings, wrapped to the terminal.

    Args:
        full: add the seed, SGD's noise and the alternatives to an automatically chosen optimizer.
        more: labels and texts to add, such as the estimate of its memory.
    """
    width = min(max(shutil.get_terminal_size((WIDTHS[1], 0)).columns, WIDTHS[0]), WIDTHS[1])
    lines = [f"Isobatch plan · {plan.task} · {plan.identity}", "─" * width]
    rows = [*_rows(plan, full), *more, *(("  ! warning", warning) for warning in warnings(plan))]
    for label, text in rows:
        lines += textwrap.wrap(
            text,
            width,
            initial_indent=f"{label:<{LABEL}}",
            subsequent_indent=" " * LABEL,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join([*lines, "─" * width])


def row_of(plan: Plan) -> dict[str, Any]:
    """Return ``plan`` as a row of a table of plans."""
    return {
        "global batch": plan.cut.global_size,
        "per GPU": "auto" if plan.measures else plan.cut.per_gpu,
        "ranks": plan.cut.world,
        "accumulation": None if plan.measures else plan.cut.accumulation,
        "steps": plan.steps,
        "samples": plan.samples,
        "peak LR": plan.peak.lr,
        "identity": plan.identity,
    }


def _rows(plan: Plan, full: bool) -> Iterator[tuple[str, str]]:
    yield "global batch", _batch(plan, plan.cut)
    if not plan.cut.even and not plan.measures:
        yield "micro-batches", _micro_batches(plan)
    for number, stage in enumerate(_stages(plan)):
        yield "" if number else "then", stage
    if plan.control:
        yield "control", _control(plan.control)
        yield from (("", line) for line in _limits(plan, plan.control))
    yield "duration", _duration(plan)
    chosen, _, why = plan.optimizer.why.partition(": ")
    fixed, parts = plan.segments[0].rule.fixed, [(part, *one) for part in PARTS for one in named(plan.peak, part)]
    recipe = "".join(f", {name} {value:.6g}{' (given)' * (part in fixed)}" for part, name, value in parts)
    yield "optimizer", f"{plan.optimizer.name} ({chosen}){recipe}"
    if why:
        yield "", why if full else why.partition("; or ")[0]
    yield "learning rate", lr_why(plan)
    if moved := moves(plan):
        yield "recipe", "; ".join(moved)
    yield "schedule", _schedule(plan)
    if full and (noise := plan.temperature(plan.stages[0])) is not None:
        later = f", {plan.temperature(plan.stages[-1]):.6g} in the last stage" if len(plan.stages) > 1 else ""
        yield "SGD's noise", f"{noise:.6g} = ηN/(B(1−m)) at the peak{later} (Smith & Le 2018)"
    if (decay := plan.peak.ema) is not None:
        half_life = round(plan.cut.global_size * math.log(0.5) / math.log(decay)) if 0 < decay < 1 else 0
        yield "weights' EMA", f"half-life {plan.size(half_life)}: decay {decay:.6g} per step"
    if plan.granule > 1 or plan.sync:
        yield "BatchNorm", "over one pass of all ranks" if plan.sync else f"over ghosts of {plan.granule} samples"
    if plan.engine.name != "ddp":
        yield "engine", _engine(plan.engine, plan.world)
    if plan.numerics == "bitwise":
        yield "numerics", BITWISE.format(*BITWISE_COST)
    if full:
        yield "seed", str(plan.seed)


def _batch(plan: Plan, cut: Cut) -> str:
    largest = cut.micro_batches[0][0]
    most = f" (of at most {plan.sized(cut.per_gpu):,})" if cut.per_gpu > largest else ""
    dealt = f"{counted(cut.world, 'rank')} × accumulation {cut.accumulation}"
    of_samples = f" ({counted(cut.global_size, 'sample')})" if plan.unit == "tokens" else ""
    if plan.measures:
        on = f"on {counted(cut.world, 'rank')}; the per-GPU batch is measured at the start"
        return f"{plan.size(cut.global_size)}{of_samples} {on}"
    equals = "=" if cut.even else "≤"
    return f"{plan.size(cut.global_size)}{of_samples} {equals} {plan.sized(largest):,}{most} per GPU × {dealt}"


def _stages(plan: Plan) -> list[str]:
    """Return a line for each stage after the first, or for the first few and the last if there are many."""
    later = [_stage(plan, stage) for stage in plan.stages[1:]]
    if len(later) > MOST:
        later[MOST - 2 : -1] = [f"… {len(later) - MOST + 1:,} more stages, listed in plan.json and by output=json …"]
    return later


def _stage(plan: Plan, stage: Stage) -> str:
    parts = [part for part in PARTS if getattr(stage.peak, part) != getattr(plan.peak, part)]
    moved = "".join(f", {name} {value:.6g}" for part in parts for name, value in named(stage.peak, part))
    begins = f"from sample {stage.start:,}, step {stage.first_step + 1:,}"
    return f"{begins}: {_batch(plan, stage.cut)}, peak LR {stage.peak.lr:.6g}{moved}"


def _control(control: Control) -> str:
    """Return how a controller moves the batch."""
    follows = {"rule": "the LR follows lr.rule", "hold": "the LR is held", "adascale": "the LR gains as in AdaScale"}
    timed = "; timed here, so the run depends on the hardware" if control.by_clock else ""
    return f"{control.name}: {CONTROLLERS[control.name].summary}; {follows[control.lr]}{timed}"


def _limits(plan: Plan, control: Control) -> Iterator[str]:
    """Yield the bounds of a controller, the samples at which it decides, and what bounds its memory."""
    bounds = (
        f"{plan.sized(control.least):,} to {plan.size(control.most)}, in multiples of {plan.sized(control.quantum)}"
    )
    if plan.samples is not None and not plan.decisions:
        fewest, most = (plan.decide(1, size).steps for size in (control.most, control.least))
        bounds += f", so {fewest:,} to {counted(most or 0, 'step')}"
    yield bounds
    first = max(control.every, plan.cut.global_size) * (FEWEST + control.in_a_row - 1)
    decides = f"decided from sample {first:,} on, at most × {MOST_CHANGE:g} at a time"
    yield f"measured every {plan.size(control.every)}, {decides}"
    if control.prior:
        critical, within = plan.size(round(control.prior.critical)), 2**control.prior.doublings
        yield f"starts from a critical batch of {critical}, within a factor of {within:.3g}"
    if not plan.measures:
        more = ", and one more gradient in measured steps" if control.by_noise else ""
        yield f"memory: that of {plan.size(plan.cut.per_gpu)} per GPU at any batch{more}"


def _micro_batches(plan: Plan) -> str:
    parts = [f"{count:,} × {plan.size(size)}" if size else f"{count:,} empty" for size, count in plan.cut.micro_batches]
    return " and ".join(parts) + (f"; {plan.cut.idle:.1%} of the work idles" if plan.cut.idle else "")


def _duration(plan: Plan) -> str:
    if plan.samples is None or plan.steps is None:
        return "unknown until the data is opened (plan.open_data=true opens it)"
    stays = " if the batch stays" if plan.control and not plan.decisions else ""
    text = f"{counted(plan.steps, 'step')}{stays} = {plan.size(plan.samples)}"
    if plan.epochs is not None and plan.train_samples is not None:
        text += f" = {plan.epochs:g} {'epoch' if plan.epochs == 1 else 'epochs'} of {plan.sized(plan.train_samples):,}"
    return text + (f"; the last step is whole, which adds {plan.size(plan.added)}" if plan.added else "")


def _engine(engine: EnginePlacement, world: int) -> str:
    name = engine.name if engine.stage is None else f"{engine.name} (ZeRO {engine.stage})"
    if not engine.shards:
        return f"{name}: parameters, gradients and optimizer state whole on each rank"
    offloads = f"; {_list(engine.offloads)} in the host's memory" if engine.offloads else ""
    return f"{name}: {_list(engine.shards)} sharded over {counted(world, 'rank')}{offloads}"


def _list(names: tuple[str, ...]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if names[:-1] else names)


def _schedule(plan: Plan) -> str:
    schedule = plan.schedule
    if schedule is None:
        return "unknown until the data is opened"
    warmup, held = "no warmup", ""
    if schedule.held_until:
        held = f", then constant to sample {schedule.held_until:,}, the batch growing in place of the decay"
    if schedule.warmup_samples:
        share, steps = schedule.warmup_samples / schedule.samples, schedule.warmup_samples / plan.cut.global_size
        length = f"{100 * share:.3g}%" + (f", {steps:.2g} steps" if steps < FEW else "")
        warmup = f"warmup from {schedule.warmup_from:.6g} over {plan.size(schedule.warmup_samples)} ({length})"
    end = f"{schedule.lr(schedule.samples, plan.stages[-1].peak.lr):.6g}"
    milestones = [f"{milestone:,}" for milestone in schedule.milestones if milestone > schedule.held_until]
    falls = {
        "polynomial": f"polynomial decay (exponent {schedule.exponent:g}) to {end}",
        "step": f"× {schedule.gamma:g} after {', '.join(milestones)} samples" if milestones else "constant",
        "constant": "constant",
        "wsd": f"constant, and linear decay to {end} over the last {plan.size(schedule.cooldown_samples)}",
    }
    return f"{warmup}{held}, then {falls.get(schedule.decay, f'{schedule.decay} decay to {end}')}"


def lr_why(plan: Plan) -> str:
    """Return the derivation of the peak LR: ``peak 0.4 = 0.1 × 1024/256 (linear; Goyal et al. 2017); base LR: …``."""
    rule = plan.segments[0].rule
    if plan.base_source == "peak":
        scope = " for the first stage" if len(plan.segments) > 1 else ""
        return f"peak {plan.peak.lr:.6g} ({BASE_SOURCES['peak']}{scope})"
    after, before = plan.sized(plan.cut.global_size), plan.sized(plan.base_batch)
    noise = (rule.noise_scale or 0) * plan.sized(1)
    numbers = {"ratio": f"{after}/{before}", "after": after, "before": before, "noise": f"{noise:g}"}
    factor = rule.law.factor.format(**numbers, power=rule.power or 0)
    derived = f"peak {plan.peak.lr:.6g} = {plan.base.lr:.6g} × {factor} ({rule.name}; {rule.law.source})"
    return f"{derived}; base LR: {BASE_SOURCES[plan.base_source]}"


def moves(plan: Plan) -> list[str]:
    """Return what the first segment's rule changes besides the LR: ``β₁ 0.9 → 0.6 (1 − κ(1 − β))``.

    Parts that the config gives for this batch are listed as not scaled.
    """
    rule, lines = plan.segments[0].rule, []
    parts = rule.law.moves | ({"weight_decay": TIMESCALE} if rule.scale_weight_decay else {})
    for part, how in parts.items():
        pairs = zip(named(plan.base, part), named(plan.peak, part), strict=True)
        changed = ", ".join(f"{name} {was:.6g} → {now:.6g}" for (name, was), (_, now) in pairs if was != now)
        if part in rule.fixed:
            changed = " and ".join(name for name, _ in named(plan.peak, part)) + " given for this batch, so not scaled"
            how = f"lr.rule={rule.name} would scale it"
        lines += [f"{changed} ({how})"] if changed else []
    if rule.law.stretches_warmup and plan.cut.global_size != plan.base_batch:
        lines.append(f"warmup × {plan.cut.global_size / plan.base_batch:.6g} (as much as the batch)")
    return lines


def named(recipe: Recipe, part: str) -> list[tuple[str, float]]:
    """Return the values of a part of ``recipe`` with their usual names."""
    value = getattr(recipe, part)
    if part == "betas":
        return list(zip(("momentum",) if len(value) == 1 else ("β₁", "β₂"), value, strict=False))
    return [] if value is None else [({"eps": "ε", "weight_decay": "weight decay"}[part], value)]
