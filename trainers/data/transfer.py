"""Move batches to the training device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def to_device(batch: Any, device: torch.device) -> Any:
    """Return ``batch`` with its tensors (and whatever else has ``.to``) on ``device``."""
    return batch if device.type == "cpu" else _map(batch, lambda value: value.to(device, non_blocking=True))


def pinned(batch: Any) -> Any:
    """Return ``batch`` with its tensors in pinned memory."""
    return _map(batch, lambda value: value.pin_memory() if isinstance(value, Tensor) and value.is_cpu else value)


def _map(value: Any, function: Callable[[Any], Any]) -> Any:
    """Apply ``function`` to everything with a ``.to`` within nested tuples, lists and mappings."""
    if hasattr(value, "to"):
        return function(value)
    if isinstance(value, dict):
        return {key: _map(inner, function) for key, inner in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(inner, function) for inner in value))
    if isinstance(value, list | tuple):
        return type(value)(_map(inner, function) for inner in value)
    return value
