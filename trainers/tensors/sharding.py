"""Tensors of which a rank holds a part: DTensors, sharded by their first dimension, and Parts. Plain ones are whole."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from isobatch.trainers.tensors.slices import DTYPES, Reader, Slice


@dataclass(frozen=True, slots=True)
class Part:
    """What this rank holds of a tensor: a range of it, flattened. The ranks' parts are all of it, once.

    Attributes:
        shape: of the whole tensor.
        start: place of the first element in the flattened tensor.
        data: 1-D.
    """

    shape: tuple[int, ...]
    start: int
    data: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def span(self) -> tuple[int, int]:
        return self.start, self.start + self.data.numel()

    def numel(self) -> int:
        return math.prod(self.shape)

    def detach(self) -> Part:
        return self

    def to_local(self) -> Tensor:
        return self.data

    def full_tensor(self) -> Tensor:
        """The whole tensor on all ranks, which call this alike; bit by bit, since only one of them has an element."""
        whole = torch.zeros(self.numel(), dtype=self.dtype, device=self.data.device)
        whole[slice(*self.span)] = self.data
        if dist.get_world_size() > 1:
            dist.all_reduce(whole.view(torch.uint8))
        return whole.view(self.shape)


def sharded(tensor: Any) -> bool:
    """Return whether it is a DTensor or a Part."""
    return hasattr(tensor, "to_local")


def local(tensor: Any) -> Tensor:
    """This rank's part of a DTensor, in the memory of its own and without a gradient; a plain tensor as it is."""
    if not sharded(tensor):
        return cast(Tensor, tensor)
    with torch.no_grad():
        return cast(Tensor, tensor.to_local())


def copied(tensor: Any, dtype: torch.dtype | None = None) -> Any:
    """Return a copy of what this rank holds of ``tensor``, of its kind; as ``dtype``, or as it is."""
    if isinstance(tensor, Part):
        return Part(tensor.shape, tensor.start, tensor.data.to(dtype or tensor.dtype, copy=True))
    return tensor.detach().to(dtype or tensor.dtype, copy=True)


def gathered(tensor: Any) -> Tensor:
    """Return the tensor on all ranks, which have to call this alike."""
    return cast(Tensor, tensor.detach().full_tensor() if sharded(tensor) else tensor.detach())


def in_one_part(tensor: Any) -> bool:
    """Return whether a rank's part of it is a range of the flattened tensor, as checkpoints have them."""
    return not sharded(tensor) or isinstance(tensor, Part) or all(one.is_shard(0) for one in tensor.placements)


def keep(tensor: Any, whole: Tensor) -> None:
    """Set what this rank holds of ``tensor`` to what ``whole`` has there."""
    part = local(tensor)
    with torch.no_grad():
        part.copy_(whole.detach().reshape(-1)[slice(*range_of(tensor))].view(part.shape))


def range_of(tensor: Any) -> tuple[int, int]:
    """Which elements [start, stop) of the flattened tensor this rank holds."""
    if not sharded(tensor):
        return 0, tensor.numel()
    if isinstance(tensor, Part):
        return tensor.span
    (placement,) = tensor.placements
    assert placement.is_shard(0), f"{placement}: parts have to be contiguous"
    # rows are parted as torch.chunk parts them
    ranks, rank = tensor.device_mesh.size(), tensor.device_mesh.get_local_rank()
    row, rows = math.prod(tensor.shape[1:]), -(-len(tensor) // ranks)
    start = min(rank * rows, len(tensor)) * row
    return start, start + local(tensor).numel()


def slices_of(tensors: Mapping[str, Tensor], rank: int, ranks: int) -> Iterator[Slice]:
    """This rank's part of ``tensors``: what it holds of sharded ones, and its share of the rest."""
    for name, tensor in tensors.items():
        if sharded(tensor):
            start, stop = range_of(tensor)
            if start < stop or (tensor.numel() == 0 and rank == 0):
                yield Slice(name, tuple(tensor.shape), start, local(tensor).reshape(-1))
    yield from share_of({name: tensor for name, tensor in tensors.items() if not sharded(tensor)}, rank, ranks)


def share_of(tensors: Mapping[str, Tensor], rank: int, ranks: int) -> Iterator[Slice]:
    """A rank's part of tensors that all ranks have whole: laid end to end, they are parted equally, by bytes."""
    total, end = sum(tensor.nbytes for tensor in tensors.values()), 0
    first, last = (total * bound // ranks for bound in (rank, rank + 1))
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        # an element belongs to the rank in whose part its first byte lies
        size, count = tensor.element_size(), tensor.numel()
        start, stop = (min(count, max(0, -((begin - bound) // size))) for bound in (first, last))
        if start < stop or (tensor.numel() == 0 and rank == 0):
            yield Slice(name, tuple(tensor.shape), start, tensor.detach().reshape(-1)[start:stop])


def fill(tensor: Tensor, reader: Reader, name: str) -> None:
    """Set what this rank holds of ``tensor`` to what a checkpoint has as ``name``; only that is read."""
    part = local(tensor)
    part.copy_(reader(name, *range_of(tensor)).view(part.shape))


def read_like(parameter: Tensor, reader: Reader, name: str, device: torch.device) -> Tensor:
    """Return what a checkpoint has as ``name``, on ``device``; sharded as ``parameter`` where it has its shape."""
    stored = reader.tensors[name]
    if stored.shape != parameter.shape:
        return reader.whole(name).to(device)
    # the strides, too, are those of the parameter, as fused kernels need them
    value = torch.empty_like(parameter, dtype=DTYPES[stored.dtype], requires_grad=False)
    fill(value, reader, name)
    return value.to(device)
