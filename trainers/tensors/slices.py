"""A rank's part of a checkpoint as a file, and any range of any tensor read back, on any number of ranks."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from isobatch.trainers.tensors.manifest import Checkpoint, Stored, file_of
from isobatch.trainers.tensors.tensorfile import CHUNK_BYTES, Damaged, Entry, entries

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
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

    safetensors' own functions first copy everything into one buffer, and hold the GIL while the training wants it. Its
    format is simple enough: the length of a JSON header in 8 bytes, the header, the bytes of all tensors.

    Args:
        beat: called every few MB.

    Returns:
        What ``compose`` wants of each rank, as JSON.

    Raises:
        OSError: the disk is full, or gone.
        TypeError: a dtype that safetensors doesn't have.
    """
    pieces = sorted(slices, key=lambda piece: -piece.data.element_size())
    heading = heading_of([(p.name, p.data.dtype, (p.data.numel(),)) for p in pieces if p.data.numel()])
    digest, unsynced = hashlib.sha256(), 0
    with open(folder / file_of(rank), "wb") as file:
        for whole in (memoryview(heading), *(_bytes(piece.data) for piece in pieces)):
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
    return {
        "bytes": len(heading) + sum(piece.data.nbytes for piece in pieces),
        "sha256": digest.hexdigest(),
        "slices": {
            piece.name: [_NAMES[piece.data.dtype], list(piece.shape), piece.start, piece.start + piece.data.numel()]
            for piece in pieces
        },
    }


def heading_of(kinds: Sequence[tuple[str, torch.dtype, tuple[int, ...]]], **metadata: str) -> bytes:
    """What a safetensors file begins with: the length of a JSON header, and the header, padded to a multiple of 8.

    Args:
        kinds: name, dtype and shape of each tensor that follows, the larger elements first, so that all are aligned.

    Raises:
        TypeError: a dtype that safetensors doesn't have.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, dtype, shape in kinds:
        if dtype not in _NAMES:
            raise TypeError(f"{name} is {dtype}, which a checkpoint can't hold")
        assert name not in header, f"two slices of {name}"
        span = (end, end := end + math.prod(shape) * dtype.itemsize)
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": span}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_whole(
    path: Path, layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], tensors: Iterable[Tensor]
) -> None:
    """Write whole tensors, one after another, so that no more than one of them is needed at a time.

    Args:
        layout: their names, dtypes and shapes, in the order of ``tensors``, the larger elements first.

    Raises:
        OSError: the disk is full, or gone.
        TypeError: a dtype that safetensors doesn't have.
    """
    with open(path, "wb") as file:
        file.write(heading_of([(name, *kind) for name, kind in layout.items()], format="pt"))
        for (dtype, _), tensor in zip(layout.values(), tensors, strict=False):
            plain = tensor.detach().to("cpu", dtype).contiguous().reshape(-1)
            file.write(_bytes(plain))
        _flush(file)


def _bytes(data: Tensor) -> memoryview:
    """The tensor's own memory."""
    return memoryview(data.view(torch.uint8).numpy())  # type: ignore[arg-type]


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


class Copies:
    """Memory in which a rank's slices wait to be written, while the training changes its own.

    It stays taken from one save to the next: into fresh memory a copy takes ten times as long.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def take(self, slices: Iterable[Slice]) -> tuple[list[Slice], Callable[[], None]]:
        """Copies on the CPU, in the memory of those before; and what waits until they are complete.

        ``slices`` is walked to its end in any case, since ranks may talk to each other in it.

        Raises:
            MemoryError: there isn't enough for them.
        """
        kept, self._kept = self._kept, {}
        copies, accelerated, failed = [], False, ""
        for piece in slices:
            accelerated |= not piece.data.is_cpu
            try:
                if not failed:
                    data = self._kept[piece.name] = _copy(piece.data.detach(), kept.pop(piece.name, None))
                    copies.append(piece._replace(data=data))
            except (MemoryError, RuntimeError) as error:
                failed = f"{error!s:.200}"
                copies, kept, self._kept = [], {}, {}
        if failed:
            raise MemoryError(f"no memory to copy to: {failed}")
        if accelerated:
            return copies, torch.accelerator.current_stream().record_event().synchronize
        return copies, lambda: None


def _copy(live: Tensor, kept: Tensor | None) -> Tensor:
    """``live`` in the memory of ``kept``, if it fits; from an accelerator it may still be on its way."""
    if kept is None or (kept.shape, kept.dtype) != (live.shape, live.dtype):
        kept = _memory_for(live)
    return kept.copy_(live, non_blocking=True)


def _memory_for(live: Tensor) -> Tensor:
    if not live.is_cpu:
        with suppress(RuntimeError):  # there is only so much that can be pinned
            return torch.empty(live.shape, dtype=live.dtype, pin_memory=True)
    return torch.empty(live.shape, dtype=live.dtype)


class Reader:
    """The tensors and values of a checkpoint that was verified; only what is asked for is read.

    Args:
        beat: called every few MB.
    """

    def __init__(self, checkpoint: Checkpoint, beat: Callable[[], None] = lambda: None) -> None:
        self._checkpoint, self._beat = checkpoint, beat
        self._headers: dict[str, dict[str, Entry]] = {}
        self._open: dict[str, BinaryIO] = {}

    @property
    def tensors(self) -> dict[str, Stored]:
        return self._checkpoint.tensors

    @property
    def values(self) -> dict[str, Any]:
        return self._checkpoint.values

    def __call__(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements [start, stop) of the flattened tensor, 1-D on the CPU.

        Raises:
            KeyError: there is no such tensor.
            Damaged: its file isn't any more what was verified.
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
        """The tensor in its shape."""
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
            self._open[name] = open(self._checkpoint.path / name, "rb")  # noqa: SIM115
            if name not in self._headers:
                self._headers[name] = entries(self._open[name], name)
        return self._open[name]
