"""Weight decay: which parameters have none. The rule is the same for all optimizers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList

from isobatch.scaling.errors import UserError
from isobatch.trainers.model.modes import is_norm

NAMED = ("bias", "scale", "gain", "gamma", "beta", "norm")
CONTAINERS = (nn.ParameterList, nn.ParameterDict, ParametrizationList)


def undecayed(model: nn.Module) -> dict[Tensor, str]:
    """Return the parameters without weight decay, with their names.

    These are gains and biases, parameters with fewer than 2 dimensions, and those that ``model.no_weight_decay()``
    names. All others, embeddings included, are decayed. One that several modules share has none if it has none in one
    of them.

    Raises:
        UserError: ``no_weight_decay()`` returns something else than names.
    """
    named, found = _own_names(model), gains_and_biases(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.ndim < 2 or name in named:
            found.setdefault(parameter, name)
    return found


def gains_and_biases(model: nn.Module) -> dict[Tensor, str]:
    """Return the parameters that scale or shift, whatever their dimensions, with their names.

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
    """Return the layer that has a parameter, and the last part of its name, in lower case.

    In a container (``scales.0``, ``parametrizations.weight.original``) what the layer calls it is another part.
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
    """Return whether the parameter is the g of weight_norm, torch's old one or the parametrisation."""
    path, _, last = name.rpartition(".")
    owner = modules[path]
    if isinstance(owner, ParametrizationList):
        return last == "original0" and isinstance(owner[0], _WeightNorm)
    return last.endswith("_g") and isinstance(getattr(owner, f"{last[:-2]}_v", None), nn.Parameter)


def _own_names(model: Any) -> set[str]:
    names = model.no_weight_decay() if callable(getattr(model, "no_weight_decay", None)) else ()
    several = isinstance(names, Iterable) and not isinstance(names, str)
    if not several or not all(isinstance(name, str) for name in names):
        problem = f"model.no_weight_decay() returned {names!r:.100}"
        raise UserError(problem, "return the names of parameters, say {'pos_embed'}")
    return set(names)
