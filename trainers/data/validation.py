"""The validation data: which rows are evaluated, and what each of them draws."""

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
    """Fetch batches of the rows that are evaluated: ``validation[start, stop]`` has ``rows[start:stop]``.

    What ``[index]`` draws from the default generators follows the row, so it is the same in any batch, in any order.
    What ``__getitems__`` and ``collate`` draw follows the first row of the batch, and is reported. ``augment`` is for
    training alone.

    Args:
        seed: of the run.
        samples: how many rows are evaluated, spread evenly over the data; None, or more than there are: all.

    Attributes:
        rows: the rows that are evaluated, ascending.
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
    """Return ``samples`` of the numbers below ``length``, evenly spaced; all of them where there are no more.

    >>> spread(7, 3), spread(7, None)
    ([0, 2, 4], range(0, 7))
    """
    if samples is None or samples >= length:
        return range(length)
    return [number * length // samples for number in range(samples)]


def open_validation(task: Task, world: World, seed: int, samples: int | None = None) -> Validation | None:
    """Open the task's validation data; None where it has none. All ranks call this alike.

    Raises:
        UserError: ``val_data()`` isn't a map-style dataset, is empty, or is of another length on another rank.
    """
    data = task.val_data()
    length = -1 if data is None else check_map_style(data, "val_data()")
    refuse_unless_same(world, "the number of samples that val_data() has (-1: there is none)", length)
    if data is None:
        return None
    if length == 0:
        raise UserError("val_data() has 0 samples", "return None where there is nothing to evaluate on")
    return Validation(data, task, seed, samples)
