"""Convert an optimizer's state to and from a checkpoint, by parameter names, without code for any one optimizer.

Tensors are ``optim/<parameter>/<key>``; other values are JSON under the same names. ``optim/groups`` has the
hyperparameters of the groups, some of which an optimizer may change by itself, and the names of their ``params``.
``optim/more`` has the other entries of ``state_dict()``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from isobatch.scaling.errors import UserError
from isobatch.scaling.limits import LARGEST
from isobatch.trainers.optim.groups import are_groups
from isobatch.trainers.tensors.sharding import Part, in_one_part
from isobatch.trainers.tensors.slices import Reader

GROUPS, MORE = "optim/groups", "optim/more"
# How torch's optimizers compute, not what: not restored, since they depend on the engine's tensors and device.
KERNELS = ("fused", "foreach", "capturable")


def stored_optimizer(optimizer: Optimizer, names: Mapping[Tensor, str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the optimizer's tensors, and its other state as JSON values.

    Raises:
        UserError: some state is neither a tensor nor JSON, or belongs to no parameter of the model.
    """
    cls, tensors, values = type(optimizer).__name__, dict[str, Tensor](), dict[str, Any]()
    for parameter, state in optimizer.state.items():
        if parameter not in names:
            raise UserError(f"the optimizer {cls} keeps state for something that isn't a parameter of the model")
        for key, value in state.items():
            if not in_one_part(value):
                found = f"a {key} of {names[parameter]} that isn't sharded as the parameter is ({value.placements})"
                problem = f"the optimizer {cls} keeps {found}, which a checkpoint can't hold"
                raise UserError(problem, "use engine=ddp", "engine")
            (tensors if isinstance(value, Tensor | Part) else values)[f"optim/{names[parameter]}/{key}"] = value
    values[GROUPS] = [_stored_group(group, names) for group in optimizer.param_groups]
    if more := {k: v for k, v in optimizer.state_dict().items() if k not in ("state", "param_groups")}:
        values[MORE] = more
    for name, value in values.items():
        if not _is_json(value):
            shown = " ".join(repr(value).split())
            raise UserError(f"the optimizer {cls} keeps {name}={shown:.100}, which a checkpoint can't hold")
    return tensors, values


def restore_optimizer(
    optimizer: Optimizer,
    names: Mapping[Tensor, str],
    reader: Reader,
    read: Callable[[Tensor, Reader, str, torch.device], Tensor],
) -> None:
    """Restore the state that ``stored_optimizer`` returned, or this rank's part of it.

    Args:
        read: reads this rank's part of a parameter's state, by its name in the checkpoint, for a device.

    Raises:
        UserError: the groups, or the parameters in them, differ from this optimizer's.
    """
    parameters = {name: parameter for parameter, name in names.items()}
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    then, now = reader.values[GROUPS], [_stored_group(group, names) for group in optimizer.param_groups]
    if [was["params"] for was in then] != [group["params"] for group in now]:
        before = f"the checkpoint's optimizer has groups of {_sizes(then)} parameters"
        problem = f"{before}, but this run's has groups of {_sizes(now)}, or of other parameters"
        raise UserError(problem, "undo the change of the task or the model, or start a new run")
    if more := reader.values.get(MORE):
        optimizer.load_state_dict({**optimizer.state_dict(), **more})
    for group, was in zip(optimizer.param_groups, then, strict=True):
        for key in was.keys() - {"params", *KERNELS}:
            group[key] = tuple(was[key]) if isinstance(group.get(key), tuple) else was[key]
    optimizer.state.clear()
    for name in (*reader.tensors, *reader.values):
        kind, _, rest = name.partition("/")
        if kind != "optim" or name in (GROUPS, MORE):
            continue
        owner, _, key = rest.rpartition("/")
        parameter = parameters[owner]
        if name in reader.values:
            optimizer.state[parameter][key] = reader.values[name]
            continue
        # torch's optimizers count steps on the CPU, unless a fused or captured kernel counts
        group = groups[parameter]
        on_cpu = key == "step" and not (group.get("fused") or group.get("capturable"))
        device = torch.device("cpu") if on_cpu else parameter.device
        optimizer.state[parameter][key] = read(parameter, reader, name, device)


def misfit(values: Mapping[str, Any], present: Sequence[Mapping[str, Any]], *, own: bool) -> str | None:
    """Return the problem with a checkpoint's values that would break the optimizer in a later step, or None.

    Args:
        present: the groups of the new optimizer, in the form of ``stored_optimizer``.
        own: the optimizer is the user's: apart from its initial hyperparameters, it may keep any JSON.
    """
    groups, more = values.get(GROUPS), values.get(MORE, {})
    if not are_groups(groups):
        return f"{GROUPS} doesn't have the form of an optimizer's groups"
    if not isinstance(more, dict) or {"state", "param_groups"} & more.keys() or (more and not own):
        return f"{MORE} doesn't have the form of this optimizer's state"
    for index, (was, now) in enumerate(zip(groups, present, strict=False)):
        for key in was.keys() & now.keys() - {"params"}:
            if not _alike(was[key], now[key]):
                return f"{GROUPS} has {key}={was[key]!r:.100} in group {index}, but the config has {now[key]!r:.100}"
    for name, value in values.items():
        if not own and name not in (GROUPS, MORE) and not (value is None or _alike(value, 0)):
            return f"{name:.100} is {value!r:.100}"
    return None


def _alike(was: Any, now: Any) -> bool:
    """Return whether a stored hyperparameter has the type of the current one; None allows any type."""
    if now is None:
        return True
    if isinstance(now, bool) or isinstance(was, bool):
        return isinstance(was, bool) and isinstance(now, bool | str)
    if isinstance(now, int | float):
        return isinstance(was, int | float) and -LARGEST <= was <= LARGEST
    if isinstance(now, list | tuple):
        return isinstance(was, list) and (not now or (len(was) == len(now) and all(map(_alike, was, now))))
    return isinstance(was, type(now))


def _stored_group(group: Mapping[str, Any], names: Mapping[Tensor, str]) -> dict[str, Any]:
    """Return a group's hyperparameters, with tuples as lists, and the names of its parameters."""
    kept = {key: value for key, value in group.items() if key not in KERNELS}
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in kept.items()}
    return plain | {"params": [names[parameter] for parameter in group["params"]]}


def _is_json(value: Any) -> bool:
    """Return whether ``value`` survives a round trip through JSON."""
    try:
        return bool(json.loads(json.dumps(value, allow_nan=False)) == value)
    except (TypeError, ValueError, RuntimeError):
        return False


def _sizes(groups: list[dict[str, Any]]) -> str:
    return " and ".join(str(len(group["params"])) for group in groups)
