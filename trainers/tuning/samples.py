"""Make batches of copies of a large sample, so that a step's memory is measured at its largest."""

from __future__ import annotations

from typing import Any

from torch.utils.data import TensorDataset

from isobatch.trainers.data.fetch import Fetch
from isobatch.trainers.tasks.task import Task
from isobatch.trainers.tuning.storages import tensors_in

LOOKED_AT = 64  # samples, among which the largest is chosen


class LargeBatches:
    """Batches in which every sample is a copy of the largest one of some.

    Args:
        data: the training data; ``seed``: the run's, which keys the random numbers of fetching.

    Attributes:
        bytes: of a sample's tensors.
        looked_at: number of samples among which this one is the largest.
    """

    def __init__(self, data: Any, task: Task, seed: int) -> None:
        self._fetch, self._in_memory = Fetch(data, task, seed), type(data) is TensorDataset
        same = self._in_memory and not (task.has("augment") or task.has("collate"))
        self.looked_at = 1 if same else min(LOOKED_AT, len(data))
        rows = [index * len(data) // self.looked_at for index in range(self.looked_at)]
        found = [self._fetch.samples(row, [row])[0][0] for row in rows]
        sizes = [size_of(sample) for sample in found]
        self.bytes = max(sizes)
        self._sample = found[sizes.index(self.bytes)]

    def __call__(self, samples: int) -> Any:
        """Return a batch on the CPU."""
        batch, _ = self._fetch.collated(0, [self._sample] * samples)
        return tuple(batch) if self._in_memory and type(batch) is list else batch  # as training gets it


def size_of(sample: Any) -> int:
    """Return the bytes of the tensors in a sample; of one without tensors, such as a text, its length."""
    tensors = tensors_in(sample)
    if tensors:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    nbytes = getattr(sample, "nbytes", None)
    return int(nbytes) if nbytes is not None else len(sample) if hasattr(sample, "__len__") else 0
