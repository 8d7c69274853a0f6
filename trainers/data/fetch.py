"""Make batches from positions of the run: fetch the samples in order, augment, collate and move them to the device."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from isobatch.scaling.order import indices
from isobatch.trainers.model.randomness import COLLATE, SAMPLE, SAMPLES, generator_for, generators_state, key_generators
from isobatch.trainers.tasks.task import Task


@dataclass(frozen=True, slots=True)
class Fetched:
    """The batch of a range of positions (None if empty), or the error that a DataLoader worker raised.

    ``unkeyed`` is the reason why the batch depends on the cut, or None.
    """

    positions: tuple[int, int]
    batch: Any | None
    unkeyed: str | None = None
    error: Exception | None = None
    traceback: str = ""

    def pin_memory(self) -> Fetched:
        """Return a copy with the batch in pinned memory. DataLoader's pinning thread calls this."""
        return replace(self, batch=_map(self.batch, _pinned))


class Fetch:
    """Make micro-batches from ranges of positions, also in DataLoader's workers.

    Attributes:
        instead: the advice where to draw random numbers so that they follow the sample.
    """

    instead = "draw in augment()"

    def __init__(self, data: Any, task: Task, seed: int, *, augments: bool = True) -> None:
        self.data, self.seed, self.length = data, seed, len(data)
        self.collate, self.augment = task.collate, task.augment if augments and task.has("augment") else None
        in_memory = type(data) is TensorDataset and self.augment is None and not task.has("collate")
        self._tensors: tuple[Tensor, ...] | None = data.tensors if in_memory else None

    def __getitem__(self, positions: tuple[int, int]) -> Fetched:
        start, stop = positions
        if start == stop:
            return Fetched(positions, None)
        return self._fetched(positions, start, indices(self.seed, self.length, start, stop))

    def _fetched(self, positions: tuple[int, int], first: int, rows: np.ndarray) -> Fetched:
        """Return the batch of ``rows``, at least one; random numbers for the batch are keyed by ``first``."""
        if self._tensors is not None:
            index = torch.from_numpy(rows)
            return Fetched(positions, tuple(t.index_select(0, index.to(t.device)) for t in self._tensors))
        samples, unkeyed = self.samples(first, rows.tolist())
        batch, collate_draws = self.collated(first, samples)
        return Fetched(positions, batch, unkeyed or collate_draws)

    def samples(self, first: int, rows: list[int]) -> tuple[list[Any], str | None]:
        """Fetch and augment the samples of ``rows``, which are at consecutive positions of the run from ``first``.

        Returns:
            The samples, and why they depend on the cut, or None.
        """
        if not fetches_many(self.data):
            return [self._one(key, row) for key, row in zip(self._keys(first, rows), rows, strict=True)], None
        key_generators(self.seed, first, SAMPLES)
        before = generators_state()
        samples = list(self.data.__getitems__(rows))
        unkeyed = f"__getitems__ draws random numbers; {self.instead}" if generators_state() != before else None
        for number, sample in enumerate(samples if self.augment else ()):
            key_generators(self.seed, first + number, SAMPLE)
            samples[number] = self._augmented(first + number, sample)
        return samples, unkeyed

    def collated(self, first: int, samples: list[Any]) -> tuple[Any, str | None]:
        """Collate samples at positions from ``first``; return the batch, and why it depends on the cut, or None."""
        key_generators(self.seed, first, COLLATE)
        before = generators_state()
        batch = self.collate(samples)
        return batch, f"collate draws random numbers; {self.instead}" if generators_state() != before else None

    def _keys(self, first: int, rows: list[int]) -> Sequence[int]:
        """Return the key of each sample's random numbers: its position in the run."""
        return range(first, first + len(rows))

    def _one(self, position: int, row: int) -> Any:
        key_generators(self.seed, position, SAMPLE)
        return self._augmented(position, self.data[row])

    def _augmented(self, position: int, sample: Any) -> Any:
        return sample if self.augment is None else self.augment(sample, generator_for(self.seed, position))


def fetches_many(data: Any) -> bool:
    """Return whether the dataset has its own ``__getitems__``; a Subset's fetches samples one by one."""
    while isinstance(data, Subset):
        data = data.dataset
    return hasattr(data, "__getitems__")


class Remote(Fetch):
    """Fetch in a DataLoader's worker; return an exception instead of raising it, so that the loop can raise it."""

    def __getitem__(self, positions: tuple[int, int]) -> Fetched:
        try:
            return super().__getitem__(positions)
        except Exception as error:
            try:
                pickle.loads(pickle.dumps(error))  # noqa: S301  some exceptions can't be pickled or unpickled
            except Exception:
                error = RuntimeError(f"{type(error).__name__}: {error}")
            return Fetched(positions, None, error=error, traceback=traceback.format_exc())


def to_device(batch: Any, device: torch.device) -> Any:
    """Return ``batch`` with its tensors, and other objects with a ``.to``, on ``device``."""
    return batch if device.type == "cpu" else _map(batch, lambda value: value.to(device, non_blocking=True))


def _pinned(value: Any) -> Any:
    return value.pin_memory() if isinstance(value, Tensor) and value.is_cpu else value


def _map(value: Any, function: Callable[[Any], Any]) -> Any:
    """Apply ``function`` to each object with a ``.to`` in nested tuples, lists and dicts."""
    if hasattr(value, "to"):
        return function(value)
    if isinstance(value, dict):
        return {key: _map(inner, function) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        mapped = [_map(inner, function) for inner in value]
        return type(value)(*mapped) if hasattr(value, "_fields") else type(value)(mapped)
    return value
