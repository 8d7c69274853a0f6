"""``numerics=bitwise``: the same weights, bit by bit, on any number of processes of one machine type.

The argument, step by step:

- The step's micro-batches and their random numbers follow from the global and the per-GPU batch alone.
- Each micro-batch's gradient is computed from zero, from the same inputs, by the same deterministic code, on the same
  number of threads.
- The gradients, the notes and BatchNorm's statistics are summed by a tree that doesn't depend on ranks (tree.py). The
  measurements of the noise scale are summed in the order of the micro-batches.
- All ranks compute everything else from the same inputs: norm, clipping, optimizer, average, running statistics. Each
  gradient is aligned as if allocated by itself, for kernels that depend on the address.
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
from isobatch.trainers.engines.tree import Growing, Node, nodes_by_rank, sum_over_ranks
from isobatch.trainers.model.batchnorm import Counting
from isobatch.trainers.ranks.internals import foreach_add_, foreach_copy_
from isobatch.trainers.ranks.world import World

BOUNDARY = 512  # bytes: the alignment of torch's CUDA allocator, the largest


class Bitwise(Reducer):
    """Sum gradients over micro-batches with a tree; the reducer of ``engine=ddp`` with ``numerics=bitwise``.

    Raises:
        UserError: an operation has no deterministic implementation, or, after a step, the forward changed a buffer.
    """

    def __init__(self, parts: Parts, config: RunConfig) -> None:
        model, self._world = parts.model, parts.world
        model.to(self._world.device)
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False  # its timings choose among algorithms that round differently
        for tensor in chain(model.parameters(), model.buffers()):
            self._world.share(tensor.data)  # from rank 0, as DDP does
        super().__init__(parts, parts.make_optimizer())
        self.shares_buffers = True  # buffers that differ between ranks are rejected
        self._buffers = Buffers(model, self._world)
        self.storage = Storage(model, self._buffers.remember)
        self._summed: list[Any] = [*parts.riders.parameters, *self.parameters]
        self._tree, self._passes = Growing(), 0
        self._sheets: list[Sheet] = []
        self._requests = torch.zeros_like(self._summed[0])  # to stop or save, of a rank without leaves

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
        else:  # a stand-in has only requests to stop or save: integers, exact in any order of addition
            requests = self._tree.sums[-1][1][0] if self._tree.sums else self._requests
            requests += self._summed[0].grad
        for tensor in self._summed:
            tensor.grad = None

    def reduce(self) -> Number:
        by_rank, own = nodes_by_rank(self._cut), [sums for _, sums in self._tree.sums]
        assert [node for node, _ in self._tree.sums] == [*by_rank[self._world.rank]]
        moved = self._buffers.moved()
        count = torch.tensor(len(moved))  # on the CPU always, so that reading it doesn't wait for a device
        sent = dist.all_reduce(count, async_op=True) if self._world.size > 1 else None
        root = own[0] if self._world.size == 1 else self._sum_over_ranks(own, by_rank)
        if self._world.size > self._leaves:
            root[0].add_(self._world.sum(self._requests))
            self._requests.zero_()
        for tensor, gradient in zip(self._summed, root, strict=True):
            tensor.grad = gradient
        self._tree, self._passes = Growing(), 0
        if sent:
            sent.wait()
        if count:
            raise self._buffers.error(moved)
        return self.norm()

    def _sum_over_ranks(self, own: Sequence[Sums], by_rank: Sequence[Sequence[Node]]) -> Sequence[Tensor]:
        """Return the root of the tree, in the first sheet."""
        while len(self._sheets) < max(1, len(own)):
            self._sheets.append(Sheet(self._summed, self._world.size))
        for sheet, sums in zip(self._sheets, own, strict=False):
            foreach_copy_(sheet.views, sums)
        for index, flat in enumerate(self._sheets[0].flats):
            sum_over_ranks([sheet.flats[index] for sheet in self._sheets[: len(own)]], by_rank, self._leaves, flat)
        return self._sheets[0].views

    def explain(self, text: str) -> UserError | None:
        if "does not have a deterministic implementation" in text:
            problem = f"numerics=bitwise: {text.partition(',')[0]}"
            return UserError(problem, "replace it, or use numerics=fast", key="numerics", value="bitwise")
        return super().explain(text)


make_reducer = Bitwise


class Buffers:
    """The buffers of a model that aren't reduced over ranks, which a forward may not change."""

    def __init__(self, model: nn.Module, world: World) -> None:
        self._world = world
        modules = model.named_modules()  # the buffers of Counting layers are reduced over ranks
        self._layers = [(name, module) for name, module in modules if not isinstance(module, Counting)]
        self.remember()

    def remember(self) -> None:
        """Record the current values as those that ``moved`` compares with."""
        self._first = {name: buffer.clone() for name, buffer in self._named()}
        self._seen: dict[str, tuple[Tensor, int]] = {}  # the buffers last compared, and their versions

    def moved(self) -> list[str]:
        """Return the names of changed buffers; values are compared only if a buffer was replaced or written to."""
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
        """Return the error for the ``moved`` buffers of any rank; called by all ranks."""
        names = next(filter(None, self._world.gather(", ".join(moved[:3]))))  # a rank without samples moves none
        problem = (
            f"numerics=bitwise: the model's forward moves its buffer {names} by this rank's samples alone, "
            "so it differs between ranks; only BatchNorm's statistics are combined over ranks"
        )
        return UserError(problem, "use numerics=fast, or a model that doesn't", "numerics", "bitwise")

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for prefix, layer in self._layers:
            yield from layer.named_buffers(prefix, recurse=False)


class Sums(list[Tensor]):
    """One gradient for each summed parameter."""

    def add_(self, other: Sums) -> None:
        foreach_add_(self, other)


class Sheet:
    """Flat memory for the gradients of ``tensors``, one flat tensor per dtype.

    Args:
        ranks: each flat tensor's length is padded to a multiple of ``ranks``.

    Attributes:
        flats: the flat tensors, 1-D.
        views: views into the flat tensors with the shapes and strides of ``tensors``, in the same order.
    """

    def __init__(self, tensors: Sequence[Tensor], ranks: int) -> None:
        self.flats, views = list[Tensor](), dict[int, Tensor]()
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            alike = [tensor for tensor in tensors if tensor.dtype == dtype]
            step = BOUNDARY // dtype.itemsize
            *starts, size = accumulate((-(-tensor.numel() // step) * step for tensor in alike), initial=0)
            flat = torch.zeros(-(-size // ranks) * ranks, dtype=dtype, device=tensors[0].device)
            for tensor, start in zip(alike, starts, strict=True):
                strides = torch.empty_like(tensor, device="meta").stride()  # fused optimizers rely on them
                views[id(tensor)] = flat.as_strided(tensor.shape, strides, start)
            self.flats.append(flat)
        self.views = [views[id(tensor)] for tensor in tensors]


def _same(tensor: Tensor, before: Tensor | None) -> bool:
    if before is None or tensor.shape != before.shape:
        return False
    return bool(((tensor == before) | (tensor.isnan() & before.isnan())).all())
