"""The plan as a table of plain text: what people read before a run starts."""

from __future__ import annotations

import math
import shutil
import textwrap
from collections.abc import Iterator

from isobatch.scaling.geometry import Cut, counted
from isobatch.scaling.plan import EnginePlacement, Plan, Stage
from isobatch.scaling.planning.advice import FEW, warnings
from isobatch.scaling.planning.capabilities import BITWISE_COST
from isobatch.scaling.report.derivation import lr_why, moves, named
from isobatch.scaling.rules import PARTS

WIDTHS = (60, 110)  # least and most columns of the table
LABEL = 15
MOST = 12  # lines about stages


def table(plan: Plan, full: bool = False) -> str:
    """Return lines of ``label  value``, then the warnings, as wide as the terminal.

    Args:
        full: add what only some readers need: the seed, SGD's noise, the alternatives to a chosen optimizer.
    """
    width = min(max(shutil.get_terminal_size((WIDTHS[1], 0)).columns, WIDTHS[0]), WIDTHS[1])
    lines = [f"Isobatch plan · {plan.task} · {plan.identity}", "─" * width]
    rows = [*_rows(plan, full), *(("  ! warning", warning) for warning in warnings(plan))]
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


def _rows(plan: Plan, full: bool) -> Iterator[tuple[str, str]]:
    yield "global batch", _batch(plan, plan.cut)
    if not plan.cut.even:
        yield "micro-batches", _micro_batches(plan)
    for number, stage in enumerate(_stages(plan)):
        yield "" if number else "then", stage
    yield "duration", _duration(plan)
    chosen, _, why = plan.optimizer.why.partition(": ")
    yield "optimizer", f"{plan.optimizer.name} ({chosen}){_recipe(plan)}"
    if why:
        yield "", why if full else why.partition("; or ")[0]
    yield "learning rate", lr_why(plan)
    if moved := moves(plan):
        yield "recipe", "; ".join(moved)
    yield "schedule", _schedule(plan)
    if full and (noise := plan.temperature(plan.stages[0])) is not None:
        later = f", {plan.temperature(plan.stages[-1]):.6g} in the last stage" if len(plan.stages) > 1 else ""
        yield "SGD's noise", f"{noise:.6g} = ηN/(B(1−m)) at the peak{later} (Smith & Le 2018)"
    if plan.peak.ema is not None:
        yield "weights' EMA", _ema(plan)
    if plan.granule > 1 or plan.sync:
        yield "BatchNorm", "over one pass of all ranks" if plan.sync else f"over ghosts of {plan.granule} samples"
    if plan.engine.name != "ddp":
        yield "engine", _engine(plan.engine, plan.world)
    if plan.numerics == "bitwise":
        yield "numerics", _bitwise()
    if full:
        yield "seed", str(plan.seed)


def _batch(plan: Plan, cut: Cut) -> str:
    largest = cut.micro_batches[0][0]
    most = f" (of at most {plan.sized(cut.per_gpu):,})" if cut.per_gpu > largest else ""
    dealt = f"{counted(cut.world, 'rank')} × accumulation {cut.accumulation}"
    of_samples = f" ({counted(cut.global_size, 'sample')})" if plan.unit == "tokens" else ""
    equals = "=" if cut.even else "≤"
    return f"{plan.size(cut.global_size)}{of_samples} {equals} {plan.sized(largest):,}{most} per GPU × {dealt}"


def _stages(plan: Plan) -> list[str]:
    """Return the stages after the first; of many, the first ones and the last."""
    later = [_stage(plan, stage) for stage in plan.stages[1:]]
    if len(later) > MOST:
        later[MOST - 2 : -1] = [f"… {len(later) - MOST + 1:,} stages between, which plan.json and output=json list …"]
    return later


def _stage(plan: Plan, stage: Stage) -> str:
    moved = "".join(
        f", {name} {value:.6g}"
        for part in PARTS
        if getattr(stage.peak, part) != getattr(plan.peak, part)
        for name, value in named(stage.peak, part)
    )
    return (
        f"from sample {stage.start:,}, step {stage.first_step + 1:,}: {_batch(plan, stage.cut)}, "
        f"peak LR {stage.peak.lr:.6g}{moved}"
    )


def _micro_batches(plan: Plan) -> str:
    parts = [f"{count:,} × {plan.size(size)}" if size else f"{count:,} empty" for size, count in plan.cut.micro_batches]
    return " and ".join(parts) + (f"; {plan.cut.idle:.1%} of the work idles" if plan.cut.idle else "")


def _duration(plan: Plan) -> str:
    if plan.samples is None or plan.steps is None:
        return "unknown until the data is opened (plan.open_data=true opens it)"
    text = f"{counted(plan.steps, 'step')} = {plan.size(plan.samples)}"
    if plan.epochs is not None and plan.train_samples is not None:
        text += f" = {plan.epochs:g} {'epoch' if plan.epochs == 1 else 'epochs'} of {plan.sized(plan.train_samples):,}"
    return text + (f"; the last step is whole, which adds {plan.size(plan.added)}" if plan.added else "")


def _engine(engine: EnginePlacement, world: int) -> str:
    name = engine.name if engine.stage is None else f"{engine.name} (ZeRO {engine.stage})"
    if not engine.shards:
        return f"{name}: parameters, gradients and optimizer state whole on each rank"
    offloads = f"; {_list(engine.offloads)} in the host's memory" if engine.offloads else ""
    return f"{name}: {_list(engine.shards)} in {counted(world, 'part')}, one a rank{offloads}"


def _list(names: tuple[str, ...]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if names[:-1] else names)


def _bitwise() -> str:
    usual, most = BITWISE_COST
    return (
        "bitwise: the same weights, bit by bit, on any number of processes of one machine type; a step took "
        f"{usual:g} × as long as a fast one, up to {most:g} × where it is mostly messages (benchmarks/README.md)"
    )


def _recipe(plan: Plan) -> str:
    fixed = plan.segments[0].rule.fixed
    parts = [
        f"{name} {value:.6g}{' (given)' * (part in fixed)}" for part in PARTS for name, value in named(plan.peak, part)
    ]
    return "".join(f", {part}" for part in parts)


def _ema(plan: Plan) -> str:
    decay = plan.peak.ema
    assert decay is not None
    half_life = round(plan.cut.global_size * math.log(0.5) / math.log(decay)) if 0 < decay < 1 else 0
    return f"half-life {plan.size(half_life)}: decay {decay:.6g} a step"


def _schedule(plan: Plan) -> str:
    schedule = plan.schedule
    if schedule is None:
        return "unknown until the data is opened"
    warmup, held = "no warmup", ""
    if schedule.held_until:
        held = f", then constant to sample {schedule.held_until:,}, the batch growing in place of the decay"
    if schedule.warmup_samples:
        share, steps = schedule.warmup_samples / schedule.samples, schedule.warmup_samples / plan.cut.global_size
        warmup = (
            f"warmup from {schedule.warmup_from:.6g} over {plan.size(schedule.warmup_samples)} ({100 * share:.3g}%"
            f"{f', {steps:.2g} steps' if steps < FEW else ''})"
        )
    end = f"{schedule.lr(schedule.samples, plan.stages[-1].peak.lr):.6g}"
    milestones = [f"{milestone:,}" for milestone in schedule.milestones if milestone > schedule.held_until]
    falls = {
        "polynomial": f"polynomial decay (exponent {schedule.exponent:g}) to {end}",
        "step": f"× {schedule.gamma:g} after {', '.join(milestones)} samples" if milestones else "constant",
        "constant": "constant",
        "wsd": f"constant, and linear decay to {end} over the last {plan.size(schedule.cooldown_samples)}",
    }
    return f"{warmup}{held}, then {falls.get(schedule.decay, f'{schedule.decay} decay to {end}')}"
