"""torch's own optimizers, with their fused kernels."""

from __future__ import annotations

from typing import Any

from torch.optim import SGD, Optimizer

from isobatch.trainers.tensors.sharding import sharded


def fused(cls: type[Optimizer], groups: list[dict[str, Any]], args: dict[str, Any]) -> Optimizer:
    """Return an optimizer of torch's, with its fused kernel where `args` don't choose and there is one."""
    # that of torch 2.13 for SGD can't do DTensors, and leaves 16-bit numbers on the CPU as they are (pytorch #191763)
    parameters = [parameter for group in groups for parameter in group["params"]]
    unfused = cls is SGD and any(sharded(p) or (p.is_cpu and p.dtype.itemsize < 4) for p in parameters)
    if "fused" in args or "foreach" in args or unfused:
        return cls(groups, **args)
    try:
        return cls(groups, **args, fused=True)  # type: ignore[call-arg]
    except RuntimeError:  # this device has no fused kernel
        return cls(groups, **args)
