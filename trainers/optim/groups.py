"""A checkpoint's groups of parameters, kept by the run that resumes it, also where a new run would have others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from torch import Tensor

Groups = Sequence[Mapping[str, Any]]
"""Groups as a checkpoint has them: hyperparameters, and the names of the ``params``."""

SHOWN = 5


def are_groups(value: Any) -> TypeGuard[list[dict[str, Any]]]:
    """Return whether `value` is what a checkpoint has as the groups of an optimizer."""
    return isinstance(value, list) and all(isinstance(group, dict) and _names(group.get("params")) for group in value)


def _names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def same(stored: Groups, groups: list[dict[str, Any]], names: Mapping[Tensor, str]) -> bool:
    """Return whether `groups` are the `stored` ones; True where there are no stored ones.

    They are where they have the same parameters, go to the same part of Muon, and have weight decay or none.
    """
    decays = any(group.get("weight_decay") for group in stored)  # else it makes no difference which groups have it

    def kind(group: Mapping[str, Any], params: list[str]) -> tuple[Any, ...]:
        return params, bool(group.get("muon")), decays and group.get("weight_decay") == 0

    then = [kind(group, group["params"]) for group in stored]
    return not stored or then == [kind(group, _named(group, names)) for group in groups]


def as_stored(groups: list[dict[str, Any]], stored: Groups, names: Mapping[Tensor, str]) -> list[dict[str, Any]]:
    """Return the parameters of `groups`, grouped as `stored`; `groups` themselves where the parameters are others.

    A group without weight decay stays one.
    """
    parameters = {names[parameter]: parameter for group in groups for parameter in group["params"]}
    if sorted(name for group in stored for name in group["params"]) != sorted(parameters):
        return groups
    return [
        {
            "params": [parameters[name] for name in was["params"]],
            **{key: bool(was[key]) for key in ("muon", "trust") if key in was},
            **({"weight_decay": 0.0} if was.get("weight_decay") == 0 else {}),
        }
        for was in stored
    ]


def moved(groups: list[dict[str, Any]], kept: list[dict[str, Any]], names: Mapping[Tensor, str]) -> str:
    """Return the names of the parameters that a new run would treat otherwise."""
    new, old = _treatment(groups, names), _treatment(kept, names)
    found = [name for name in old if old[name] != new[name]]
    more = f" and {len(found) - SHOWN} more" * (len(found) > SHOWN)
    return f"{', '.join(found[:SHOWN])}{more}"


def _treatment(groups: list[dict[str, Any]], names: Mapping[Tensor, str]) -> dict[str, tuple[bool, bool]]:
    return {
        name: (bool(group.get("muon")), group.get("weight_decay") == 0)
        for group in groups
        for name in _named(group, names)
    }


def _named(group: Mapping[str, Any], names: Mapping[Tensor, str]) -> list[str]:
    return [names.get(parameter, "") for parameter in group["params"]]
