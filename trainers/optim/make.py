"""Make the optimizer of a config, and set each step's recipe on it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import SGD, Optimizer

from isobatch.conf.schema import RunConfig
from isobatch.scaling.errors import UserError
from isobatch.scaling.rules import Recipe
from isobatch.trainers.model.targets import build, locate
from isobatch.trainers.optim.groups import Groups, groups_for
from isobatch.trainers.optim.layerwise import Layerwise
from isobatch.trainers.tasks.task import Task
from isobatch.trainers.tensors.sharding import sharded


@dataclass(slots=True)
class Tuned:
    """An optimizer, with the learning rate factors and own weight decays of its groups.

    A group's own ``lr`` is a factor on the recipe's; its own ``weight_decay`` replaces the recipe's.
    """

    optimizer: Optimizer
    lr_factors: list[float]
    own_decay: list[bool]

    def tell(self, recipe: Recipe) -> None:
        """Set the hyperparameters of the next step."""
        for group, factor, own_decay in zip(self.optimizer.param_groups, self.lr_factors, self.own_decay, strict=True):
            group["lr"] = recipe.lr * factor
            if recipe.weight_decay is not None and not own_decay:
                group["weight_decay"] = recipe.weight_decay
            group |= _moments(recipe)


def make_optimizer(
    config: RunConfig,
    task: Task,
    model: nn.Module,
    recipe: Recipe,
    stored: Groups = (),
    tell: Callable[[str], None] = lambda text: None,
) -> Tuned:
    """Return the config's optimizer over the model's parameters; ``undecayed`` parameters have no weight decay.

    Args:
        recipe: the recipe of the first step; ``Tuned.tell`` replaces it step by step.
        stored: the groups of the checkpoint that the run resumes; empty if it starts from step 0.
        tell: called with a report if the stored groups differ from those of a new run and are kept.

    Raises:
        UserError: ``task.param_groups`` leaves trainable parameters out, or the optimizer rejects its arguments.
    """
    chosen = config.optimizer
    cls = None if chosen.name == "custom" else locate("optimizer", chosen.target)
    groups = groups_for(task, model, getattr(cls, "regroup", None), stored, tell)
    factors = [float(group.pop("lr", 1.0)) for group in groups]
    own_decay = ["weight_decay" in group for group in groups]
    try:
        optimizer = _construct(cls, chosen, groups, recipe)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        problem = f"optimizer={chosen.name} with optimizer.args={chosen.args}: {error}"
        raise UserError(problem, key="optimizer.args", value=chosen.args) from error
    return Tuned(optimizer, factors, own_decay)


def _construct(cls: Any, chosen: Any, groups: list[dict[str, Any]], recipe: Recipe) -> Optimizer:
    rates = {"lr": recipe.lr} | ({} if recipe.weight_decay is None else {"weight_decay": recipe.weight_decay})
    optimizer: Optimizer
    if cls is None:
        args = {**rates, **chosen.args}
        optimizer = build("optimizer", chosen.target, args, positional=(groups,), of=Optimizer)
        return optimizer
    own = chosen.model_dump(exclude={"name", "family", "usual", "args", "weight_decay"})
    args = {**rates, **own, **_moments(recipe), **chosen.args}
    if "fused" in inspect.signature(cls).parameters:
        return fused(cls, groups, args)
    optimizer = cls(groups, **args)
    if isinstance(optimizer, Layerwise):
        optimizer.agree()
    return optimizer


def fused(cls: type[Optimizer], groups: list[dict[str, Any]], args: dict[str, Any]) -> Optimizer:
    """Return an optimizer of torch's, with its fused kernel if it has one and `args` don't choose otherwise."""
    # torch 2.13's fused SGD fails on DTensors, and doesn't update 16-bit parameters on the CPU (pytorch #191763)
    parameters = [parameter for group in groups for parameter in group["params"]]
    unfused = cls is SGD and any(sharded(p) or (p.is_cpu and p.dtype.itemsize < 4) for p in parameters)
    if "fused" in args or "foreach" in args or unfused or any(p.is_complex() for p in parameters):
        return cls(groups, **args)
    try:
        return cls(groups, **args, fused=True)  # type: ignore[call-arg]
    except RuntimeError:  # this device has no fused kernel
        return cls(groups, **args)


def _moments(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe's momentum or betas and eps, under torch's names."""
    memory = {"momentum": recipe.betas[0]} if len(recipe.betas) == 1 else {"betas": recipe.betas}
    return (memory if recipe.betas else {}) | ({} if recipe.eps is None else {"eps": recipe.eps})
