"""An optimizer's state as a checkpoint holds it: by the names of the parameters, with no code for any one optimizer.

Tensors are ``optim/<parameter>/<key>``; what isn't a tensor is JSON under the same names. ``optim/groups`` are the
hyperparameters of the groups, some of which an optimizer may move by itself, with the names of their ``params``;
``optim/more`` is what else its ``state_dict()`` has.
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
# How an optimizer of torch's computes, not what: as fits the tensors and the device of the engine at hand.
KERNELS = ("fused", "foreach", "capturable")


def stored_optimizer(optimizer: Optimizer, names: Mapping[Tensor, str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return its tensors, and the rest as JSON.

    Raises:
        UserError: it keeps something that is neither, or for something that is no parameter of the model.
    """
    who, tensors, values = type(optimizer).__name__, dict[str, Tensor](), dict[str, Any]()
    for parameter, state in optimizer.state.items():
        if parameter not in names:
            raise UserError(f"the optimizer {who} keeps state of what is no parameter of the model")
        for key, value in state.items():
            if not in_one_part(value):
                what = f"a {key} of {names[parameter]} that isn't in parts as the parameter is ({value.placements})"
                problem = f"the optimizer {who} keeps {what}, which a checkpoint can't hold"
                raise UserError(problem, "use engine=ddp", "engine")
            (tensors if isinstance(value, Tensor | Part) else values)[f"optim/{names[parameter]}/{key}"] = value
    values[GROUPS] = [_stored_group(group, names) for group in optimizer.param_groups]
    if more := {k: v for k, v in optimizer.state_dict().items() if k not in ("state", "param_groups")}:
        values[MORE] = more
    for name, value in values.items():
        if not _is_json(value):
            shown = " ".join(repr(value).split())
            raise UserError(f"the optimizer {who} keeps as {name} what a checkpoint can't hold: {shown:.100}")
    return tensors, values


def restore_optimizer(
    optimizer: Optimizer,
    names: Mapping[Tensor, str],
    reader: Reader,
    read: Callable[[Tensor, Reader, str, torch.device], Tensor],
) -> None:
    """Put back what ``stored_optimizer`` gave: of a sharded parameter's state, this rank's part.

    Args:
        read: what a rank holds of the state of a parameter, by its name in the checkpoint, for a device.

    Raises:
        UserError: it isn't of this optimizer: groups, or the parameters in them, are others.
    """
    parameters = {name: parameter for parameter, name in names.items()}
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    then, now = reader.values[GROUPS], [_stored_group(group, names) for group in optimizer.param_groups]
    if [was["params"] for was in then] != [group["params"] for group in now]:
        before = f"the optimizer's parameters were in groups of {_sizes(then)} when the checkpoint was saved"
        problem = f"{before}, and now in groups of {_sizes(now)}, or others are in them"
        raise UserError(problem, "was the task or the model changed?")
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
        of, _, key = rest.rpartition("/")
        parameter = parameters[of]
        if name in reader.values:
            optimizer.state[parameter][key] = reader.values[name]
            continue
        # torch's optimizers count steps on the CPU, but where the kernel counts
        group = groups[parameter]
        stays = key == "step" and not (group.get("fused") or group.get("capturable"))
        device = torch.device("cpu") if stays else parameter.device
        optimizer.state[parameter][key] = read(parameter, reader, name, device)


def misfit(values: Mapping[str, Any], present: Sequence[Mapping[str, Any]], *, own: bool) -> str | None:
    """Return what in a checkpoint's values would break the optimizer in a later step; None: nothing.

    Args:
        present: the optimizer's groups as it was made, in the form of ``stored_optimizer``.
        own: it is a user's, which may keep any JSON, but in the hyperparameters that it was made with.
    """
    groups, more = values.get(GROUPS), values.get(MORE, {})
    if not are_groups(groups):
        return f"{GROUPS} isn't what an optimizer's groups are"
    if not isinstance(more, dict) or {"state", "param_groups"} & more.keys() or (more and not own):
        return f"{MORE} isn't what this optimizer keeps"
    for index, (was, now) in enumerate(zip(groups, present, strict=False)):
        for key in was.keys() & now.keys() - {"params"}:
            if not _alike(was[key], now[key]):
                there, here = f"{was[key]!r:.100}", f"{now[key]!r:.100}"
                return f"{GROUPS} has {key}={there} in group {index}, and the optimizer was made with {here}"
    for name, value in values.items():
        if not own and name not in (GROUPS, MORE) and not (value is None or _alike(value, 0)):
            return f"{name:.100} is {value!r:.100}"
    return None


def _alike(was: Any, now: Any) -> bool:
    """Tell whether a hyperparameter is of the kind it was made with; of None anything may become."""
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
    """A group's hyperparameters, its tuples as lists, and the names of its parameters."""
    told = {key: value for key, value in group.items() if key not in KERNELS}
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in told.items()}
    return plain | {"params": [names[parameter] for parameter in group["params"]]}


def _is_json(value: Any) -> bool:
    """Return whether it comes back as it was."""
    try:
        return bool(json.loads(json.dumps(value, allow_nan=False)) == value)
    except (TypeError, ValueError, RuntimeError):
        return False


def _sizes(groups: list[dict[str, Any]]) -> str:
    return " and ".join(str(len(group["params"])) for group in groups)
