"""Weights that are evaluated in place of those that are stepped: a moving average (EMA), or an optimizer's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from isobatch.trainers.tensors.sharding import Part, copied, local


class Average:
    """The moving average of parameters, those that are trained; at the start it is what they are.

    After each step: average ← decay × average + (1 − decay) × weights. The decay of a step is 0.5^(global batch /
    half-life), both in samples, so that the average forgets at the same pace whatever the batch.

    Args:
        named: what this rank holds of the parameters.
        refresh: lets the model compute with what was put into ``named``, where that isn't one thing; called by all
            ranks.

    Attributes:
        tensors: the averages by name, on the parameters' devices: float32 where a parameter has fewer bits (the small
            part of a step would be rounded away), else of its dtype.
    """

    def __init__(self, named: Mapping[str, Tensor | Part], refresh: Callable[[], None] = lambda: None) -> None:
        self._parameters, self._refresh = list(named.values()), refresh
        self.tensors: dict[str, Any] = {name: _widened(parameter) for name, parameter in named.items()}

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Take in what the parameters are now."""
        averages = self._averages()
        weights = [local(p).to(average.dtype) for p, average in zip(self._parameters, averages, strict=True)]
        torch._foreach_lerp_(averages, weights, 1 - decay)

    def swapped(self) -> AbstractContextManager[None]:
        """Within, the parameters hold the average (rounded to their dtype); after it, bit by bit what they held before.

        Takes as much memory again as the parameters have: between two steps, when there are no gradients.
        """
        weights = [local(parameter) for parameter in self._parameters]
        return _replaced(weights, lambda: _copy(weights, self._averages()), self._refresh)

    def _averages(self) -> list[Tensor]:
        return [local(average) for average in self.tensors.values()]


def has_modes(optimizer: Optimizer) -> bool:
    """Return whether `optimizer` has methods ``train()`` and ``eval()``, which torch's own don't have.

    It then evaluates other weights than it steps, as schedule-free methods do.
    """
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))


@contextmanager
def eval_weights(optimizer: Any, refresh: Callable[[], None]) -> Iterator[None]:
    """Within, the parameters hold what the optimizer's ``eval()`` makes of them; afterwards what they held before.

    ``eval()`` and then ``train()`` would round, so the weights are put back, bit by bit. All ranks call this, between
    two steps.

    Args:
        refresh: lets the model compute with what the optimizer steps, where that isn't one thing.
    """
    weights = [local(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    with _replaced(weights, optimizer.eval, refresh):
        try:
            yield
        finally:
            optimizer.train()


@contextmanager
def _replaced(weights: list[Tensor], replace: Callable[[], object], refresh: Callable[[], None]) -> Iterator[None]:
    """Within, ``weights`` are what ``replace`` makes of them; afterwards what they were before."""
    kept = [weight.clone() for weight in weights]
    try:
        replace()
        refresh()
        yield
    except BaseException:
        _copy(weights, kept)  # and no message: other ranks may be elsewhere
        raise
    _copy(weights, kept)
    refresh()


@torch.no_grad()
def _copy(weights: list[Tensor], values: list[Tensor]) -> None:
    torch._foreach_copy_(weights, values)


def _widened(tensor: Tensor | Part) -> Any:
    narrow = tensor.dtype.is_floating_point and tensor.dtype.itemsize < 4
    return copied(tensor, torch.float32 if narrow else tensor.dtype)
