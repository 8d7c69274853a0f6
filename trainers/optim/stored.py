"""An optimizer's state as a checkpoint holds it: by the names of the parameters, with no code for any one optimizer.

Tensors are ``optim/<parameter>/<key>``; what isn't a tensor is JSON under the same names, and ``optim/groups`` are the
hyperparameters of the groups, some of which an optimizer may move by itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from trainers.rundir import Refused

if TYPE_CHECKING:
    from trainers.checkpoint import Reader

GROUPS = "optim/groups"


def stored_optimizer(optimizer: Optimizer, names: Mapping[Tensor, str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Its tensors, and the rest as JSON.

    Raises:
        Refused: it keeps something that is neither, or for something that is no parameter of the model.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for parameter, state in optimizer.state.items():
        if parameter not in names:
            raise Refused(f"{_named(optimizer)} keeps state of what is no parameter of the model")
        for key, value in state.items():
            (tensors if isinstance(value, Tensor) else values)[f"optim/{names[parameter]}/{key}"] = value
    values[GROUPS] = [{key: group[key] for key in group if key != "params"} for group in optimizer.param_groups]
    for name, value in values.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            raise Refused(f"{_named(optimizer)} keeps as {name} what isn't a tensor or JSON: {value!r:.100}") from None
    return tensors, values


def restore_optimizer(optimizer: Optimizer, names: Mapping[Tensor, str], reader: Reader) -> None:
    """Put back what ``stored_optimizer`` gave, whole on this rank."""
    parameters = {name: parameter for parameter, name in names.items()}
    group_of = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    for group, was in zip(optimizer.param_groups, reader.values[GROUPS], strict=True):
        for key, value in was.items():
            group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
    optimizer.state.clear()
    for name in (*reader.tensors, *reader.values):
        kind, _, rest = name.partition("/")
        if kind != "optim" or name == GROUPS:
            continue
        of, _, key = rest.rpartition("/")
        parameter = parameters[of]
        if name in reader.values:
            optimizer.state[parameter][key] = reader.values[name]
            continue
        group = group_of[parameter]
        # torch's optimizers count steps on the CPU, but where the kernel counts
        stays = key == "step" and not (group.get("fused") or group.get("capturable"))
        optimizer.state[parameter][key] = reader.whole(name).to("cpu" if stays else parameter.device)


def _named(optimizer: Optimizer) -> str:
    return f"the optimizer {type(optimizer).__name__}"
