"""The model that a run trains, and what in it makes a run depend on its cut."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from scaling.geometry import counted
from trainers.locate import build
from trainers.rundir import Refused
from trainers.tasks import Task

if TYPE_CHECKING:
    from conf.schema import RunConfig


def make_model(config: RunConfig, task: Task) -> nn.Module:
    """``model._target_`` called with ``model.args``, or the task's own model."""
    if config.model.target is None:
        model, what = task.model(), "task.model()"
    else:
        model, what = build("model", config.model.target, config.model.args), f"model._target_={config.model.target}"
    if not isinstance(model, nn.Module):
        raise Refused(f"{what} gives a {type(model).__name__}, not a torch.nn.Module")
    return model


def dependent_on_cut(model: nn.Module) -> list[str]:
    """What in ``model`` makes its training depend on how a global batch is cut, as far as its modules tell."""
    norms = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    dropping = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention | nn.RNNBase) and module.dropout > 0
    ]
    reasons = [f"{counted(norms, 'BatchNorm layer')} with statistics of one micro-batch"] if norms else []
    return reasons + ([f"dropout inside of {', '.join(dropping)}, which isn't an nn.Dropout"] if dropping else [])


def tied(model: nn.Module) -> list[dict[str, Tensor]]:
    """The tensors of the model's state_dict by their names; those that share all of their memory are together."""
    groups: dict[tuple[int, ...], dict[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            memory = (tensor.data_ptr(), tensor.numel()) if tensor.numel() else (id(tensor),)
            groups.setdefault(memory, {})[name] = tensor.detach()
    return list(groups.values())


def distinct(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers; what has several names by the first of them.

    Raises:
        Refused: the model's state has what isn't a tensor.
    """
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise Refused(f"the model keeps a {type(value).__name__} as {name}; a checkpoint holds a model's tensors")
    return {next(iter(group)): next(iter(group.values())) for group in tied(model)}
