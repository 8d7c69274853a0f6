"""Count the bytes of all tensors that operations make, also of fake ones, which have a size and no memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from isobatch.trainers.ranks.internals import TorchDispatchMode, tree_leaves

CUDA_BLOCK = 512  # bytes that the allocator of CUDA rounds each tensor up to


class Storages(TorchDispatchMode):
    """Track the storages that are alive, within its context.

    It sees what operations return, and so neither what they need inside, nor an allocator's unused memory. A number
    that is read from a tensor is 1, since a fake tensor has none.

    Args:
        block: bytes that each storage is rounded up to.

    Attributes:
        now: bytes of the storages that are alive.
        peak: the largest value of ``now`` since the last ``reset_peak``.
    """

    def __init__(self, block: int = 1) -> None:
        super().__init__()
        self._block = block
        self._sizes: dict[weakref.ref[Any], int] = {}
        self.now = self.peak = 0

    def add(self, tensors: Iterable[Tensor]) -> int:
        """Track tensors that were made outside of this context; return the bytes of those that are new."""
        before = self.now
        for tensor in tensors:
            self._track(tensor)
        return self.now - before

    def reset_peak(self) -> None:
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() == "aten::_local_scalar_dense":  # a number is read
            return 1.0 if args[0].dtype.is_floating_point else 1
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._track(value)
        self.peak = max(self.peak, self.now)
        return result

    def _track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = weakref.ref(storage, self._forget)
        if key in self._sizes:
            return
        self._sizes[key] = size = -(-storage.nbytes() // self._block) * self._block
        self.now += size

    def _forget(self, key: weakref.ref[Any]) -> None:
        self.now -= self._sizes.pop(key, 0)


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in nested containers."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of distinct storages of ``tensors``."""
    sizes = {id(storage): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(sizes.values())
