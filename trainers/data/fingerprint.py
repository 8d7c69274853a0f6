"""Fingerprint a dataset, so that a resumed run can tell whether its data changed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from isobatch.scaling.order import indices
from isobatch.trainers.data.fetch import fetches_many
from isobatch.trainers.model.randomness import SAMPLE, SAMPLES, key_generators

LOOKS = 16  # number of hashed samples
WHOLE_BYTES = 1 << 28  # a TensorDataset up to this size is hashed whole, in a fraction of a second


def fingerprint(data: Any, seed: int) -> str | None:
    """Return a hash of the length of ``data`` and some of its samples: 16 hex digits, the same in every process.

    A TensorDataset is hashed whole if it isn't too large. From other datasets, some samples are fetched twice with the
    same keys of the default generators. A part of a sample that differs between the two, because it has its own
    generator or reads a clock, is left out. For objects that are neither data nor containers only the type is hashed,
    for an absolute path only the file's name.

    Args:
        data: a map-style dataset of at least one sample; fetching may change its state: see trainers/data/look.py.
        seed: the seed of the sample order, whose first samples are hashed.

    Returns:
        None if every part differs or a sample can't be fetched; training then reports the error.
    """
    if type(data) is TensorDataset and sum(tensor.nbytes for tensor in data.tensors) <= WHOLE_BYTES:
        return _short(digests(data.tensors))
    length = len(data)
    rows = indices(seed, length, 0, min(LOOKS, length)).tolist()
    try:
        first, again = ([digests(sample) for sample in fetched(data, seed, rows)] for _ in range(2))
    except Exception:
        return None
    drawn = {name for a, b in zip(first, again, strict=True) for name in a | b if a.get(name) != b.get(name)}
    kept = sorted({name for sample in first for name in sample} - drawn)
    if not kept:
        return None
    content = [[(name, sample.get(name)) for name in kept] for sample in first]
    return _short((length, content))


def fetched(data: Any, seed: int, rows: list[int]) -> Iterator[Any]:
    """Yield the samples of ``rows``, with the default generators keyed."""
    if fetches_many(data):
        key_generators(seed, 0, SAMPLES)
        yield from data.__getitems__(rows)
        return
    for position, row in enumerate(rows):
        key_generators(seed, position, SAMPLE)
        yield data[row]


def _short(content: Any) -> str:
    return blake2b(repr(content).encode(), digest_size=8).hexdigest()


def digests(sample: Any) -> dict[str, str]:
    """Return a digest of each entry of a dict or tuple, or of the whole sample."""
    entries = sample.items() if isinstance(sample, dict) else enumerate(sample) if isinstance(sample, tuple) else None
    parts = {"": sample} if entries is None else {repr(name): part for name, part in entries}
    digests = {}
    for name, part in parts.items():
        digest = blake2b(digest_size=16)
        for content in _contents(part):
            digest.update(content)
        digests[name] = digest.hexdigest()
    return digests


def _contents(value: Any) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a value that may be nested, types and sizes before contents."""
    yield f"{type(value).__name__} ".encode()
    if isinstance(value, str):
        yield repr(os.path.basename(value) if os.path.isabs(value) else value).encode()  # data may be moved
    elif isinstance(value, Tensor) and value.layout is torch.strided:
        yield f"{value.dtype} {list(value.shape)} ".encode()
        plain = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
        yield plain.reshape(-1).view(torch.uint8).numpy().data
    elif isinstance(value, np.ndarray) and value.dtype.hasobject:  # its bytes are addresses
        yield from _contents(value.tolist())
    elif hasattr(value, "tobytes"):  # arrays, images
        yield " ".join(repr(getattr(value, name, None)) for name in ("dtype", "shape", "mode", "size")).encode()
        yield value.tobytes()
    elif isinstance(value, bytes | int | float | complex | None):
        yield repr(value).encode()
    elif isinstance(value, dict | list | tuple) or is_dataclass(value):
        if isinstance(value, dict):
            value = [part for item in value.items() for part in item]
        elif is_dataclass(value):
            value = [getattr(value, field.name) for field in fields(value)]
        yield f"{len(value)} ".encode()
        for entry in value:
            yield from _contents(entry)
