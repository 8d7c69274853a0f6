"""Read and write headers of safetensors files. Every header is validated. Torch-free."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, BinaryIO

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config

# dtype names in torch by dtype names in safetensors
TORCH_NAMES = {
    "BOOL": "bool", "C64": "complex64", "BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu",
    **{f"{kind[0].upper()}{bits}": f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
}  # fmt: skip
# bytes per element
ITEMSIZE = {name: int(bits[0]) // 8 if (bits := re.search(r"\d+", name)) else 1 for name in TORCH_NAMES}

HEADER_BYTES = 100_000_000  # safetensors' own limit
CHUNK_BYTES = 4 << 20  # read or written, and hashed, at a time

strict = with_config(ConfigDict(extra="forbid"))
Size = Annotated[int, Field(ge=0, lt=2**63)]
Dtype = Annotated[str, Field(pattern=f"^({'|'.join(TORCH_NAMES)})$")]


class Damaged(ValueError):
    """A checkpoint can't be used, for the reason in the message."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A 1-D tensor of ``count`` elements in a file, starting at byte ``offset``."""

    dtype: str
    count: int
    offset: int


@strict
@dataclass(frozen=True, slots=True)
class _Described:
    """An entry of the header. Its offsets count from the header's end."""

    dtype: Dtype
    shape: tuple[Size]
    data_offsets: tuple[Size, Size]


def entries(file: BinaryIO, name: str) -> dict[str, Entry]:
    """Return the tensors in an open file by name.

    Raises:
        Damaged: it isn't a safetensors file of 1-D tensors, or its header doesn't match the data after it.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(size - 8, HEADER_BYTES):
        raise Damaged(f"{name} isn't a safetensors file")
    described: dict[str, _Described] = parse_json(dict[str, _Described], file.read(length), f"the header of {name}")
    found, end = {}, 0
    for tensor, entry in sorted(described.items(), key=lambda item: item[1].data_offsets):
        start, stop = entry.data_offsets
        if start != end or stop - start != ITEMSIZE[entry.dtype] * entry.shape[0]:
            raise Damaged(f"{name} has an impossible position or size for {tensor!r:.100}")
        found[tensor] = Entry(entry.dtype, entry.shape[0], 8 + length + start)
        end = stop
    if 8 + length + end != size:
        raise Damaged(f"{name} has {size} bytes, but its header describes {8 + length + end}")
    return found


def sha256(file: BinaryIO, beat: Callable[[], None]) -> str:
    """Return the sha256 of the rest of an open file, calling ``beat`` every few MB."""
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK_BYTES):
        digest.update(chunk)
        beat()
    return digest.hexdigest()


def header_text(kinds: Sequence[tuple[str, str, tuple[int, ...]]], **metadata: str) -> bytes:
    """Return the start of a safetensors file: the length of a JSON header, and the header, padded to 8 bytes.

    Args:
        kinds: name, dtype and shape of each tensor, larger elements first, so that all are aligned.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, dtype, shape in kinds:
        assert name not in header, f"two slices of {name}"
        span = (end, end := end + math.prod(shape) * ITEMSIZE[dtype])
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": span}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def parse_json(kind: Any, text: bytes, name: str) -> Any:
    """Parse JSON as ``kind``. Raises Damaged, naming the input as ``name``, if it doesn't match."""
    try:
        return _adapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        if first["type"] == "json_invalid":
            raise Damaged(f"{name} isn't JSON: {first['msg']:.200}") from None
        location = ".".join(map(str, first["loc"]))
        raise Damaged(f"{name}: {location!r:.100}: {first['msg']:.200}") from None


_adapter = cache(TypeAdapter)
