"""``numerics=bitwise``: the same weights, bit by bit, on any number of processes of one machine type.

The step's micro-batches follow from the global and the per-GPU batch alone. Each one's gradient is computed from zero,
from the same numbers, by the same deterministic code on as many threads; they are summed by a tree that knows nothing
of ranks (tree.py, with the argument). From there on all ranks compute the same from the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from scaling.geometry import Cut
from scaling.rules import Recipe
from trainers.batchnorm import Counting
from trainers.engines import Parts, Update
from trainers.engines.base import Base
from trainers.engines.tree import Growing, nodes_in, over_ranks
from trainers.rundir import Refused
from trainers.tally import Note, Number, Total


class Bitwise(Base):
    """The engine ``ddp`` where numerics are bitwise.

    Raises:
        Refused: an operation has no deterministic implementation; after the first step: a buffer was moved.
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        torch.use_deterministic_algorithms(True)
        for tensor in chain(parts.model.parameters(), parts.model.buffers()):
            parts.world.share(tensor.data)  # the same on all ranks, as DDP makes them
        self._begin(parts.make_optimizer())
        riders = [self._carrier.note, *([self._statistics.sums] if self._statistics else [])]
        self._summed: dict[torch.dtype, list[Tensor]] = {}
        for tensor in (*riders, *self._parameters):
            self._summed.setdefault(tensor.dtype, []).append(tensor)
        self._tree, self._passes = Growing(), 0
        self._apart = torch.zeros_like(self._carrier.note)  # notes of passes without samples, which are no leaves
        self._buffers_first = {name: buffer.clone() for name, buffer in self._own_buffers()}

    def micro(self, cut: Cut, last: bool) -> AbstractContextManager[Any]:
        assert cut.pieces
        self._cut, self._leaves = cut, cut.pieces
        return super().micro(cut, last)

    def loss(self, batch: Any | None, samples: int) -> tuple[Tensor, float | Tensor]:
        return super().loss(batch, samples) if samples else (torch.zeros((), device=self._device), 0.0)

    def backward(self, loss: Tensor, note: Note, measured: int | None = None) -> None:
        if not loss.requires_grad:  # a stand-in
            self._apart += self._carrier.write(note)
            if measured is not None:
                with self._squares.of(0):
                    pass
            return
        super().backward(loss, note, measured)
        self._tree.add(self._cut.block(self._world.rank)[self._passes], self._taken(), self._leaves)
        self._passes += 1

    def _taken(self) -> list[Tensor]:
        """The gradients of a pass, those of a dtype laid end to end."""
        taken = []
        for tensors in self._summed.values():
            taken.append(torch.cat([_gradient(tensor).reshape(-1) for tensor in tensors]))
            for tensor in tensors:
                tensor.grad = None
        return taken

    def total(self, expected_units: int) -> Total:
        held = [list(nodes_in(self._cut.block(rank), (0, self._leaves))) for rank in range(self._cut.world)]
        assert [node for node, _ in self._tree.sums] == held[self._world.rank]
        for index, (dtype, tensors) in enumerate(self._summed.items()):
            mine = [sums[index] for _, sums in self._tree.sums]
            like = torch.empty(sum(tensor.numel() for tensor in tensors), dtype=dtype, device=self._device)
            noted = self._apart if index == 0 else self._apart[:0].to(dtype)
            root, said = over_ranks(mine, held, self._leaves, like, noted)
            for tensor, part in zip(tensors, root.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.grad = part.view(tensor.shape)
            if index == 0:
                _gradient(self._carrier.note).add_(said.sum(0))  # wishes alone: whole numbers, in any order
        self._tree, self._passes = Growing(), 0
        self._apart.zero_()
        return super().total(expected_units)

    def update(self, scale: Number, clip_norm: float | None, recipe: Recipe) -> Update:
        if not self._stepped:
            self._refuse_moved_buffers()
        return super().update(scale, clip_norm, recipe)

    def _refuse_moved_buffers(self) -> None:
        for name, buffer in self._own_buffers():
            if not torch.equal(buffer, self._buffers_first[name]):
                raise Refused(
                    f"numerics=bitwise: the model's forward moves its buffer {name}, on each rank by what that rank "
                    "has seen, so it isn't the same on any number of processes; only BatchNorm's statistics are "
                    "brought together. Use numerics=fast, or a model that doesn't"
                )
        self._buffers_first.clear()

    def _own_buffers(self) -> Iterable[tuple[str, Tensor]]:
        """Buffers that nobody here brings together over ranks."""
        layers = (layer for layer in self.model.modules() if isinstance(layer, Counting))
        moved = {id(buffer) for layer in layers for buffer in layer.buffers()}
        return ((name, buffer) for name, buffer in self.model.named_buffers() if id(buffer) not in moved)


def _gradient(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
