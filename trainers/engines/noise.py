"""Measure gradients of micro-batches or of a step's halves, from which the noise scale follows (scaling/noise.py)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from isobatch.scaling.geometry import Cut
from isobatch.scaling.noise import Norm
from isobatch.trainers.engines.metric import weighing_of
from isobatch.trainers.engines.reducer import Reducer
from isobatch.trainers.ranks.world import World, real_view


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


class Compared(NamedTuple):
    """Hold |G|² and tr Σ of two halves, float64 [2], in the square of the reduced gradient's unit, and their norm."""

    values: Tensor
    norm: Norm


@torch.no_grad()
def compare(reducer: Reducer, first: Sequence[Tensor], sizes: tuple[int, int]) -> Compared | None:
    """Return the estimates from the gradients of two halves; None before the optimizer's first step.

    Of the halves' mean gradients g₁ and g₂ of b₁ and b₂ samples, B = b₁ + b₂, in the optimizer's norm (metric.py):

        |G|² = ⟨g₁, g₂⟩,     tr Σ = (b₁b₂/B) |g₁ − g₂|².

    All ranks call it.

    Args:
        first: this rank's parts of the first half's gradient, b₁g₁/B; ``reducer`` has those of the second half.
        sizes: b₁ and b₂.
    """
    if (weighing := weighing_of(reducer)) is None:
        return None
    share, rest = (size / sum(sizes) for size in sizes)
    rows = []
    for one, other, weigh in zip(first, reducer.gradients(), weighing.each, strict=True):
        one, other = wide(one), wide(other)
        apart = one / share - other / rest
        rows.append(torch.stack((dot(one, weigh(other)), dot(apart, weigh(apart)))))
    cross, square = reducer.total_of(torch.stack(rows, 1)).unbind()
    return Compared(torch.stack((cross / (share * rest), square * (sizes[0] * rest))), weighing.norm)


def wide(gradient: Tensor) -> Tensor:
    """Return a gradient as real numbers of at least 32 bits."""
    plain = real_view(gradient)
    return plain.float() if plain.dtype.itemsize < 4 else plain


def dot(one: Tensor, other: Tensor) -> Tensor:
    """Return the sum of the products of elements, 0-dim float64."""
    return torch.dot(one.reshape(-1), other.reshape(-1)).double()
