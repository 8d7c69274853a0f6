"""Save checkpoints in the background: the training waits for a copy, which a thread of each rank writes."""

from __future__ import annotations

import copy
import json
import shutil
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, NamedTuple

from torch._C._distributed_c10d import HashStore, Store

from isobatch.conf.rundir.directory import RunDir
from isobatch.trainers.checkpoints.best import Best, Evaluation
from isobatch.trainers.checkpoints.commit import aside_of, commit, compose, drop_older, said
from isobatch.trainers.checkpoints.copies import Copies
from isobatch.trainers.data.state import TrainState
from isobatch.trainers.ranks.world import World
from isobatch.trainers.tensors.manifest import Header
from isobatch.trainers.tensors.slices import Slice, write_part

if TYPE_CHECKING:
    from isobatch.trainers.engines.engine import Engine

POLL_S = 0.005  # between two looks for what other ranks have to say
TELL_S = 1.0  # between two signs of a rank that it still writes
CLOSE_S = 2.0  # for a thread to notice that it isn't wanted any more


class Policy(NamedTuple):
    """Say when a checkpoint is due by the clock, and how many stay.

    Attributes:
        every_s: seconds from one save to the next; None: none is due by the clock.
        keep: how many of the newest checkpoints stay; the best one stays in addition.
    """

    every_s: float | None
    keep: int


def _ignore(what: object = None) -> None: ...


@dataclass(frozen=True, slots=True)
class Reports:
    """Hold the functions that a saver reports to. All of them are called in its thread, too.

    Attributes:
        beat: called for every few MB that are written, and for what other ranks are seen to write.
        took: called on rank 0 with the seconds that a save took from its start to its commit.
        warn: called on rank 0 with what failed after a checkpoint was committed; once for each reason.
    """

    beat: Callable[[], None] = _ignore
    took: Callable[[float], None] = _ignore
    warn: Callable[[str], None] = _ignore


class _Dropped(Exception):
    """The save under way isn't wanted any more."""


@dataclass(slots=True)
class _Save:
    """One checkpoint under way, as a rank's thread sees it.

    Attributes:
        number: of the saves that this start has begun; ``began``: when, on the monotonic clock.
        slices: the copy, complete after ``ready()``; ``failed``: why there is none.
        header, values: on rank 0.
    """

    number: int
    step: int
    best: bool
    began: float = field(default_factory=time.monotonic)
    slices: list[Slice] = field(default_factory=list)
    ready: Callable[[], None] = _ignore
    failed: str | None = None
    header: Header | None = None
    values: dict[str, Any] = field(default_factory=dict)


class Saver:
    """Save the state of a run in the background, and keep the newest checkpoints and the best one.

    All ranks call ``save`` and ``wait`` at the same places. Each rank writes its part; the descriptions of the parts
    meet in the world's store, and rank 0 commits the checkpoint.

    Args:
        header: makes what the manifest says of the run; called on rank 0.
        best: the best evaluation so far; kept up to date.
        resumed: the header of the checkpoint from which this start resumed.
    """

    def __init__(
        self,
        run: RunDir,
        world: World,
        engine: Engine,
        header: Callable[[TrainState, Evaluation | None], Header],
        policy: Policy,
        best: Best,
        reports: Reports = Reports(),
        resumed: Header | None = None,
    ) -> None:
        self._run, self._world, self._engine, self._header = run, world, engine, header
        self._policy, self._reports, self._warned = policy, reports, set[str]()
        self.best, self._best_before = best, best.value
        self._store: Store = world.store or HashStore()
        self._copies = Copies()
        self._number, self._began = 0, time.monotonic()
        self._last = (resumed.step, resumed.evaluation_owed) if resumed else None
        self._thread: Thread | None = None
        self._failed: str | None = None  # the last save, as all ranks know
        self._untold: str | None = None
        self._dropped = Event()

    def due(self) -> bool:
        """Tell on rank 0 whether it's time to save. Once true, it isn't for a while: the save may come a step later."""
        if self._world.rank or self._policy.every_s is None or (self._thread and self._thread.is_alive()):
            return False
        due = time.monotonic() - self._began >= self._policy.every_s
        if due:
            self._began = time.monotonic()
        return due

    def save(self, state: TrainState, evaluation: Evaluation | None = None) -> None:
        """Begin to save ``state``, with its ``evaluation``, once the previous save is over; never a state twice."""
        if self._last == (state.steps, state.evaluation_owed) and evaluation is None and not self._failed:
            return
        self._settle()
        self._last, self._failed = (state.steps, state.evaluation_owed), None
        self._number, self._began = self._number + 1, time.monotonic()
        best, self._best_before = evaluation is not None and self.best.improves(evaluation), self.best.value
        if evaluation is not None and best:
            self.best.value = evaluation[self.best.name]
        save = _Save(self._number, state.steps, best)
        try:
            save.slices, save.ready = self._copies.take(self._engine.slices())
        except MemoryError as error:
            save.failed = str(error)
        if self._world.rank == 0:
            save.header, save.values = self._header(state, evaluation), copy.deepcopy(self._engine.values())
        self._thread = Thread(target=self._work, args=(save,), name="checkpoint", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # there is no memory for its stack either
            save.failed = save.failed or str(error)
            self._work(save)

    def wait(self) -> str | None:
        """Wait for the save under way. Return why the last save failed, the same on all ranks; None: it didn't."""
        self._settle()
        self._untold = None
        return self._failed

    def failure(self) -> str | None:
        """Return on rank 0, once, why a save failed whose failure wasn't returned yet."""
        if failure := self._untold:
            self._untold = None
        return failure

    def close(self) -> None:
        """Drop the save under way."""
        self._dropped.set()
        if self._thread and self._thread.is_alive():
            self._thread.join(CLOSE_S)

    def _settle(self) -> None:
        """Wait until the last save is over, on all ranks."""
        if self._thread is None:
            return
        key, seen, looked = f"save/{self._number}/result", 0, time.monotonic()
        try:
            while not self._store.check([key]):
                time.sleep(POLL_S)
                if time.monotonic() - looked > TELL_S:
                    before, seen, looked = seen, self._store.add(self._progress, 0), time.monotonic()
                    if seen != before:
                        self._reports.beat()
            result = self._store.get(key).decode()
        except RuntimeError as error:
            problem = f"Connection to the other ranks lost, while a checkpoint was saved: {error}"
            raise RuntimeError(problem) from error
        # agreed on, so that rank 0, where the store may be, doesn't leave before others have looked
        self._failed, self._thread = self._world.agree(result) or None, None
        if self._world.rank == 0:
            for done in (key, self._progress):
                self._store.delete_key(done)
        if self._failed:
            self.best.value = self._best_before

    @property
    def _progress(self) -> str:
        return f"save/{self._number}/progress"

    def _work(self, save: _Save) -> None:
        """Write this rank's part and, on rank 0, commit the checkpoint. Runs in the thread."""
        with suppress(_Dropped, RuntimeError):  # without its store, the process is about to end
            part = json.dumps(self._write(save)).encode()
            self._store.set(f"save/{save.number}/part/{self._world.rank}", zlib.compress(part))  # type: ignore[arg-type]
            if self._world.rank == 0:
                self._untold = self._finish(save, self._parts(save.number))
                self._store.set(f"save/{save.number}/result", self._untold or "")

    def _write(self, save: _Save) -> dict[str, Any]:
        """Write this rank's file. Return its part of the manifest, or why it failed."""
        told = time.monotonic()

        def beat() -> None:
            nonlocal told
            self._reports.beat()
            if self._dropped.is_set():
                raise _Dropped
            if time.monotonic() - told > TELL_S:
                told, _ = time.monotonic(), self._store.add(self._progress, 1)

        try:
            if save.failed:
                raise MemoryError(save.failed)
            save.ready()
            if gone := self._run.gone:
                raise FileNotFoundError(gone)  # another directory may be in its place
            aside = aside_of(self._run, save.step)
            for folder in (self._run.checkpoints, aside):
                with suppress(FileExistsError):
                    folder.mkdir()
            return write_part(aside, self._world.rank, save.slices, beat)
        except _Dropped:
            raise
        except Exception as error:  # whatever it is, others wait to hear of it
            return {"failed": said(error)}

    def _parts(self, number: int) -> list[dict[str, Any]]:
        """Return every rank's part, by rank, once all of them are there."""
        parts = []
        for rank in range(self._world.size):
            key = f"save/{number}/part/{rank}"
            while not self._store.check([key]):
                if self._dropped.is_set():
                    raise _Dropped
                time.sleep(POLL_S)
            parts.append(json.loads(zlib.decompress(self._store.get(key))))
            self._store.delete_key(key)
        return parts

    def _finish(self, save: _Save, parts: list[dict[str, Any]]) -> str | None:
        """Commit what all ranks wrote, or remove it and return why."""
        assert save.header
        failed = [f"{part['failed']} on rank {rank}" for rank, part in enumerate(parts) if "failed" in part]
        if not failed:
            try:
                warnings = commit(self._run, save.step, compose(save.header, parts, save.values), best=save.best)
            except Exception as error:
                failed = [said(error)]
        if failed:
            shutil.rmtree(aside_of(self._run, save.step), ignore_errors=True)
            return f"step {save.step}: {failed[0]}" + f", and {len(failed) - 1} more" * (len(failed) > 1)
        try:
            self._reports.took(time.monotonic() - save.began)
            for warning in (*warnings, *drop_older(self._run, save.step, self._policy.keep)):
                reason = warning.partition(": ")[0]
                if reason not in self._warned:  # a checkpoint that can't be removed is met again at every save
                    self._warned.add(reason)
                    self._reports.warn(f"the checkpoint of step {save.step} is saved, but: {warning}")
        except Exception as error:  # it is committed all the same, and other ranks wait to hear of it
            self._reports.warn(f"the checkpoint of step {save.step} is saved, but: {said(error)}")
        return None
