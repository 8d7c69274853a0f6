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
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate, chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from isobatch.conf.schema import RunConfig
from isobatch.scaling.errors import UserError
from isobatch.scaling.geometry import Cut
from isobatch.trainers.engines.reducer import Parts, Reducer, Storage
from isobatch.trainers.engines.step_report import Number
from isobatch.trainers.engines.tree import Growing, Node, dealt, over_ranks
from isobatch.trainers.model.batchnorm import Counting
from isobatch.trainers.ranks.world import World

BOUNDARY = 512  # bytes: of torch's allocators, that of CUDA


class Bitwise(Reducer):
    """Gradients are sums over micro-batches, by a tree; the engine ``ddp`` where numerics are bitwise.

    Raises:
        UserError: an operation has no deterministic implementation; after a step: the forward moved a buffer.
    """

    def __init__(self, parts: Parts, config: RunConfig) -> None:
        model, self._world = parts.model, parts.world
        model.to(self._world.device)
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False  # it chooses by the clock, among algorithms that round otherwise
        for tensor in chain(model.parameters(), model.buffers()):
            self._world.share(tensor.data)  # the same on all ranks, as DDP makes them
        super().__init__(parts, parts.make_optimizer())
        self.shares_buffers = True  # they are the same on all ranks, or the run is refused
        self._buffers = Buffers(model, self._world)
        self.storage = Storage(model, self._buffers.remember)
        self._summed: list[Any] = [*parts.riders.parameters, *self.parameters]
        self._tree, self._passes = Growing(), 0
        self._sheets: list[Sheet] = []
        self._wishes = torch.zeros_like(self._summed[0])  # of a rank that has no leaf for them to go with

    def micro(self, cut: Cut, last: bool) -> AbstractContextManager[Any]:
        assert cut.pieces
        self._cut, self._leaves = cut, cut.pieces
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        block = self._cut.block(self._world.rank)
        if self._passes < len(block):
            sums = Sums(torch.zeros_like(t) if t.grad is None else t.grad for t in self._summed)
            self._tree.add(block[self._passes], sums, self._leaves)
            self._passes += 1
        else:  # a stand-in: it has wishes alone, whole numbers, which may be added in any order
            wishes = self._tree.sums[-1][1][0] if self._tree.sums else self._wishes
            wishes += self._summed[0].grad
        for tensor in self._summed:
            tensor.grad = None

    def reduce(self) -> Number:
        held, mine = dealt(self._cut), [sums for _, sums in self._tree.sums]
        assert [node for node, _ in self._tree.sums] == [*held[self._world.rank]]
        moved = self._buffers.moved()
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
            raise self._buffers.error(moved)
        return self.norm()

    def _over_ranks(self, mine: Sequence[Sums], held: Sequence[Sequence[Node]]) -> Sequence[Tensor]:
        """Return the root of the tree, in the first sheet."""
        while len(self._sheets) < max(1, len(mine)):
            self._sheets.append(Sheet(self._summed, self._world.size))
        for sheet, sums in zip(self._sheets, mine, strict=False):
            torch._foreach_copy_(sheet.views, sums)
        for index, flat in enumerate(self._sheets[0].flats):
            over_ranks([sheet.flats[index] for sheet in self._sheets[: len(mine)]], held, self._leaves, flat)
        return self._sheets[0].views

    def explain(self, text: str) -> UserError | None:
        if "does not have a deterministic implementation" in text:
            problem = f"numerics=bitwise: {text.partition(',')[0]}"
            return UserError(problem, "leave it out, or use numerics=fast", key="numerics", value="bitwise")
        return super().explain(text)


make_reducer = Bitwise


class Buffers:
    """Buffers of a model that nobody brings together over ranks: a forward may not move them."""

    def __init__(self, model: nn.Module, world: World) -> None:
        self._world = world
        modules = model.named_modules()  # but those whose buffers are brought together over ranks
        self._layers = [(name, module) for name, module in modules if not isinstance(module, Counting)]
        self.remember()

    def remember(self) -> None:
        """Take what they are now for what they have to be."""
        self._first = {name: buffer.clone() for name, buffer in self._named()}
        self._seen: dict[str, tuple[Tensor, int]] = {}  # with the versions in which they were looked at

    def moved(self) -> list[str]:
        """Return those that have moved; values are compared where one was made anew or written to."""
        moved = []
        for name, buffer in self._named():
            before, version = self._seen.get(name, (None, 0))
            if buffer is before and buffer._version == version:
                continue
            if not _same(buffer, self._first.get(name)):
                moved.append(name)
            self._seen[name] = buffer, buffer._version
        return moved

    def error(self, moved: list[str]) -> UserError:
        """Return what to say where some rank has ``moved`` any; called by all ranks."""
        said = next(filter(None, self._world.gather(", ".join(moved[:3]))))  # a rank without samples moves none
        problem = (
            f"numerics=bitwise: the model's forward moves its buffer {said}, on each rank by what that rank has seen, "
            "so it isn't the same on any number of processes, and only BatchNorm's statistics are brought together"
        )
        return UserError(problem, "use numerics=fast, or a model that doesn't", "numerics", "bitwise")

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for prefix, layer in self._layers:
            yield from layer.named_buffers(prefix, recurse=False)


class Sums(list[Tensor]):
    """The gradients of all that is summed, one by one."""

    def add_(self, other: Sums) -> None:
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
