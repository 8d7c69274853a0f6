"""What the gradient noise scale (scaling/noise.py) is measured from: each micro-batch's own gradient, as it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class GradientSquares:
    """Sums |G_j|²/b_j over this rank's micro-batches of a step, G_j being the gradient that a backward gives.

    A hook on each parameter sees it before it is accumulated, reduced over ranks or clipped. Nothing is kept of it, and
    nothing waits for the device.

    Args:
        parameters: those that are trained. One that is frozen, or has no part in the loss, adds nothing.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._sum: Tensor | None = None

    @contextmanager
    def of(self, samples: int) -> Iterator[None]:
        """Around the backward of a micro-batch of so many samples; none: a stand-in, which is no part of the step."""
        norms: list[Tensor] = []

        def note(gradient: Tensor) -> None:
            norms.append(torch.linalg.vector_norm(gradient, dtype=_wide(gradient)))

        hooks = [p.register_hook(note) for p in self._parameters if p.requires_grad and samples]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        square = torch.stack(norms).double().square().sum() / samples if norms else self._nothing()
        self._sum = square if self._sum is None else self._sum + square

    def take(self, over_ranks: Callable[[Tensor], Tensor]) -> Tensor | None:
        """The sum over all ranks, 0-dim float64, of what was measured since the last time; None: nothing was."""
        found, self._sum = self._sum, None
        return None if found is None else over_ranks(found)

    def _nothing(self) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=self._parameters[0].device)


def _wide(gradient: Tensor) -> torch.dtype | None:
    return torch.float32 if gradient.dtype.itemsize < 4 else None
