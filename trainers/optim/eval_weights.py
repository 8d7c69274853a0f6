"""Optimizers with ``train()`` and ``eval()``, which evaluate other weights than they step (schedule-free methods)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from isobatch.trainers.tensors.sharding import local


def has_modes(optimizer: Optimizer) -> bool:
    """Return whether `optimizer` has methods ``train()`` and ``eval()``, which torch's own don't have."""
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))


@contextmanager
def eval_weights(optimizer: Any, refresh: Callable[[], None]) -> Iterator[None]:
    """Within, the parameters hold what the optimizer's ``eval()`` makes of them; afterwards what they held before.

    ``eval()`` and then ``train()`` would round, so the weights are copied and put back, bit by bit. All ranks call
    this, between two steps.

    Args:
        refresh: brings what is computed with up to date with what the optimizer steps, where these are two tensors.
    """
    weights = [local(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    kept = [weight.clone() for weight in weights]
    optimizer.eval()
    refresh()
    try:
        yield
    except BaseException:
        _back(optimizer, weights, kept)  # without refresh, which may send messages: other ranks may be elsewhere
        raise
    _back(optimizer, weights, kept)
    refresh()


@torch.no_grad()
def _back(optimizer: Any, weights: list[Tensor], kept: list[Tensor]) -> None:
    optimizer.train()
    torch._foreach_copy_(weights, kept)
