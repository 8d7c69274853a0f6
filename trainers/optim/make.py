"""Optimizers, built from the config and told the step's recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from isobatch.scaling.errors import UserError
from isobatch.trainers.model.targets import build, locate
from isobatch.trainers.optim.decay import undecayed
from isobatch.trainers.optim.groups import Groups, as_stored, moved, same
from isobatch.trainers.tensors.sharding import sharded

if TYPE_CHECKING:
    from isobatch.conf.schema import RunConfig
    from isobatch.scaling.rules import Recipe
    from isobatch.trainers.tasks.task import Task

# Imported where they are chosen.
CLASSES = {
    "sgd": "torch.optim.SGD",
    "adamw": "torch.optim.AdamW",
    "lamb": "isobatch.trainers.optim.lamb.LAMB",
    "lars": "isobatch.trainers.optim.lars.LARS",
    "adafactor": "torch.optim.Adafactor",
    "muon": "isobatch.trainers.optim.muon.MuonAdamW",
}
LAYERWISE = ("lamb", "lars")


@dataclass(slots=True)
class Tuned:
    """An optimizer and what each of its groups makes of a recipe.

    A group's own ``lr`` is a factor of the recipe's, its own ``weight_decay`` replaces the recipe's.
    """

    optimizer: Optimizer
    lr_factors: list[float]
    own_decay: list[bool]

    def tell(self, recipe: Recipe) -> None:
        """Set the hyperparameters of the coming step."""
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
    """The optimizer of the config over the model's parameters; no weight decay where ``undecayed`` says so.

    Args:
        recipe: what it is constructed with; ``tell`` replaces it step by step.
        stored: the groups of the checkpoint that the run resumes; none where it starts from step 0.
        tell: told where these aren't the groups of a new run, and are kept.

    Raises:
        UserError: ``task.param_groups`` leaves trainable parameters out, or the optimizer refuses its arguments.
    """
    chosen = config.optimizer
    groups = _resumed(chosen.name, task, model, stored, tell)
    factors = [float(group.pop("lr", 1.0)) for group in groups]
    own_decay = ["weight_decay" in group for group in groups]
    try:
        optimizer = _construct(chosen, groups, recipe)
    except (TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"optimizer={chosen.name} with optimizer.args={chosen.args}: {error}") from error
    return Tuned(optimizer, factors, own_decay)


def _resumed(
    optimizer: str, task: Task, model: nn.Module, stored: Groups, tell: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The groups of a new run, or where they are others those of the checkpoint, if they fit task and model."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    groups = _parted(optimizer, _groups(task, model), model)
    if same(stored, groups, names):
        return groups
    kept = as_stored(groups, stored, names)
    if hasattr(task, "param_groups"):  # these are the task's, except for what Muon takes of them
        matrices = {parameter for group in kept if group.get("muon") for parameter in group["params"]}
        kept = _parted(optimizer, _groups(task, model), model, matrices)
    if not same(stored, kept, names):
        return groups
    tell(
        "the optimizer keeps the checkpoint's groups, also for what a new run would decay, or give to Muon, otherwise: "
        f"{moved(groups, kept, names)}"
    )
    return kept


def _parted(
    optimizer: str, groups: list[dict[str, Any]], model: nn.Module, matrices: set[Tensor] | None = None
) -> list[dict[str, Any]]:
    """The groups with what some optimizers want to know of each.

    Args:
        matrices: those that Muon takes; None: as it chooses.
    """
    if optimizer == "muon":
        from isobatch.trainers.optim.muon import inner_matrices, parted

        return parted(groups, inner_matrices(model) if matrices is None else matrices)
    if optimizer in LAYERWISE:
        return [{"trust": group.get("weight_decay") != 0, **group} for group in groups]
    return groups


def _construct(chosen: Any, groups: list[dict[str, Any]], recipe: Recipe) -> Optimizer:
    told = {"lr": recipe.lr} | ({} if recipe.weight_decay is None else {"weight_decay": recipe.weight_decay})
    if chosen.name == "custom":
        args = {**told, **chosen.args}
        return cast(Optimizer, build("optimizer", chosen.target, args, positional=(groups,), of=Optimizer))
    own = chosen.model_dump(exclude={"name", "family", "usual", "args", "weight_decay"})
    cls, args = locate("optimizer", CLASSES[chosen.name]), {**told, **own, **_moments(recipe), **chosen.args}
    if cls in (SGD, AdamW):
        return fused(cls, groups, args)
    optimizer = cls(groups, **args)
    if chosen.name in LAYERWISE:
        optimizer.agree()
    return cast(Optimizer, optimizer)


def _moments(recipe: Recipe) -> dict[str, Any]:
    """What a recipe says of the moments, by the names of torch's hyperparameters."""
    memory = {"momentum": recipe.betas[0]} if len(recipe.betas) == 1 else {"betas": recipe.betas}
    return (memory if recipe.betas else {}) | ({} if recipe.eps is None else {"eps": recipe.eps})


def fused(cls: type[Optimizer], groups: list[dict[str, Any]], args: dict[str, Any]) -> Optimizer:
    """One of torch's optimizers, with its fused kernel where ``args`` don't choose and there is one."""
    # that of torch 2.13 for SGD can't do DTensors, and leaves 16-bit numbers on the CPU as they are (pytorch #191763)
    parameters = [parameter for group in groups for parameter in group["params"]]
    unfused = cls is SGD and any(sharded(p) or (p.is_cpu and p.dtype.itemsize < 4) for p in parameters)
    if "fused" in args or "foreach" in args or unfused:
        return cls(groups, **args)
    try:
        return cls(groups, **args, fused=True)  # type: ignore[call-arg]
    except RuntimeError:  # this device has no fused kernel
        return cls(groups, **args)


def evaluated(closure: Callable[[], Any] | None) -> Any:
    """What the closure that an optimizer's ``step`` got gives, with gradients; None where there is none."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _groups(task: Task, model: nn.Module) -> list[dict[str, Any]]:
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise UserError("the model has no trainable parameters")
    if hasattr(task, "param_groups"):
        groups = list(task.param_groups(model))
        if not all(isinstance(group, dict) and "params" in group for group in groups):
            raise UserError("task.param_groups has to return a list of groups: [{'params': [...], 'lr': 0.1}, ...]")
        groups = [{**group, "params": list(group["params"])} for group in groups]
        covered = {id(parameter) for group in groups for parameter in group["params"]}
        if left_out := [name for name, parameter in trainable.items() if id(parameter) not in covered]:
            raise UserError(
                f"task.param_groups leaves out {', '.join(left_out[:5])}{' …' * (len(left_out) > 5)}: put them into a "
                "group, or set requires_grad=False to freeze them"
            )
        # frozen ones would be moved by weight decay and momentum
        groups = [{**group, "params": [p for p in group["params"] if p.requires_grad]} for group in groups]
        return [group for group in groups if group["params"]]
    without = undecayed(model)
    decayed = [parameter for parameter in trainable.values() if parameter not in without]
    exempt = [parameter for parameter in trainable.values() if parameter in without]
    groups = [{"params": decayed}, {"params": exempt, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
