"""Write a rank's part of a checkpoint to a file, and read any range of any tensor back, on any number of ranks."""

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

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, its) for name, its in TORCH_NAMES.items()}
"""torch's dtypes by safetensors' names."""

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtype and shape by name."""

EVAL = "eval"  # of the names of weights that an optimizer evaluates, where it steps others

_NAMES = {dtype: name for name, dtype in DTYPES.items()}

SYNC_BYTES = 256 << 20  # written between two waits for the disk, so that what counts as progress is on it

OPEN_FILES = 100  # at a time; a thousand ranks may have written one each


class Slice(NamedTuple):
    """A range of a flattened tensor.

    Attributes:
        name, shape: of the whole tensor.
        start: its first element's place in the flattened tensor.
        data: 1-D, contiguous.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    data: Tensor


def write_part(folder: Path, rank: int, slices: Iterable[Slice], beat: Callable[[], None]) -> dict[str, Any]:
    """Write this rank's slices, on the CPU and at most one of a tensor, to its file in ``folder``.

    safetensors' own functions first copy everything into one buffer, and hold the GIL while the training needs it. The
    format is simple enough: the length of a JSON header in 8 bytes, the header, the bytes of all tensors.

    Args:
        beat: called every few MB.

    Returns:
        What ``compose`` needs of each rank, as JSON.

    Raises:
        OSError: the disk is full, or gone.
        TypeError: a dtype that safetensors doesn't have.
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
    """Return safetensors' name of the dtype of ``tensor``. Raises TypeError where safetensors has none."""
    if dtype not in _NAMES:
        raise TypeError(f"{tensor} is {dtype}, which a checkpoint can't hold")
    return _NAMES[dtype]


def write_whole(path: Path, layout: Layout, tensors: Iterable[Tensor]) -> None:
    """Write whole tensors, one after another, so that no more than one of them is needed at a time.

    Args:
        layout: their names, dtypes and shapes, in the order of ``tensors``, the larger elements first.

    Raises:
        OSError: the disk is full, or gone.
        TypeError: a dtype that safetensors doesn't have.
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
    """The tensors and values of a verified checkpoint; only what is asked for is read, ``beat`` called every few MB."""

    def __init__(self, checkpoint: Checkpoint, beat: Callable[[], None] = lambda: None) -> None:
        self._path, self._beat = checkpoint.path, beat
        self.tensors, self.values = checkpoint.tensors, checkpoint.values
        self._headers: dict[str, dict[str, Entry]] = {}
        self._open: dict[str, BinaryIO] = {}

    def __call__(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return elements [start, stop) of the flattened tensor, 1-D on the CPU.

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
        """Return the tensor in its shape."""
        return self(name).reshape(self.tensors[name].shape)

    def _fill(self, result: Tensor, name: str, tensor: str, skip: int) -> None:
        """Read the elements from ``skip`` on of a file's slice of ``tensor``."""
        file = self._opened(name)
        file.seek(self._headers[name][tensor].offset + skip * result.element_size())
        whole = _bytes(result)
        for begin in range(0, len(whole), CHUNK_BYTES):
            chunk = whole[begin : begin + CHUNK_BYTES]
            if file.readinto(chunk) != len(chunk):  # type: ignore[attr-defined]
                raise Damaged(f"{name} is shorter than it was")
            self._beat()

    def _opened(self, name: str) -> BinaryIO:
        if name not in self._open:
            if len(self._open) == OPEN_FILES:
                self._open.pop(next(iter(self._open))).close()
            self._open[name] = open(self._path / name, "rb")  # noqa: SIM115
            if name not in self._headers:
                self._headers[name] = entries(self._open[name], name)
        return self._open[name]
