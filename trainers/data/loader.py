"""From the plan to this rank's micro-batches: the sample order dealt by each step's cut, fetched ahead of the loop."""

from __future__ import annotations

import pickle
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset, default_collate

from isobatch.scaling.order import indices
from isobatch.scaling.plan import Step
from isobatch.trainers.data.state import TrainState
from isobatch.trainers.model.randomness import COLLATE, SAMPLE, SAMPLES, generator_for, generators_state, key_generators
from isobatch.trainers.ranks.signals import die_with_parent
from isobatch.trainers.ranks.world import World
from isobatch.trainers.tasks.task import Task

LOADER_DEATH_S = 0.2  # from the first that is seen of a DataLoader worker's death to the signal


@dataclass(frozen=True, slots=True)
class Micro:
    """One rank's part of one pass: the samples at positions [start, stop) of the run.

    Attributes:
        samples: how many of them are this rank's: all of them, or none, where they are only there to stand in.
        expected_units: its part of the step's.
        last: pass of the step.
        batch: None where the range is empty.
    """

    start: int
    stop: int
    samples: int
    expected_units: int
    last: bool
    batch: Any | None


@dataclass(frozen=True, slots=True)
class Fetched:
    """The batch of a range of positions (None where it is empty), or what went wrong with it in a DataLoader's worker.

    ``unkeyed`` says what in the fetching makes it depend on the cut.
    """

    positions: tuple[int, int]
    batch: Any | None
    unkeyed: str | None = None
    error: Exception | None = None
    traceback: str = ""

    def pin_memory(self) -> Fetched:
        """What DataLoader's pinning thread calls."""
        return replace(self, batch=_map(self.batch, _pin))


class Fetch:
    """Ranges of positions in, micro-batches out. Also what DataLoader's workers run.

    Attributes:
        instead: where to draw random numbers, so that they follow the sample.
    """

    instead = "draw in augment()"

    def __init__(self, data: Any, task: Task, seed: int, *, augments: bool = True) -> None:
        self.data, self.seed, self.length = data, seed, len(data)
        self.augment: Callable[[Any, torch.Generator], Any] | None = getattr(task, "augment", None)
        self.augment = self.augment if augments else None
        self.collate: Callable[[list[Any]], Any] = getattr(task, "collate", default_collate)
        in_memory = type(data) is TensorDataset and self.augment is None and self.collate is default_collate
        self._tensors: tuple[Tensor, ...] | None = data.tensors if in_memory else None

    def __getitem__(self, positions: tuple[int, int]) -> Fetched:
        start, stop = positions
        if start == stop:
            return Fetched(positions, None)
        return self._fetched(positions, start, indices(self.seed, self.length, start, stop))

    def _fetched(self, positions: tuple[int, int], first: int, where: np.ndarray) -> Fetched:
        """The batch of the rows ``where``, at least one; ``first`` is what the first of them is known by."""
        if self._tensors is not None:
            at = torch.from_numpy(where)
            return Fetched(positions, tuple(tensor.index_select(0, at.to(tensor.device)) for tensor in self._tensors))
        samples, unkeyed = self.samples(first, where.tolist())
        batch, collate_draws = self.collated(first, samples)
        return Fetched(positions, batch, unkeyed or collate_draws)

    def samples(self, first: int, rows: list[int]) -> tuple[list[Any], str | None]:
        """Fetch the samples of ``rows``, which are at positions from ``first`` of the run, and augment them.

        Returns:
            The samples, and what in fetching them depends on the cut.
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
        """Collate samples at positions from ``first`` into a batch; the second value is as of ``samples``."""
        key_generators(self.seed, first, COLLATE)
        before = generators_state()
        batch = self.collate(samples)
        return batch, f"collate draws random numbers; {self.instead}" if generators_state() != before else None

    def _keys(self, first: int, rows: list[int]) -> Sequence[int]:
        """Return what the draws of each sample are keyed by: its position in the run."""
        return range(first, first + len(rows))

    def _one(self, position: int, row: int) -> Any:
        key_generators(self.seed, position, SAMPLE)
        return self._augmented(position, self.data[row])

    def _augmented(self, position: int, sample: Any) -> Any:
        return sample if self.augment is None else self.augment(sample, generator_for(self.seed, position))


def fetches_many(data: Any) -> bool:
    """Whether a dataset itself has ``__getitems__``: a Subset has one, which asks for the samples one by one."""
    while isinstance(data, Subset):
        data = data.dataset
    return hasattr(data, "__getitems__")


class Remote(Fetch):
    """Fetch in a DataLoader's worker: what it raises is returned, to be raised as it was where it is understood."""

    def __getitem__(self, positions: tuple[int, int]) -> Fetched:
        try:
            return super().__getitem__(positions)
        except Exception as error:
            try:
                pickle.loads(pickle.dumps(error))  # noqa: S301  not every exception survives the way, if it starts it
            except Exception:
                error = RuntimeError(f"{type(error).__name__}: {error}")
            return Fetched(positions, None, error=error, traceback=traceback.format_exc())


class Loader:
    """Called with a step, gives this rank's ``accumulation`` micro-batches of it, on the training device.

    With ``workers``, DataLoader's processes fetch ahead of the loop, across the ends of steps and epochs: they follow
    the plan, not an epoch.

    Args:
        stand_ins: where a rank's part of a pass is empty, give it the first granule of the step.
    """

    def __init__(
        self,
        data: Any,
        task: Task,
        state: TrainState,
        world: World,
        workers: int,
        tell: Callable[[str], None] = print,
        *,
        stand_ins: bool = False,
    ) -> None:
        self._state, self._rank, self._device, self._tell = state, world.rank, world.device, tell
        self._fetch = (Remote if workers else Fetch)(data, task, state.plan.seed)
        self._pin, self._stand_ins = world.device.type == "cuda", stand_ins
        self._batches = self._ahead(workers) if workers else None

    def __call__(self, step: Step) -> Iterator[Micro]:
        for index, (start, stop) in enumerate(step.cut.passes(self._rank)):
            positions = self._positions(step, start, stop)
            fetched = self._fetch[positions] if self._batches is None else self._next(self._batches)
            if fetched.error is not None:
                raise fetched.error from RuntimeError(fetched.traceback)
            if fetched.unkeyed:
                self._tell(fetched.unkeyed)
            assert fetched.positions == positions, f"fetched {fetched.positions} where {positions} was due"
            if self._pin and self._batches is None:
                fetched = fetched.pin_memory()
            expected = step.expected_units * (stop - start) // step.cut.global_size
            last = index == step.cut.accumulation - 1
            yield Micro(*positions, stop - start, expected, last, to_device(fetched.batch, self._device))

    def _positions(self, step: Step, start: int, stop: int) -> tuple[int, int]:
        """The range of the run that is fetched for [start, stop) of a step."""
        if start == stop and self._stand_ins:
            return step.start, step.start + step.cut.granule
        return step.start + start, step.start + stop

    def _next(self, batches: Iterator[Fetched]) -> Fetched:
        try:
            return next(batches)
        except (OSError, EOFError):
            # A worker that was killed breaks the connection a moment before the kernel says that it died; torch's
            # handler of that signal raises the true cause, here.
            time.sleep(LOADER_DEATH_S)
            raise

    def _ranges(self) -> Iterator[tuple[int, int]]:
        """Every range of positions that this rank will ask for, by the plan that is in force when it is fetched."""
        sample = self._state.samples
        while step := self._state.plan.step_at(sample):
            for start, stop in step.cut.passes(self._rank):
                yield self._positions(step, start, stop)
            sample = step.stop

    def _ahead(self, workers: int) -> Iterator[Any]:
        return iter(
            DataLoader(
                self._fetch,  # type: ignore[arg-type]
                batch_size=None,
                sampler=self._ranges(),  # type: ignore[arg-type]
                num_workers=workers,
                collate_fn=as_it_is,
                pin_memory=self._pin,
                worker_init_fn=begin_worker,
            )
        )

    def close(self) -> None:
        """End DataLoader's workers."""
        if self._batches is not None:
            self._batches._shutdown_workers()  # type: ignore[attr-defined]


def as_it_is(batch: Any) -> Any:
    """The collate_fn of batches that are collated already."""
    return batch


def begin_worker(_: int) -> None:
    """What a process that loads data does first: a stop is the business of training, and this one ends with it."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def to_device(batch: Any, device: torch.device) -> Any:
    """``batch`` with its tensors (and whatever else has ``.to``) on ``device``."""
    return batch if device.type == "cpu" else _map(batch, lambda value: value.to(device, non_blocking=True))


def _pin(value: Any) -> Any:
    return value.pin_memory() if isinstance(value, Tensor) and value.is_cpu else value


def _map(value: Any, function: Callable[[Any], Any]) -> Any:
    """``function`` of everything with a ``.to`` within nested tuples, lists and mappings."""
    if hasattr(value, "to"):
        return function(value)
    if isinstance(value, dict):
        return {key: _map(inner, function) for key, inner in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(inner, function) for inner in value))
    if isinstance(value, list | tuple):
        return type(value)(_map(inner, function) for inner in value)
    return value
