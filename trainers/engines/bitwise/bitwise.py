"""``numerics=bitwise``: the same weights, bit by bit, on any number of processes of one machine type.

The argument, link by link:

- The step's micro-batches follow from the global and the per-GPU batch alone, and so does what is random in them.
- Each one's gradient is computed from zero, from the same numbers, by the same deterministic code on as many threads.
- They are summed by a tree that knows nothing of ranks (tree.py, with the argument); and with them the notes and what
  BatchNorm found. What is measured of the gradient's noise is summed in the order of the micro-batches.
- From there on all ranks compute the same from the same: norm, clipping, optimizer, average, running statistics. A
  gradient even lies as it would by itself, on a boundary of the allocator, for code that looks at addresses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import accumulate, chain
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from isobatch.scaling.errors import UserError
from isobatch.scaling.geometry import Cut
from isobatch.scaling.rules import Recipe
from isobatch.trainers.engines.base import Base
from isobatch.trainers.engines.bitwise.tree import Growing, Node, dealt, over_ranks
from isobatch.trainers.engines.engine import Parts, Update
from isobatch.trainers.engines.step_report import Note, Number, Total
from isobatch.trainers.model.batchnorm import Counting
from isobatch.trainers.tensors.slices import Reader

BOUNDARY = 512  # bytes: of torch's allocators, that of CUDA


class Bitwise(Base):
    """The engine ``ddp`` where numerics are bitwise.

    Raises:
        UserError: an operation has no deterministic implementation; after a step: the forward moved a buffer.
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self._shares_buffers = False  # they are the same on all ranks, or the run is refused
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False  # it chooses by the clock, among algorithms that round otherwise
        for tensor in chain(parts.model.parameters(), parts.model.buffers()):
            parts.world.share(tensor.data)  # the same on all ranks, as DDP makes them
        self._begin(parts.make_optimizer())
        self._summed = [*self._riders, *self._parameters]
        self._tree, self._passes = Growing[Gradients](), 0
        self._sheets: list[Sheet] = []
        self._wishes = torch.zeros_like(self._carrier.note)  # of a rank that has no leaf for them to go with
        self._squares_by_pass: list[Tensor] = []
        self._nothing = torch.zeros((), dtype=torch.float64, device=self._device)
        modules = self.model.named_modules()  # but those whose buffers are brought together over ranks
        self._layers = [(name, module) for name, module in modules if not isinstance(module, Counting)]
        self._remember_buffers()

    def micro(self, cut: Cut, last: bool) -> AbstractContextManager[Any]:
        assert cut.pieces
        self._cut, self._leaves = cut, cut.pieces
        return super().micro(cut, last)

    def loss(self, batch: Any | None, samples: int) -> tuple[Tensor, float | Tensor]:
        return super().loss(batch, samples) if samples else (torch.zeros((), device=self._device), 0.0)

    def backward(self, loss: Tensor, note: Note, measured: int | None = None) -> None:
        if loss.requires_grad:
            super().backward(loss, note, measured)
            self._tree.add(self._cut.block(self._world.rank)[self._passes], self._taken(), self._leaves)
            self._passes += 1
        else:  # a stand-in: it has wishes alone, whole numbers, which may be added in any order
            wishes = self._tree.sums[-1][1][0] if self._tree.sums else self._wishes
            wishes += self._carrier.write(note)
        if measured is not None:
            square = self._squares.take(lambda own: own)
            self._squares_by_pass.append(self._nothing if square is None else square)

    def _reworded(self, text: str) -> str | None:
        if "does not have a deterministic implementation" in text:
            return f"numerics=bitwise: {text.partition(',')[0]}; leave it out, or use numerics=fast"
        return super()._reworded(text)

    def _taken(self) -> Gradients:
        """What the backward left."""
        taken = Gradients(torch.zeros_like(t) if t.grad is None else t.grad for t in self._summed)
        for tensor in self._summed:
            tensor.grad = None
        return taken

    def total(self, expected_units: int) -> Total:
        held, mine = dealt(self._cut), [sums for _, sums in self._tree.sums]
        assert [node for node, _ in self._tree.sums] == [*held[self._world.rank]]
        moved = self._moved_buffers()
        count = torch.tensor(len(moved))  # on the CPU everywhere: no look at it waits for a device
        told = dist.all_reduce(count, async_op=True) if self._world.size > 1 else None
        root = mine[0] if self._world.size == 1 else self._over_ranks(mine, held)
        if self._world.size > self._leaves:
            root[0].add_(self._world.sum(self._wishes))
            self._wishes.zero_()
        for tensor, gradient in zip(self._summed, root, strict=True):
            tensor.grad = gradient
        self._tree, self._passes = Growing(), 0
        if told:
            told.wait()
        if count:
            self._refuse(moved)
        return super().total(expected_units)

    def _over_ranks(self, mine: Sequence[Gradients], held: Sequence[Sequence[Node]]) -> Sequence[Tensor]:
        """The root of the tree, in the first sheet."""
        while len(self._sheets) < max(1, len(mine)):
            self._sheets.append(Sheet(self._summed, self._world.size))
        for sheet, gradients in zip(self._sheets, mine, strict=False):
            torch._foreach_copy_(sheet.views, gradients)
        for index, flat in enumerate(self._sheets[0].flats):
            over_ranks([sheet.flats[index] for sheet in self._sheets[: len(mine)]], held, self._leaves, flat)
        return self._sheets[0].views

    def update(self, scale: Number, clip_norm: float | None, recipe: Recipe) -> Update:
        with self._explained:
            return super().update(scale, clip_norm, recipe)

    def _measured_squares(self) -> Tensor | None:
        if not self._squares_by_pass:
            return None
        own, self._squares_by_pass = torch.stack(self._squares_by_pass), []
        everyone = own
        if self._world.size > 1:
            everyone = own.new_empty(self._world.size * len(own))
            dist.all_gather_single(everyone, own)
        rows = everyone.view(self._world.size, -1)
        return torch.cat([row[: len(self._cut.block(rank))] for rank, row in enumerate(rows)]).sum()

    def restore(self, reader: Reader) -> None:
        super().restore(reader)
        self._remember_buffers()

    def _remember_buffers(self) -> None:
        self._buffers_first = {name: buffer.clone() for name, buffer in self._own_buffers()}
        self._buffers_seen: dict[str, tuple[Tensor, int]] = {}  # with the versions in which they were looked at

    def _moved_buffers(self) -> list[str]:
        """Those that aren't what they were at the start; values are compared where one was made anew or written to."""
        moved = []
        for name, buffer in self._own_buffers():
            before, version = self._buffers_seen.get(name, (None, 0))
            if buffer is before and buffer._version == version:
                continue
            if not _same(buffer, self._buffers_first.get(name)):
                moved.append(name)
            self._buffers_seen[name] = buffer, buffer._version
        return moved

    def _refuse(self, moved: list[str]) -> NoReturn:
        said = next(filter(None, self._world.gather(", ".join(moved[:3]))))  # a rank without samples moves none
        raise UserError(
            f"numerics=bitwise: the model's forward moves its buffer {said}, on each rank by what that rank "
            "has seen, so it isn't the same on any number of processes; only BatchNorm's statistics are "
            "brought together. Use numerics=fast, or a model that doesn't"
        )

    def _own_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Buffers that nobody here brings together over ranks."""
        for prefix, layer in self._layers:
            for name, buffer in layer._buffers.items():
                if buffer is not None:
                    yield f"{prefix}.{name}" if prefix else name, buffer


class Gradients(list[Tensor]):
    """Those of all that is summed, one by one."""

    def add_(self, other: Gradients) -> None:
        torch._foreach_add_(self, other)


class Sheet:
    """Room for the gradients of ``tensors``: those of one dtype one after another, each in the order of its own memory.

    Args:
        ranks: each flat tensor's length is a multiple of them.

    Attributes:
        flats: 1-D, one for each dtype.
        views: of them, like ``tensors``, and in their order.
    """

    def __init__(self, tensors: Sequence[Tensor], ranks: int) -> None:
        self.flats, views = list[Tensor](), dict[int, Tensor]()
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            alike = [tensor for tensor in tensors if tensor.dtype == dtype]
            step = BOUNDARY // dtype.itemsize
            *starts, size = accumulate((-(-tensor.numel() // step) * step for tensor in alike), initial=0)
            flat = torch.zeros(-(-size // ranks) * ranks, dtype=dtype, device=tensors[0].device)
            for tensor, start in zip(alike, starts, strict=True):
                strides = torch.empty_like(tensor, device="meta").stride()  # which fused optimizers take for granted
                views[id(tensor)] = flat.as_strided(tensor.shape, strides, start)
            self.flats.append(flat)
        self.views = [views[id(tensor)] for tensor in tensors]


def _same(tensor: Tensor, before: Tensor | None) -> bool:
    if before is None or tensor.shape != before.shape:
        return False
    return bool(((tensor == before) | (tensor.isnan() & before.isnan())).all())
