"""From the plan to this rank's micro-batches: the sample order dealt by each step's cut, fetched ahead of the loop."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader

from isobatch.scaling.plan import Step
from isobatch.trainers.data.fetch import Fetch, Fetched, Remote, to_device
from isobatch.trainers.data.state import TrainState
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
