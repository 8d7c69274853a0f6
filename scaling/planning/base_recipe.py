"""Find the tuned recipe of a run, the batch it was tuned at, and the rule that scales it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from isobatch.conf.recipe import Tuned
from isobatch.conf.schema import RunConfig
from isobatch.scaling.errors import UserError
from isobatch.scaling.plan import Source
from isobatch.scaling.planning.sizes import in_samples
from isobatch.scaling.rules import PARTS, Recipe, Rule, make_rule
from isobatch.scaling.schedule import Segment


@dataclass(frozen=True, slots=True)
class Base:
    """Hold the recipe that the rules start from.

    Attributes:
        batch: the global batch it was tuned at, in samples.
        tuned_lr: the LR at which a warmup may start.
    """

    recipe: Recipe
    batch: int
    source: Source
    tuned_lr: float | None


def rule_of(config: RunConfig) -> Rule:
    """Return ``lr.rule``; it keeps the parts of the recipe that the config gives for this batch."""
    lr, decay = config.lr, "optimizer.weight_decay"
    keys = {"betas": ("optimizer.betas", "optimizer.momentum"), "eps": ("optimizer.eps",), "weight_decay": (decay,)}
    fixed = tuple(part for part, names in keys.items() if set(names) & set(config.given))
    if lr.peak is not None:
        fixed += ("lr",)
        if lr.scale_weight_decay:
            problem = "lr.scale_weight_decay=true needs the tuned LR, which lr.peak replaces"
            raise UserError(problem, "leave out one of the two", "lr.scale_weight_decay", True)
    if lr.scale_weight_decay and (decay in config.given or config.optimizer.weight_decay is None):
        given = f"is given for this batch ({decay}={config.optimizer.weight_decay:g})"
        reason = given if decay in config.given else "is unknown"
        problem = f"lr.scale_weight_decay=true scales the weight decay from the tuned batch, but it {reason}"
        fix = f"leave out one of the two, or give the tuned one: task.tuned.{config.optimizer.name}.weight_decay"
        raise UserError(problem, fix, "lr.scale_weight_decay", True)
    return make_rule(
        lr.rule,
        config.optimizer.family,
        power=lr.power,
        noise_scale=lr.noise_scale,
        scale_weight_decay=lr.scale_weight_decay,
        fixed=fixed,
    )


def base_of(config: RunConfig, segment: Segment) -> Base:
    """Return the recipe that the rules start from.

    In order of precedence: lr.base (command line or experiment), the task's ``tuned``, and the optimizer's ``usual``.
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
        _check_tuned(config, tuned)
        parts = {name: getattr(tuned, name) for name in PARTS if name not in segment.rule.fixed}
        recipe = replace(recipe, **{name: value for name, value in parts.items() if value is not None})
    if lr.peak is not None:
        # The optimizer's usual LR isn't tuned for this run, so a warmup to lr.peak doesn't start at it.
        tuned_lr = lr.base or (tuned.lr if tuned else None)
        return Base(replace(recipe, lr=lr.peak), _batch_of_peak(lr.peak, batch, segment), "peak", tuned_lr)
    if base is None or batch is None:
        missing = "lr.base" if base is None else "lr.base_batch"
        problem = f"no {missing} for optimizer={optimizer.name} with task {config.task.name}"
        fix = "give lr.base and lr.base_batch (the LR and the global batch it was tuned at), or lr.peak"
        raise UserError(problem, fix, missing)
    if lr.base is not None:
        return Base(recipe, batch, "given" if lr.base_batch is not None else "paired", base)
    adapted = any(key.startswith(("model.", "data._target_", "data.args", "task.args")) for key in config.given)
    source: Source = "usual" if not tuned else "adapted" if adapted else "tuned"
    return Base(recipe, batch, "moved" if lr.base_batch is not None else source, base)


def _check_tuned(config: RunConfig, tuned: Tuned) -> None:
    """Raise UserError if the tuned recipe has betas or an ε that the optimizer doesn't have."""
    optimizer = config.optimizer
    key = f"task.tuned.{optimizer.name}"
    if tuned.betas is not None and len(tuned.betas) != len(optimizer.memory):
        problem = f"{key}.betas={list(tuned.betas)}"
        fix = f"{optimizer.name} has {len(optimizer.memory)}, such as {list(optimizer.memory)}"
        raise UserError(problem, fix, f"{key}.betas", tuned.betas)
    if tuned.eps is not None and optimizer.epsilon is None:
        problem = f"{key}.eps={tuned.eps:g}, but {optimizer.name} has no ε that a rule knows"
        raise UserError(problem, "leave it out", f"{key}.eps", tuned.eps)


def _batch_of_peak(peak: float, batch: int | None, segment: Segment) -> int:
    """Return the batch that the rule starts from with ``lr.peak``.

    A rule that scales more than the LR starts from the tuned ``batch``, any other from the segment's own batch.
    """
    law = segment.rule.law
    if not (law.moves or law.stretches_warmup):
        return segment.global_size
    if batch is None:
        problem = f"lr.rule={segment.rule.name} with lr.peak={peak:g} scales more than the LR, but from no known batch"
        fix = "give lr.base_batch, the tuned batch, or lr.rule=none"
        raise UserError(problem, fix, "lr.rule", segment.rule.name)
    return batch
