"""Where the recipe of a run comes from: what was tuned, at which batch, and the rule that carries it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from isobatch.scaling.plan import Segment, Source
from isobatch.scaling.planning.sizes import in_samples
from isobatch.scaling.rules import PARTS, Recipe, Rule, make_rule

if TYPE_CHECKING:
    from isobatch.conf.schema import RunConfig


def rule_of(config: RunConfig) -> Rule:
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


def base_of(config: RunConfig, segment: Segment) -> tuple[Recipe, int, Source, float | None]:
    """The recipe the rules start from, its batch in samples, its source, and the base LR that warmup may start at.

    Strongest first: lr.base (command line or experiment), the task's ``tuned``, the optimizer's ``usual``.
    """
    optimizer, lr = config.optimizer, config.lr
    tuned = config.task.tuned.get(optimizer.name)
    stated = tuned or optimizer.usual
    base = lr.base or (stated.lr if stated else None)
    batch = stated.batch if stated else None
    if lr.base_batch is not None:
        batch = in_samples(config, "lr.base_batch=", lr.base_batch)
    recipe = Recipe(base or 0.0, optimizer.memory, optimizer.epsilon, optimizer.weight_decay)
    if tuned:
        if tuned.betas is not None and len(tuned.betas) != len(optimizer.memory):
            raise ValueError(
                f"task.tuned.{optimizer.name}.betas={list(tuned.betas)}: {optimizer.name} has {len(optimizer.memory)}, "
                f"as {list(optimizer.memory)}"
            )
        if tuned.eps is not None and optimizer.epsilon is None:
            raise ValueError(f"task.tuned.{optimizer.name}.eps={tuned.eps:g}: no rule knows an ε of {optimizer.name}")
        said = {name: getattr(tuned, name) for name in PARTS if name not in segment.rule.fixed}
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
