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
    """Return whether `groups` have the parameters of the `stored` ones; True where there are no stored ones."""
    return not stored or [group["params"] for group in stored] == [_named(group, names) for group in groups]


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
    """Say which parameters would be in another group in a new run."""
    if len(groups) != len(kept):
        return f"a new run would have {len(groups)}, not {len(kept)}"
    found = [
        name
        for new, old in zip(groups, kept, strict=True)
        for name in _named(old, names)
        if name not in set(_named(new, names))
    ]
    more = f" and {len(found) - SHOWN} more" * (len(found) > SHOWN)
    return f"a new run would put {', '.join(found[:SHOWN])}{more} into another one"


def _named(group: Mapping[str, Any], names: Mapping[Tensor, str]) -> list[str]:
    return [names.get(parameter, "") for parameter in group["params"]]
