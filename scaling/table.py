"""The plan as a table of plain text: what people read before a run starts."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

from scaling.advice import warnings
from scaling.geometry import counted

if TYPE_CHECKING:
    from scaling.plan import Plan

WIDTH = 110
LABEL = 15


def table(plan: Plan) -> str:
    """Lines of ``label  value``, then the warnings."""
    lines = [f"Isobatch plan · {plan.task} · {plan.identity}", "─" * WIDTH]
    for label, text in _rows(plan):
        lines += _wrapped(label, text)
    for warning in warnings(plan):
        lines += _wrapped("  ! warning", warning)
    return "\n".join([*lines, "─" * WIDTH])


def _wrapped(label: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=f"{label:<{LABEL}}",
        subsequent_indent=" " * LABEL,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _rows(plan: Plan) -> Iterator[tuple[str, str]]:
    yield "global batch", _batch(plan)
    for segment in plan.segments[1:]:
        yield "", f"from sample {segment.start_sample:,}: {plan.size(segment.global_size)}"
    if not plan.cut.even:
        yield "micro-batches", _micro_batches(plan)
    yield "duration", _duration(plan)
    yield "optimizer", f"{plan.optimizer.name} ({plan.optimizer.why}){_recipe(plan)}"
    yield "learning rate", plan.lr_why
    yield "schedule", _schedule(plan)
    if plan.peak.ema is not None:
        yield "weights' EMA", _ema(plan)
    yield "seed", str(plan.seed)


def _batch(plan: Plan) -> str:
    cut = plan.cut
    largest = cut.micro_batches[0][0]
    most = f" (of at most {plan.sized(cut.per_gpu):,})" if cut.per_gpu > largest else ""
    dealt = f"{counted(cut.world, 'rank')} × accumulation {cut.accumulation}"
    of_samples = f" ({counted(cut.global_size, 'sample')})" if plan.unit == "tokens" else ""
    equals = "=" if cut.even else "≤"
    return f"{plan.size(cut.global_size)}{of_samples} {equals} {plan.sized(largest):,}{most} per GPU × {dealt}"


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


def _recipe(plan: Plan) -> str:
    recipe = plan.base
    names = ("momentum",) if len(recipe.betas) == 1 else ("β₁", "β₂")
    parts = [f"{name} {beta:g}" for name, beta in zip(names, recipe.betas, strict=False)]
    parts += [f"ε {recipe.eps:g}"] if recipe.eps is not None else []
    parts += [f"weight decay {recipe.weight_decay:g}"] if recipe.weight_decay is not None else []
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
    warmup = "no warmup"
    if schedule.warmup_samples:
        share = schedule.warmup_samples / schedule.samples
        warmup = (
            f"warmup from {schedule.warmup_from:.6g} over {plan.size(schedule.warmup_samples)} ({100 * share:.3g}%)"
        )
    end = f"{schedule.final * plan.peak.lr:.6g}"
    falls = {
        "polynomial": f"polynomial decay (exponent {schedule.exponent:g}) to {end}",
        "step": f"× {schedule.gamma:g} after {', '.join(f'{each:,}' for each in schedule.milestones)} samples",
        "constant": "constant",
        "wsd": f"constant, and linear decay to {end} over the last {plan.size(schedule.cooldown_samples)}",
    }
    return f"{warmup}, then {falls.get(schedule.decay, f'{schedule.decay} decay to {end}')}"
