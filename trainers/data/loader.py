"""Load this rank's micro-batches: split each step of the plan by its cut, and fetch ahead of the loop."""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader

from isobatch.scaling.geometry import Cut
from isobatch.scaling.plan import Step
from isobatch.trainers.data.fetch import Fetch, Fetched, Remote, to_device
from isobatch.trainers.data.state import TrainState
from isobatch.trainers.ranks.signals import die_with_parent
from isobatch.trainers.ranks.world import World
from isobatch.trainers.tasks.task import Task

LOADER_DEATH_S = 0.2  # from the broken connection of a dead DataLoader worker to its signal


@dataclass(frozen=True, slots=True)
class Micro:
    """One rank's part of one pass: the samples at positions [start, stop) of the run.

    Attributes:
        samples: number of samples that count: all, or none if the micro-batch is a stand-in.
        expected_units: the micro-batch's share of the step's expected units.
        cut: the cut of the part of the step that the pass belongs to (see Step.parts).
        last: it is the last pass of its part, so gradients are reduced.
        ends: it is the step's last pass.
        waited_s: seconds that it took to get the batch.
        batch: None if the range is empty.
    """

    start: int
    stop: int
    samples: int
    expected_units: int
    cut: Cut
    last: bool
    ends: bool
    waited_s: float
    batch: Any | None


class Loader:
    """Yield this rank's micro-batches of a step, one per pass, on the training device.

    With ``workers``, DataLoader's processes fetch ahead of the loop, also across the ends of steps and epochs, because
    they follow the plan.

    Args:
        stand_ins: load the step's first granule if this rank's part of a pass is empty.
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
        self._workers, self._fetched = workers, deque[Step]()  # steps whose samples are fetched ahead
        self._batches = self._ahead(workers) if workers else None

    def __call__(self, step: Step) -> Iterator[Micro]:
        if self._batches is not None and (not self._fetched or self._fetched.popleft() != step):
            self.close()  # the plan has changed since: a controller moved the batch
            self._batches = self._ahead(self._workers)
            self._fetched.popleft()
        for cut, last, ends, (start, stop) in self._passes(step):
            positions, began = self._positions(step, start, stop), time.perf_counter()
            fetched = self._fetch[positions] if self._batches is None else self._next(self._batches)
            if fetched.error is not None:
                raise fetched.error from RuntimeError(fetched.traceback)
            if fetched.unkeyed:
                self._tell(fetched.unkeyed)
            assert fetched.positions == positions, f"fetched {fetched.positions} where {positions} was due"
            if self._pin and self._batches is None:
                fetched = fetched.pin_memory()
            expected = step.expected_units * (stop - start) // step.cut.global_size
            waited_s, batch = time.perf_counter() - began, to_device(fetched.batch, self._device)
            yield Micro(*positions, stop - start, expected, cut, last, ends, waited_s, batch)

    def _passes(self, step: Step) -> Iterator[tuple[Cut, bool, bool, tuple[int, int]]]:
        """Yield this rank's passes of a step: the part's cut, whether it ends its part and the step, and its range."""
        before = 0
        for part, cut in enumerate(step.parts, 1):
            for index, (start, stop) in enumerate(cut.passes(self._rank), 1):
                last = index == cut.accumulation
                yield cut, last, last and part == len(step.parts), (before + start, before + stop)
            before += cut.global_size

    def _positions(self, step: Step, start: int, stop: int) -> tuple[int, int]:
        """Return the positions of the run to fetch for [start, stop) of a step."""
        if start == stop and self._stand_ins:
            return step.start, step.start + step.cut.granule
        return step.start + start, step.start + stop

    def _next(self, batches: Iterator[Fetched]) -> Fetched:
        try:
            return next(batches)
        except (OSError, EOFError):
            # The connection of a killed worker breaks shortly before SIGCHLD arrives. torch's handler of that signal
            # raises the true cause, during this sleep.
            time.sleep(LOADER_DEATH_S)
            raise
        except RuntimeError:
            # torch's handler of SIGCHLD and its look at the workers race, and the message of the look lacks the signal.
            for worker in batches._workers:  # type: ignore[attr-defined]
                if (code := worker.exitcode or 0) < 0:
                    name = signal.strsignal(-code)
                    raise RuntimeError(f"DataLoader worker (pid {worker.pid}) is killed by signal: {name}") from None
            raise

    def _ranges(self) -> Iterator[tuple[int, int]]:
        """Yield every range of positions that this rank needs, by the plan in force when a step is fetched.

        End if the plan has changed since at a sample that was fetched already.
        """
        plan, sample = self._state.plan, self._state.samples
        while step := plan.step_at(sample):
            self._fetched.append(step)
            for *_, (start, stop) in self._passes(step):
                yield self._positions(step, start, stop)
            sample, before, plan = step.stop, plan, self._state.plan
            decided = plan.decisions[len(before.decisions) :]
            if decided and decided[0].start_sample <= step.start:
                return

    def _ahead(self, workers: int) -> Iterator[Any]:
        self._fetched.clear()
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
    """Return ``batch``: the collate_fn for batches that are collated already."""
    return batch


def begin_worker(_: int) -> None:
    """Initialise a DataLoader worker: it ignores requests to stop, and ends with the training process."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
