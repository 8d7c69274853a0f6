"""Make the parameter groups of an optimizer: those of a new run, or the checkpoint's if the two differ."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeGuard

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from isobatch.scaling.errors import UserError
from isobatch.trainers.model.modes import is_norm
from isobatch.trainers.ranks.internals import WeightNorm
from isobatch.trainers.tasks.task import Task

Groups = Sequence[Mapping[str, Any]]
"""Groups in the form of a checkpoint: hyperparameters, and the names of the ``params``."""

Regroup = Callable[[list[dict[str, Any]], nn.Module, list[dict[str, Any]] | None], list[dict[str, Any]]]
"""Add the optimizer's own keys to the groups of a model, or take them from the groups of a checkpoint, if given."""

SHOWN = 5

# The names of parameters without weight decay; the rule is the same for all optimizers.
NAMED = ("bias", "scale", "gain", "gamma", "beta", "norm")
CONTAINERS = (nn.ParameterList, nn.ParameterDict, ParametrizationList)


def groups_for(
    task: Task, model: nn.Module, regroup: Regroup | None, stored: Groups, tell: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Return the groups of a new run, or the ``stored`` groups if they differ but fit the task and the model.

    Args:
        regroup: adds the optimizer's own keys to the groups; None if it has none.
        tell: called with a report if the stored groups are kept.

    Raises:
        UserError: the model has no trainable parameters, or the task's groups leave some out.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}

    def fresh(kept: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
        found = _task_groups(task, model)
        return regroup(found, model, kept) if regroup else found

    groups = fresh()
    if same(stored, groups, names):
        return groups
    kept = as_stored(groups, stored, names)
    if task.has("param_groups"):  # the task decides its groups, except for the matrices that go to Muon
        kept = fresh(kept)
    if not same(stored, kept, names):
        return groups
    differ = "also for parameters that a new run would decay, or give to Muon, differently"
    tell(f"the optimizer keeps the checkpoint's groups, {differ}: {regrouped(groups, kept, names)}")
    return kept


def _task_groups(task: Task, model: nn.Module) -> list[dict[str, Any]]:
    """Return the task's groups, or by default one group with weight decay and one without."""
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise UserError("the model has no trainable parameters")
    if (own := task.param_groups(model)) is not None:
        groups = list(own)
        if not all(isinstance(group, dict) and "params" in group for group in groups):
            problem = "task.param_groups doesn't return a list of groups"
            raise UserError(problem, "return [{'params': [...], 'lr': 0.1}, ...]")
        groups = [{**group, "params": list(group["params"])} for group in groups]
        covered = {id(parameter) for group in groups for parameter in group["params"]}
        if left_out := [name for name, parameter in trainable.items() if id(parameter) not in covered]:
            problem = f"task.param_groups leaves out {', '.join(left_out[:SHOWN])}{' …' * (len(left_out) > SHOWN)}"
            raise UserError(problem, "put them into a group, or set requires_grad=False to freeze them")
        # weight decay and momentum would change frozen parameters
        groups = [{**group, "params": [p for p in group["params"] if p.requires_grad]} for group in groups]
        return [group for group in groups if group["params"]]
    without, every = undecayed(model), trainable.values()
    groups = [{"params": [parameter for parameter in every if parameter not in without]}]
    groups += [{"params": [parameter for parameter in every if parameter in without], "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def are_groups(value: Any) -> TypeGuard[list[dict[str, Any]]]:
    """Return whether `value` has the form of an optimizer's groups in a checkpoint."""
    return _list_of(dict, value) and all(_list_of(str, group.get("params")) for group in value)


def _list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, kind) for one in value)


def same(stored: Groups, groups: list[dict[str, Any]], names: Mapping[Tensor, str]) -> bool:
    """Return whether `groups` match the `stored` groups; True if nothing is stored.

    They match if they have the same parameters, go to the same part of Muon, and agree on having weight decay.
    """
    decays = any(group.get("weight_decay") for group in stored)  # else it doesn't matter which groups have it

    def kind(group: Mapping[str, Any], params: list[str]) -> tuple[Any, ...]:
        return params, bool(group.get("muon")), decays and group.get("weight_decay") == 0

    then = [kind(group, group["params"]) for group in stored]
    return not stored or then == [kind(group, [names.get(p, "") for p in group["params"]]) for group in groups]


def as_stored(groups: list[dict[str, Any]], stored: Groups, names: Mapping[Tensor, str]) -> list[dict[str, Any]]:
    """Regroup the parameters of `groups` as `stored`; return `groups` if the parameters differ.

    A stored group without weight decay stays without.
    """
    parameters = {names[parameter]: parameter for group in groups for parameter in group["params"]}
    if sorted(name for group in stored for name in group["params"]) != sorted(parameters):
        return groups
    found = []
    for was in stored:
        own = {key: bool(was[key]) for key in ("muon", "trust") if key in was}
        without = {"weight_decay": 0.0} if was.get("weight_decay") == 0 else {}
        found.append({"params": [parameters[name] for name in was["params"]], **own, **without})
    return found


def regrouped(groups: list[dict[str, Any]], kept: list[dict[str, Any]], names: Mapping[Tensor, str]) -> str:
    """Return the names of the parameters that a new run would treat differently."""

    def treated(groups: list[dict[str, Any]]) -> dict[Tensor, tuple[bool, bool]]:
        return {
            p: (bool(group.get("muon")), group.get("weight_decay") == 0) for group in groups for p in group["params"]
        }

    new = treated(groups)
    found = [names.get(parameter, "") for parameter, then in treated(kept).items() if then != new[parameter]]
    return f"{', '.join(found[:SHOWN])}{f' and {len(found) - SHOWN} more' * (len(found) > SHOWN)}"


def undecayed(model: nn.Module) -> dict[Tensor, str]:
    """Return the parameters without weight decay, with their names.

    These are gains and biases, parameters with fewer than 2 dimensions, and those that ``model.no_weight_decay()``
    names. All others, embeddings included, are decayed. A parameter that several modules share isn't decayed if one of
    its names is exempt.

    Raises:
        UserError: ``no_weight_decay()`` doesn't return names.
    """
    named, found = _own_names(model), gains_and_biases(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.ndim < 2 or name in named:
            found.setdefault(parameter, name)
    return found


def gains_and_biases(model: nn.Module) -> dict[Tensor, str]:
    """Return the parameters that scale or shift, of any number of dimensions, with their names.

    These are the parameters of normalisation layers, those whose last name part contains one of ``NAMED``, and the
    lengths of weight_norm.
    """
    modules, found = dict(model.named_modules(remove_duplicate=False)), dict[Tensor, str]()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner, words = _owner(modules, name)
        if is_norm(owner) or any(part in word for part in NAMED for word in words) or _is_length(modules, name):
            found.setdefault(parameter, name)
    return found


def _owner(modules: dict[str, nn.Module], name: str) -> tuple[nn.Module, list[str]]:
    """Return the layer that owns a parameter, and the last part of the parameter's name in lower case.

    For a parameter in a container (``scales.0``, ``parametrizations.weight.original``), also return the layer's name
    of the container.
    """
    path, _, last = name.rpartition(".")
    words = [last.lower()]
    while isinstance(modules[path], CONTAINERS):
        path, _, last = path.rpartition(".")
        if isinstance(modules[path], nn.ModuleDict):
            path = path.removesuffix("parametrizations").rstrip(".")
        words.append(last.lower())
    return modules[path], words


def _is_length(modules: dict[str, nn.Module], name: str) -> bool:
    """Return whether the parameter is the g of torch's weight_norm, the old function or the parametrisation."""
    path, _, last = name.rpartition(".")
    owner = modules[path]
    if isinstance(owner, ParametrizationList):
        return last == "original0" and isinstance(owner[0], WeightNorm)
    return last.endswith("_g") and isinstance(getattr(owner, f"{last[:-2]}_v", None), nn.Parameter)


def _own_names(model: Any) -> set[str]:
    names = model.no_weight_decay() if callable(getattr(model, "no_weight_decay", None)) else ()
    several = isinstance(names, Iterable) and not isinstance(names, str)
    if not several or not all(isinstance(name, str) for name in names):
        problem = f"model.no_weight_decay() returned {names!r:.100}"
        raise UserError(problem, "return the names of parameters, such as {'pos_embed'}")
    return set(names)
