"""An exponential moving average of the weights (EMA)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from isobatch.trainers.tensors.sharding import local


class Average:
    """The moving average of ``named`` parameters, those that are trained; at the start it is what they are.

    After each step: average ← decay × average + (1 − decay) × weights. The decay of a step is 0.5^(global batch /
    half-life), both in samples, so that the average forgets at the same pace whatever the batch.

    Attributes:
        tensors: the averages by name, on the parameters' devices: float32 where a parameter has fewer bits (the small
            part of a step would be rounded away), else of its dtype.
    """

    def __init__(self, named: Mapping[str, nn.Parameter]) -> None:
        self._parameters: list[Tensor] = list(named.values())
        self.tensors = {name: _widened(parameter.detach()) for name, parameter in named.items()}

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Take in what the parameters are now."""
        averages = [local(average) for average in self.tensors.values()]
        weights = [local(p).to(average.dtype) for p, average in zip(self._parameters, averages, strict=True)]
        torch._foreach_lerp_(averages, weights, 1 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within, the parameters hold the average (rounded to their dtype); after it, bit by bit what they held before.

        Takes as much memory again as the parameters have: between two steps, when there are no gradients.
        """
        kept = [local(parameter).clone() for parameter in self._parameters]
        try:
            self._put([local(average) for average in self.tensors.values()])
            self._refresh()
            yield
        except BaseException:
            self._put(kept)  # and no message: other ranks may be elsewhere
            raise
        self._put(kept)
        self._refresh()

    @torch.no_grad()
    def _put(self, values: list[Tensor]) -> None:
        torch._foreach_copy_([local(parameter) for parameter in self._parameters], values)

    def _refresh(self) -> None:
        """Let what is computed with be what was put, where that isn't one thing; called by all ranks."""


def _widened(tensor: Tensor) -> Tensor:
    narrow = tensor.is_floating_point() and tensor.element_size() < 4
    return tensor.to(torch.float32 if narrow else tensor.dtype, copy=True)
