"""Open the validation data, choose the rows to evaluate, and key their random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from isobatch.scaling.errors import UserError
from isobatch.trainers.data.fetch import Fetch, Fetched
from isobatch.trainers.model.randomness import evaluation_seed
from isobatch.trainers.ranks.session import refuse_unless_same
from isobatch.trainers.ranks.world import World
from isobatch.trainers.tasks.task import Task, check_map_style


class Validation(Fetch):
    """Fetch batches of the evaluated rows: ``validation[start, stop]`` is the batch of ``rows[start:stop]``.

    Random numbers that ``[index]`` draws from the default generators are keyed by the row, so they are the same in any
    batch and order. Those of ``__getitems__`` and ``collate`` are keyed by the batch's first row, and reported.
    ``augment`` is for training only.

    Args:
        seed: the seed of the run.
        samples: number of rows to evaluate, spread evenly over the data; None evaluates all.

    Attributes:
        rows: the evaluated rows, ascending.
    """

    instead = "draw in [index] of the validation data"

    def __init__(self, data: Any, task: Task, seed: int, samples: int | None = None) -> None:
        super().__init__(data, task, evaluation_seed(seed), augments=False)
        self.rows = spread(self.length, samples)

    def __getitem__(self, positions: tuple[int, int]) -> Fetched:
        rows = self.rows[slice(*positions)]
        return self._fetched(positions, rows[0], np.asarray(rows, dtype=np.int64))

    def _keys(self, first: int, rows: list[int]) -> Sequence[int]:
        return rows


def spread(length: int, samples: int | None) -> Sequence[int]:
    """Return ``samples`` evenly spaced numbers below ``length``, or all numbers if ``samples`` is None or larger.

    >>> spread(7, 3), spread(7, None)
    ([0, 2, 4], range(0, 7))
    """
    if samples is None or samples >= length:
        return range(length)
    return [number * length // samples for number in range(samples)]


def open_validation(task: Task, world: World, seed: int, samples: int | None = None) -> Validation | None:
    """Open the task's validation data, or return None if it has none; called by all ranks.

    Raises:
        UserError: ``val_data()`` isn't a map-style dataset, is empty, or has different lengths on different ranks.
    """
    data = task.val_data()
    length = -1 if data is None else check_map_style(data, "val_data()")
    refuse_unless_same(world, "the number of samples that val_data() has (-1: there is none)", length)
    if data is None:
        return None
    if length == 0:
        raise UserError("val_data() has 0 samples", "return None to train without evaluations")
    return Validation(data, task, seed, samples)
