"""Measure the norms of the micro-batches' gradients, from which the noise scale (scaling/noise.py) is estimated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from isobatch.scaling.geometry import Cut
from isobatch.trainers.ranks.world import World


class GradientSquares:
    """Sum |G_j|²/b_j over the micro-batches of a step; G_j is the gradient of one backward, b_j its samples.

    A hook on each parameter sees the gradient before it is accumulated, reduced over ranks or clipped. The gradient
    isn't kept, and nothing waits for the device.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._by_pass: list[Tensor] = []

    @contextmanager
    def of(self, parameters: Sequence[nn.Parameter], samples: int) -> Iterator[None]:
        """Measure the backward of a micro-batch of ``samples``; 0 is a stand-in, which isn't part of the step.

        Args:
            parameters: the parameters to observe; a frozen or unused one adds nothing.
        """
        norms: list[Tensor] = []

        def note(gradient: Tensor) -> None:
            wide = torch.float32 if gradient.dtype.itemsize < 4 else None
            norms.append(torch.linalg.vector_norm(gradient, dtype=wide))

        hooks = [p.register_hook(note) for p in parameters if p.requires_grad and samples]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        nothing = torch.zeros((), dtype=torch.float64, device=self._world.device)
        self._by_pass.append(torch.stack(norms).double().square().sum() / samples if norms else nothing)

    def take(self, cut: Cut) -> Tensor | None:
        """Return the sum over a step with this ``cut``, 0-dim float64, the same on all ranks; None if not measured.

        It is added up rank by rank; with ``numerics=bitwise`` that is the order of the micro-batches.
        """
        if not self._by_pass:
            return None
        own, self._by_pass = torch.stack(self._by_pass), []
        everyone = own
        if self._world.size > 1:
            everyone = own.new_empty(self._world.size * len(own))
            dist.all_gather_single(everyone, own)
        rows = everyone.view(self._world.size, -1)
        filled = [sum(start < stop for start, stop in cut.passes(rank)) for rank in range(self._world.size)]
        return torch.cat([row[:count] for row, count in zip(rows, filled, strict=True)]).sum()
