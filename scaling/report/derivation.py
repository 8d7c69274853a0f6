"""How a plan's recipe follows from the tuned one, in words."""

from __future__ import annotations

from isobatch.scaling.plan import Plan, Source
from isobatch.scaling.rules import Recipe

BASE_SOURCES: dict[Source, str] = {
    "peak": "lr.peak, given outright",
    "given": "given (lr.base)",
    "paired": "given (lr.base), at the batch of the task's or the optimizer's own (lr.base_batch names another)",
    "moved": "of the task or the optimizer, at a batch given instead of its own (lr.base_batch)",
    "tuned": "tuned for this task and optimizer",
    "adapted": "tuned for this task and optimizer, with another model, data or arguments",
    "usual": "a usual starting point of the optimizer, not tuned for this task",
}
TIMESCALE = "λ₀·κ·η₀/η; Bergsma et al. 2025"  # how lr.scale_weight_decay moves the weight decay


def lr_why(plan: Plan) -> str:
    """Derive the peak LR: ``peak 0.4 = 0.1 × 1024/256 (linear; Goyal et al. 2017); base LR: …``."""
    rule = plan.segments[0].rule
    if plan.base_source == "peak":
        of = " for the first stage" if len(plan.segments) > 1 else ""
        return f"peak {plan.peak.lr:.6g} ({BASE_SOURCES['peak']}{of})"
    after, before = plan.sized(plan.cut.global_size), plan.sized(plan.base_batch)
    noise = (rule.noise_scale or 0) * plan.sized(1)
    numbers = {"ratio": f"{after}/{before}", "after": after, "before": before, "noise": f"{noise:g}"}
    factor = rule.law.factor.format(**numbers, power=rule.power or 0)
    derived = f"peak {plan.peak.lr:.6g} = {plan.base.lr:.6g} × {factor} ({rule.name}; {rule.law.source})"
    return f"{derived}; base LR: {BASE_SOURCES[plan.base_source]}"


def moves(plan: Plan) -> list[str]:
    """Name what the first segment's rule moves beside the LR: ``β₁ 0.9 → 0.6 (1 − κ(1 − β))``.

    Parts that were given for this batch, and so stay, are named, too.
    """
    rule, said = plan.segments[0].rule, []
    parts = rule.law.moves | ({"weight_decay": TIMESCALE} if rule.scale_weight_decay else {})
    for part, how in parts.items():
        pairs = zip(named(plan.base, part), named(plan.peak, part), strict=True)
        changed = ", ".join(f"{name} {was:.6g} → {now:.6g}" for (name, was), (_, now) in pairs if was != now)
        if part in rule.fixed:
            changed = " and ".join(name for name, _ in named(plan.peak, part)) + " given for this batch, so not moved"
            how = f"lr.rule={rule.name} would"
        said += [f"{changed} ({how})"] if changed else []
    if rule.law.stretches_warmup and plan.cut.global_size != plan.base_batch:
        said.append(f"warmup × {plan.cut.global_size / plan.base_batch:.6g} (as much as the batch)")
    return said


def named(recipe: Recipe, part: str) -> list[tuple[str, float]]:
    """Return the numbers of a part of ``recipe``, by the names that people know them by."""
    value = getattr(recipe, part)
    if part == "betas":
        return list(zip(("momentum",) if len(value) == 1 else ("β₁", "β₂"), value, strict=False))
    return [] if value is None else [({"eps": "ε", "weight_decay": "weight decay"}[part], value)]
