"""safetensors files, looked at without torch and without trust: what their headers say, and whether it is so."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, BinaryIO

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config

from isobatch.scaling.reading import Unreadable, parse_json

# bytes per element, by safetensors' names of dtypes
ITEMSIZE: dict[str, int] = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}

HEADER_BYTES = 100_000_000  # safetensors' own limit
CHUNK_BYTES = 4 << 20  # read or written, and hashed, in one go

strict = with_config(ConfigDict(extra="forbid"))
Size = Annotated[int, Field(ge=0, lt=2**63)]


class Damaged(ValueError):
    """A checkpoint can't be used; the message says why, in a few words."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A 1-D tensor in a file: ``count`` elements, the first of them at byte ``offset``."""

    dtype: str
    count: int
    offset: int


@strict
@dataclass(frozen=True, slots=True)
class _Described:
    """An entry as the header has it; offsets count from its end."""

    dtype: str
    shape: tuple[Size]
    data_offsets: tuple[Size, Size]


def entries(file: BinaryIO, name: str) -> dict[str, Entry]:
    """The tensors in an open file.

    Raises:
        Damaged: it is no safetensors file of 1-D tensors, or its header doesn't describe exactly what follows it.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(size - 8, HEADER_BYTES):
        raise Damaged(f"{name} isn't a safetensors file")
    text, what = file.read(length), f"the header of {name}"
    load_json(text, what)
    described: dict[str, _Described] = of_kind(dict[str, _Described], text, what)
    found, end = {}, 0
    for tensor, entry in sorted(described.items(), key=lambda item: item[1].data_offsets):
        start, stop = entry.data_offsets
        if start != end or stop - start != ITEMSIZE.get(entry.dtype, 0) * entry.shape[0]:
            raise Damaged(f"{name} says that {tensor!r:.100} lies where it can't")
        found[tensor] = Entry(entry.dtype, entry.shape[0], 8 + length + start)
        end = stop
    if 8 + length + end != size:
        raise Damaged(f"{name} has {size} bytes, but its header describes {8 + length + end}")
    return found


def sha256(file: BinaryIO, beat: Callable[[], None]) -> str:
    """Of the rest of an open file; ``beat`` is called every few MB."""
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK_BYTES):
        digest.update(chunk)
        beat()
    return digest.hexdigest()


def load_json(text: bytes, what: str) -> Any:
    """``text`` as JSON. Raises Damaged where it isn't any, or too deep, or a key stands there twice."""
    try:
        return parse_json(text)
    except Unreadable as error:
        raise Damaged(f"{what}: {error!s:.200}".replace(": it ", " ", 1)) from None


def of_kind(kind: Any, text: bytes, what: str) -> Any:
    """JSON as ``kind``. Raises Damaged where it is something else."""
    try:
        return _adapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise Damaged(f"{what}: {where!r:.100}: {first['msg']:.200}") from None


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
