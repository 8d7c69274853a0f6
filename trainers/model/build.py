"""Prepare the model for training, and find the modules that make the run depend on its cut."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial
from shutil import which
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from isobatch.conf.schema import RunConfig
from isobatch.scaling.errors import UserError
from isobatch.scaling.geometry import counted
from isobatch.trainers.model.batchnorm import Counting, swap_batchnorm
from isobatch.trainers.model.dropout import key_dropout
from isobatch.trainers.model.randomness import Stream
from isobatch.trainers.ranks.internals import BatchNorm


def of_micro_batches(model: nn.Module) -> list[nn.Module]:
    """Return the BatchNorm layers in training mode whose statistics are those of a micro-batch."""
    return [m for m in model.modules() if m.training and isinstance(m, BatchNorm) and not isinstance(m, Counting)]


def dependent_on_cut(model: nn.Module) -> list[str]:
    """Return the reasons why training ``model`` in its current mode depends on the cut, judged by its modules."""
    training = {name: module for name, module in model.named_modules() if module.training}
    norms = of_micro_batches(model)
    inside = {name: m for name, m in training.items() if isinstance(m, nn.MultiheadAttention | nn.RNNBase)}
    dropping = [name for name, module in inside.items() if module.dropout > 0]
    ghosts = "batchnorm.mode=ghost batchnorm.ghost_size=N takes them from N samples on any hardware"
    reasons = {
        f"{counted(len(norms), 'BatchNorm layer')} with statistics of one micro-batch: {ghosts}": norms,
        f"dropout inside of {', '.join(dropping)}, which isn't an nn.Dropout": dropping,
    }
    return [reason for reason, found in reasons.items() if found]


def prepare(model: nn.Module, config: RunConfig, stream: Stream, ranks: int) -> nn.Module:
    """Prepare ``model`` in place and return it: keyed dropout, BatchNorm mode, compilation and recomputation.

    Raises:
        UserError: ``recompute`` matches no module, or ``compile`` finds no compiler.
    """
    mode = config.batchnorm.mode
    if mode is None and config.numerics == "bitwise":
        mode, ranks = "sync", 1  # statistics of one micro-batch, on any number of ranks
    # an expanded buffer's elements share memory, so it can't be received in place
    replace_buffers(model, lambda buffer: buffer.contiguous() if 0 in buffer.stride() else buffer)
    model = swap_batchnorm(key_dropout(model, stream), mode, config.batchnorm.ghost_size, stream, ranks)
    if config.compile:
        _want_compiler(stream.device)
        model.forward = torch.compile(model.forward)  # model.compile() skips torch's own modules, such as nn.Sequential
    recompute(model, config.recompute, compiled=config.compile)
    return model


def _want_compiler(device: torch.device) -> None:
    names = [os.environ.get("CXX", "g++")] if device.type == "cpu" else [os.environ.get("CC", "gcc"), "clang"]
    if not any(map(which, names)):
        problem = f"compile=true needs the compiler {names[0]}, which isn't installed"
        raise UserError(problem, "install it, or leave compile out", "compile", True)


def recompute(model: nn.Module, patterns: Sequence[str], compiled: bool = False) -> None:
    """Recompute the activations of the outermost modules that match a pattern in the backward.

    Args:
        compiled: compile each of these modules by itself.
    """
    modules = matching(model, patterns, "recompute")
    names = modules.keys()
    for module in {m: None for name, m in modules.items() if not any(name.startswith(f"{other}.") for other in names)}:
        module.forward = partial(_again, torch.compile(module.forward) if compiled else module.forward)


def matching(model: nn.Module, patterns: Sequence[str], key: str) -> dict[str, nn.Module]:
    """Return the modules of ``model`` whose names match one of ``patterns``, in the order of their registration.

    Args:
        key: the config key, for errors.

    Raises:
        UserError: a pattern matches no module.
    """
    modules = {name: m for name, m in model.named_modules(remove_duplicate=False) if name and is_called(m)}
    matched = {pattern: fnmatch.filter(modules, pattern) for pattern in patterns}
    for pattern in (pattern for pattern, names in matched.items() if not names):
        parents = [f"{name.rpartition('.')[0]}.*" for name in modules if "." in name]
        near = get_close_matches(pattern, [*modules, *dict.fromkeys(parents)], n=3, cutoff=0.4) or list(modules)[:3]
        fix = f"did you mean {' or '.join(near)}?"
        raise UserError(f"{key}={pattern} matches no module of the model", fix, key, pattern)
    chosen = {name for names in matched.values() for name in names}
    return {name: module for name, module in modules.items() if name in chosen}


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _again(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    # not compiled: compiled checkpoints don't restore the generator state that identifies a mask
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def is_called(module: nn.Module) -> bool:
    """Return whether ``module`` has a forward; a ModuleList has none."""
    return type(module).forward is not nn.Module.forward


def place_buffers(model: nn.Module, device: torch.device) -> None:
    """Move the buffers of ``model`` to ``device``, but not its parameters."""
    replace_buffers(model, lambda buffer: buffer.to(device))


def replace_buffers(model: nn.Module, new: Callable[[Tensor], Tensor]) -> None:
    """Replace each buffer of ``model`` by ``new(buffer)``, under all of its names.

    They are put in place past the module's ``__setattr__``, which may be the user's.
    """
    replaced: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                replaced[buffer] = new(buffer) if buffer not in replaced else replaced[buffer]
                module._buffers[name] = replaced[buffer]


def tied(model: nn.Module) -> list[dict[str, Tensor]]:
    """Return the model's state_dict, grouped by memory: tensors that share all of their memory form one group."""
    groups: dict[tuple[int, ...], dict[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            memory = (tensor.data_ptr(), tensor.numel()) if tensor.numel() else (id(tensor),)
            groups.setdefault(memory, {})[name] = tensor.detach()
    return list(groups.values())


def distinct(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by their first name. Raise UserError if the state_dict has another value."""
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise UserError(f"the model keeps a {type(value).__name__} as {name}; a checkpoint holds tensors only")
    return {next(iter(group)): next(iter(group.values())) for group in tied(model)}
