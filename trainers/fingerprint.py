"""What a dataset holds, in a few digits: by them a run that goes on sees whether its data changed."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from scaling.order import indices
from trainers.keyed import SAMPLE, SAMPLES, key_generators
from trainers.loader import as_it_is, begin_worker, fetches_many

LOOKS = 16  # samples that are looked at
WHOLE_BYTES = 1 << 28  # a TensorDataset of no more than this, a fraction of a second's work, is looked at as a whole


def fingerprint(data: Any, seed: int, workers: int = 0) -> str | None:
    """16 hexadecimal digits of the length of ``data`` and of some of its samples, the same in every process.

    A TensorDataset is looked at as a whole, if it isn't too large. Of others some samples are, each fetched twice, with
    the default generators keyed alike. A part that still differs from itself (it draws from a generator of its own, or
    from a clock) is left out of all samples. Of an object that is neither data nor a container only its type counts, of
    a path only the file's name.

    Args:
        data: a map-style dataset of at least one sample.
        seed: of the sample order, whose first samples are looked at.
        workers: how many processes will load the data. Where there are any, one of them looks: a file that a dataset
            opens when it is first asked must not be open yet when they are forked, or they share their place in it.

    Returns:
        None where nothing could be told: every part differs, or a sample can't be fetched (training will say why).
    """
    look = _Look(data, seed)
    if not workers:
        with _generators_as_found():
            return look[0]
    loader: Any = DataLoader(
        look,  # type: ignore[arg-type]
        batch_size=None,
        num_workers=1,
        collate_fn=as_it_is,
        worker_init_fn=begin_worker,
        generator=torch.Generator(),  # else it draws from the default one
    )
    found: str | None = next(iter(loader))
    return found


class _Look:
    """A dataset of one entry: the fingerprint of another one."""

    def __init__(self, data: Any, seed: int) -> None:
        self._data, self._seed = data, seed

    def __len__(self) -> int:
        return 1

    def __getitem__(self, _: int) -> str | None:
        if type(self._data) is TensorDataset and sum(tensor.nbytes for tensor in self._data.tensors) <= WHOLE_BYTES:
            return _short(_digests(self._data.tensors))
        length = len(self._data)
        rows = indices(self._seed, length, 0, min(LOOKS, length)).tolist()
        try:
            first, again = ([_digests(sample) for sample in self._fetched(rows)] for _ in range(2))
        except Exception:
            return None
        drawn = {name for a, b in zip(first, again, strict=True) for name in a | b if a.get(name) != b.get(name)}
        kept = sorted({name for sample in first for name in sample} - drawn)
        if not kept:
            return None
        content = [[(name, sample.get(name)) for name in kept] for sample in first]
        return _short((length, content))

    def _fetched(self, rows: list[int]) -> Iterator[Any]:
        if fetches_many(self._data):
            key_generators(self._seed, 0, SAMPLES)
            yield from self._data.__getitems__(rows)
            return
        for position, row in enumerate(rows):
            key_generators(self._seed, position, SAMPLE)
            yield self._data[row]


def _short(content: Any) -> str:
    return blake2b(repr(content).encode(), digest_size=8).hexdigest()


def _digests(sample: Any) -> dict[str, str]:
    """A digest for each part of a sample: each entry of a dict or tuple, else the whole."""
    if isinstance(sample, dict):
        parts = {repr(key): value for key, value in sample.items()}
    elif isinstance(sample, tuple):
        parts = {str(index): value for index, value in enumerate(sample)}
    else:
        parts = {"": sample}
    digests = {}
    for name, part in parts.items():
        digest = blake2b(digest_size=16)
        for content in _contents(part):
            digest.update(content)
        digests[name] = digest.hexdigest()
    return digests


def _contents(value: Any) -> Iterator[bytes | memoryview]:
    """The bytes of what may be nested, kinds and sizes before contents."""
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
        entries = _entries(value)
        yield f"{len(entries)} ".encode()
        for entry in entries:
            yield from _contents(entry)


def _entries(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [part for item in value.items() for part in item]
    return list(value) if isinstance(value, list | tuple) else [getattr(value, field.name) for field in fields(value)]


@contextmanager
def _generators_as_found() -> Iterator[None]:
    pythons, numpys, torchs = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(pythons)
        np.random.set_state(numpys)
        torch.set_rng_state(torchs)
