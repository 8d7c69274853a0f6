"""Handle sharded tensors (DTensors sharded by their first dimension, and Parts) and plain tensors alike."""

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
    """This rank's range of a flattened tensor. The ranges of all ranks cover every element exactly once.

    Attributes:
        shape: shape of the whole tensor.
        start: index of the first element in the flattened tensor.
        data: the elements, 1-D.
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
        """Return the whole tensor, bit for bit, since only one rank has each element. A collective."""
        whole = torch.zeros(self.numel(), dtype=self.dtype, device=self.data.device)
        whole[slice(*self.span)] = self.data
        if dist.get_world_size() > 1:
            dist.all_reduce(whole.view(torch.uint8))
        return whole.view(self.shape)


def sharded(tensor: Any) -> bool:
    """Return whether ``tensor`` is a DTensor or a Part."""
    return hasattr(tensor, "to_local")


def local(tensor: Any) -> Tensor:
    """Return this rank's part of a sharded tensor, sharing its memory, without a gradient. Return a plain one as is."""
    if not sharded(tensor):
        return cast(Tensor, tensor)
    with torch.no_grad():
        return cast(Tensor, tensor.to_local())


def copied(tensor: Any, dtype: torch.dtype | None = None) -> Any:
    """Copy this rank's part of ``tensor``, keeping its kind, and its dtype unless ``dtype`` is given."""
    if isinstance(tensor, Part):
        return Part(tensor.shape, tensor.start, tensor.data.to(dtype or tensor.dtype, copy=True))
    return tensor.detach().to(dtype or tensor.dtype, copy=True)


def gathered(tensor: Any) -> Tensor:
    """Return the whole tensor on all ranks. A collective."""
    return cast(Tensor, tensor.detach().full_tensor() if sharded(tensor) else tensor.detach())


def in_one_part(tensor: Any) -> bool:
    """Return whether each rank's part is one range of the flattened tensor, as checkpoints require."""
    return not sharded(tensor) or isinstance(tensor, Part) or all(place.is_shard(0) for place in tensor.placements)


def keep(tensor: Any, whole: Tensor) -> None:
    """Set this rank's part of ``tensor`` from the tensor ``whole``."""
    part = local(tensor)
    with torch.no_grad():
        part.copy_(whole.detach().reshape(-1)[slice(*range_of(tensor))].view(part.shape))


def range_of(tensor: Any) -> tuple[int, int]:
    """Return the range [start, stop) of the flattened tensor that this rank holds."""
    if not sharded(tensor):
        return 0, tensor.numel()
    if isinstance(tensor, Part):
        return tensor.span
    (placement,) = tensor.placements
    assert placement.is_shard(0), f"{placement}: parts have to be contiguous"
    # rows are split the way torch.chunk does it
    ranks, rank = tensor.device_mesh.size(), tensor.device_mesh.get_local_rank()
    row, rows = math.prod(tensor.shape[1:]), -(-len(tensor) // ranks)
    start = min(rank * rows, len(tensor)) * row
    return start, start + local(tensor).numel()


def slices_of(tensors: Mapping[str, Tensor], rank: int, ranks: int) -> Iterator[Slice]:
    """Yield the slices that this rank saves: its parts of sharded tensors, and its share of the plain ones."""
    for name, tensor in tensors.items():
        if sharded(tensor):
            start, stop = range_of(tensor)
            if start < stop or (tensor.numel() == 0 and rank == 0):
                yield Slice(name, tuple(tensor.shape), start, local(tensor).reshape(-1))
    yield from share_of({name: tensor for name, tensor in tensors.items() if not sharded(tensor)}, rank, ranks)


def share_of(tensors: Mapping[str, Tensor], rank: int, ranks: int) -> Iterator[Slice]:
    """Yield a rank's share of tensors that all ranks hold whole. Concatenated, they are split evenly by bytes."""
    total, end = sum(tensor.nbytes for tensor in tensors.values()), 0
    first, last = (total * bound // ranks for bound in (rank, rank + 1))
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        # an element belongs to the rank whose share contains its first byte
        size, count = tensor.element_size(), tensor.numel()
        start, stop = (min(count, max(0, -((begin - bound) // size))) for bound in (first, last))
        if start < stop or (tensor.numel() == 0 and rank == 0):
            yield Slice(name, tuple(tensor.shape), start, tensor.detach().reshape(-1)[start:stop])


def fill(tensor: Tensor, reader: Reader, name: str) -> None:
    """Set this rank's part of ``tensor`` from the tensor ``name`` of a checkpoint, reading only that part."""
    part = local(tensor)
    part.copy_(reader(name, *range_of(tensor)).view(part.shape))


def read_like(parameter: Tensor, reader: Reader, name: str, device: torch.device) -> Tensor:
    """Read the tensor ``name`` of a checkpoint to ``device``, sharded like ``parameter`` if the shapes are equal."""
    stored = reader.tensors[name]
    if stored.shape != parameter.shape:
        return reader.whole(name).to(device)
    # fused kernels need the parameter's strides, too
    value = torch.empty_like(parameter, dtype=DTYPES[stored.dtype], requires_grad=False)
    fill(value, reader, name)
    return value.to(device)
