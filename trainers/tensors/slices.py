"""Write a rank's part of a checkpoint, and read any range of any tensor on any number of ranks."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from isobatch.trainers.tensors.manifest import Checkpoint
from isobatch.trainers.tensors.names import file_of
from isobatch.trainers.tensors.tensorfile import CHUNK_BYTES, TORCH_NAMES, Damaged, Entry, entries, header_text

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, torch_name) for name, torch_name in TORCH_NAMES.items()}
"""torch dtypes by their names in safetensors."""

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtype and shape by name."""

EVAL = "eval"  # name prefix of the weights that an optimizer evaluates, if it steps other ones

_NAMES = {dtype: name for name, dtype in DTYPES.items()}

SYNC_BYTES = 256 << 20  # written between two fsyncs, so that heartbeats mean progress on the disk

OPEN_FILES = 100  # most files open at a time, since thousands of ranks may have written one each


class Slice(NamedTuple):
    """A range of a flattened tensor.

    Attributes:
        name, shape: of the whole tensor.
        start: index of its first element in the flattened tensor.
        data: the elements, 1-D and contiguous.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    data: Tensor


def write_part(folder: Path, rank: int, slices: Iterable[Slice], beat: Callable[[], None]) -> dict[str, Any]:
    """Write this rank's slices to its file in ``folder``.

    safetensors' own functions first copy everything into one buffer, and hold the GIL, which training needs. The file
    format is simple: the length of a JSON header in 8 bytes, the header, the bytes of all tensors.

    Args:
        slices: slices on the CPU, at most one per tensor.
        beat: called every few MB.

    Returns:
        This rank's argument for ``compose``, as JSON.

    Raises:
        OSError: the disk is full or gone.
        TypeError: safetensors doesn't have the dtype.
    """
    pieces = sorted(slices, key=lambda piece: -piece.data.element_size())
    dtypes = {piece.name: name_of(piece.data.dtype, piece.name) for piece in pieces}
    header = header_text([(p.name, dtypes[p.name], (p.data.numel(),)) for p in pieces if p.data.numel()])
    digest, unsynced = hashlib.sha256(), 0
    with open(folder / file_of(rank), "wb") as file:
        for whole in (memoryview(header), *(_bytes(piece.data) for piece in pieces)):
            for begin in range(0, len(whole), CHUNK_BYTES):
                chunk = whole[begin : begin + CHUNK_BYTES]
                file.write(chunk)
                digest.update(chunk)
                unsynced += len(chunk)
                if unsynced >= SYNC_BYTES:
                    _flush(file)
                    unsynced = 0
                beat()
        _flush(file)
    found = {p.name: [dtypes[p.name], list(p.shape), p.start, p.start + p.data.numel()] for p in pieces}
    length = len(header) + sum(piece.data.nbytes for piece in pieces)
    return {"bytes": length, "sha256": digest.hexdigest(), "slices": found}


def name_of(dtype: torch.dtype, tensor: str) -> str:
    """Return the name in safetensors of the dtype of ``tensor``. Raises TypeError if safetensors doesn't have it."""
    if dtype not in _NAMES:
        raise TypeError(f"{tensor} is {dtype}, which safetensors can't store")
    return _NAMES[dtype]


def write_whole(path: Path, layout: Layout, tensors: Iterable[Tensor]) -> None:
    """Write whole tensors one after another, with only one of them in memory at a time.

    Args:
        layout: dtype and shape by name, in the order of ``tensors``, larger elements first.

    Raises:
        OSError: the disk is full or gone.
        TypeError: safetensors doesn't have the dtype.
    """
    with open(path, "wb") as file:
        kinds = [(name, name_of(dtype, name), shape) for name, (dtype, shape) in layout.items()]
        file.write(header_text(kinds, format="pt"))
        for (dtype, _), tensor in zip(layout.values(), tensors, strict=False):
            plain = tensor.detach().to("cpu", dtype).contiguous().reshape(-1)
            file.write(_bytes(plain))
        _flush(file)


def _bytes(data: Tensor) -> memoryview:
    """Return the tensor's own memory."""
    return memoryview(data.view(torch.uint8).numpy())  # type: ignore[arg-type]


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


class Reader:
    """Read ranges of tensors from a verified checkpoint, calling ``beat`` every few MB."""

    def __init__(self, checkpoint: Checkpoint, beat: Callable[[], None] = lambda: None) -> None:
        self._path, self._beat = checkpoint.path, beat
        self.tensors, self.values = checkpoint.tensors, checkpoint.values
        self._headers: dict[str, dict[str, Entry]] = {}
        self._open: dict[str, BinaryIO] = {}

    def __call__(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return elements [start, stop) of the flattened tensor ``name``, 1-D on the CPU.

        Raises:
            KeyError: there is no such tensor.
            Damaged: its file has changed since it was verified.
        """
        stored = self.tensors[name]
        stop = stored.numel if stop is None else stop
        assert 0 <= start <= stop <= stored.numel, (name, start, stop)
        result = torch.empty(stop - start, dtype=DTYPES[stored.dtype])
        for file, first, last in stored.slices:
            begin, end = max(start, first), min(stop, last)
            if begin < end:
                self._fill(result[begin - start : end - start], file, name, begin - first)
        return result

    def whole(self, name: str) -> Tensor:
        """Return the whole tensor ``name`` in its shape."""
        return self(name).reshape(self.tensors[name].shape)

    def _fill(self, result: Tensor, name: str, tensor: str, skip: int) -> None:
        """Read into ``result`` the elements of the slice of ``tensor`` in file ``name``, starting at ``skip``."""
        file = self._opened(name)
        file.seek(self._headers[name][tensor].offset + skip * result.element_size())
        whole = _bytes(result)
        for begin in range(0, len(whole), CHUNK_BYTES):
            chunk = whole[begin : begin + CHUNK_BYTES]
            if file.readinto(chunk) != len(chunk):  # type: ignore[attr-defined]
                raise Damaged(f"{name} is shorter than when it was verified")
            self._beat()

    def _opened(self, name: str) -> BinaryIO:
        if name not in self._open:
            if len(self._open) == OPEN_FILES:
                self._open.pop(next(iter(self._open))).close()
            self._open[name] = open(self._path / name, "rb")  # noqa: SIM115
            if name not in self._headers:
                self._headers[name] = entries(self._open[name], name)
        return self._open[name]
