"""The plan as a table of plain text: what people read before a run starts."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from scaling.advice import warnings

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


def _rows(plan: Plan) -> list[tuple[str, str]]:
    cut = plan.cut
    sizes = " + ".join(f"{count:,} × {size}" for size, count in cut.micro_batches)
    rows = [
        (
            "global batch",
            f"{_size(plan, cut.global_size)} = {cut.per_gpu} per GPU"
            f"{'' if cut.even and cut.micro_batches[0][0] == cut.per_gpu else ' at most'} × {cut.world:,} ranks × "
            f"{cut.accumulation} accumulation",
        ),
        ("micro-batches", sizes + (f" a step; {cut.idle:.1%} of the work idles" if cut.idle else " a step")),
        ("duration", _duration(plan)),
        ("optimizer", f"{plan.optimizer.name} ({plan.optimizer.why}){_recipe(plan)}"),
        ("learning rate", plan.lr_why),
        ("schedule", _schedule(plan)),
        ("seed", str(plan.seed)),
    ]
    for segment in plan.segments[1:]:
        rows.insert(2, ("", f"from sample {segment.start_sample:,}: {_size(plan, segment.global_size)}"))
    return rows


def _size(plan: Plan, samples: int) -> str:
    if plan.unit == "tokens" and plan.units_per_sample:
        return f"{samples * plan.units_per_sample:,} tokens ({samples:,} samples of {plan.units_per_sample:,})"
    return f"{samples:,} samples"


def _duration(plan: Plan) -> str:
    if plan.samples is None or plan.steps is None:
        return "unknown until the data is opened (plan.open_data=true opens it)"
    text = f"{plan.steps:,} steps = {_size(plan, plan.samples)}"
    if plan.epochs is not None:
        text += f" = {plan.epochs:g} epochs of {plan.train_samples:,}"
    return text + (f"; the last step is whole, which adds {plan.added:,} samples" if plan.added else "")


def _recipe(plan: Plan) -> str:
    recipe = plan.base
    names = ("momentum",) if len(recipe.betas) == 1 else ("β₁", "β₂")
    parts = [f"{name} {beta:g}" for name, beta in zip(names, recipe.betas, strict=False)]
    parts += [f"ε {recipe.eps:g}"] if recipe.eps is not None else []
    parts += [f"weight decay {recipe.weight_decay:g}"] if recipe.weight_decay is not None else []
    return ", " + ", ".join(parts) if parts else ""


def _schedule(plan: Plan) -> str:
    schedule = plan.schedule
    if schedule is None:
        return "unknown until the data is opened"
    warmup = "no warmup"
    if schedule.warmup_samples:
        share = schedule.warmup_samples / schedule.samples
        warmup = f"warmup from {schedule.warmup_from:.6g} over {schedule.warmup_samples:,} samples ({share:.1%})"
    ends = {
        "step": f"step: × {schedule.gamma:g} at {', '.join(f'{m:,}' for m in schedule.milestones)} samples",
        "constant": "constant",
        "wsd": f"stable, then linear to {schedule.final:g} × peak over the last {schedule.cooldown_samples:,} samples",
    }
    return f"{warmup}, then {ends.get(schedule.decay, f'{schedule.decay} decay to {schedule.final:g} × peak')}"
