"""Save checkpoints in the background: training waits only for a copy, which a thread of each rank writes."""

from __future__ import annotations

import copy
import json
import shutil
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, NamedTuple

from isobatch.conf.rundir.directory import RunDir
from isobatch.trainers.checkpoints.best import Best, Evaluation
from isobatch.trainers.checkpoints.commit import aside_of, commit, compose, describe_error, drop_older, is_kept
from isobatch.trainers.checkpoints.copies import Copies
from isobatch.trainers.data.state import TrainState
from isobatch.trainers.ranks.internals import HashStore, Store
from isobatch.trainers.ranks.world import World
from isobatch.trainers.tensors.manifest import Header
from isobatch.trainers.tensors.names import folder_of
from isobatch.trainers.tensors.slices import Slice, write_part

if TYPE_CHECKING:
    from isobatch.trainers.engines.engine import Engine

POLL_S = 0.005  # between reads of the other ranks' results
PROGRESS_S = 1.0  # between progress reports of a rank that writes
CLOSE_S = 2.0  # for the thread to notice that its save was dropped


class Policy(NamedTuple):
    """Hold the interval between timed saves, and the number of checkpoints to keep.

    Attributes:
        every_s: seconds from one save to the next; None for no timed saves.
        keep: number of newest checkpoints to keep, in addition to the best one.
    """

    every_s: float | None
    keep: int


def _ignore(value: object = None) -> None: ...


@dataclass(frozen=True, slots=True)
class Reports:
    """Hold a saver's callbacks. All of them may be called in its thread.

    Attributes:
        beat: called for every few MB that this rank writes, and when another rank reports progress.
        took: called on rank 0 with the seconds from the start of a save to its commit.
        warn: called on rank 0 with a failure after a checkpoint was committed, once for each reason.
    """

    beat: Callable[[], None] = _ignore
    took: Callable[[float], None] = _ignore
    warn: Callable[[str], None] = _ignore


class _Dropped(Exception):
    """The save in progress was dropped."""


@dataclass(slots=True)
class _Save:
    """Hold one save in progress for a rank's thread.

    Attributes:
        number: index of the save within this start; ``began``: its start on the monotonic clock.
        slices: the copy, complete after ``ready()``; ``failed``: why it can't be written.
        header, values: set on rank 0.
    """

    number: int
    step: int
    best: bool
    began: float = field(default_factory=time.monotonic)
    slices: list[Slice] = field(default_factory=list)
    ready: Callable[[], None] = _ignore
    failed: Exception | None = None
    header: Header | None = None
    values: dict[str, Any] = field(default_factory=dict)


class Saver:
    """Save the state of a run in the background, and keep the newest checkpoints and the best one.

    All ranks must call ``save`` and ``wait`` at the same steps. Each rank writes its part, and describes it in the
    world's store. Rank 0 then commits the checkpoint.

    Args:
        header: returns the header of the manifest; called on rank 0.
        best: the best evaluation so far; updated by ``save``.
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
        self._failed: str | None = None  # why the last save failed, the same on all ranks
        self._unreported: str | None = None
        self._dropped = Event()
        self._kept: dict[Path, bool] = {}  # whether a checkpoint stays; reading its manifest again may take long

    def due(self) -> bool:
        """Return, on rank 0, whether a timed save is due. Once true, the interval restarts: the save may come later."""
        if self._world.rank or self._policy.every_s is None or (self._thread and self._thread.is_alive()):
            return False
        due = time.monotonic() - self._began >= self._policy.every_s
        if due:
            self._began = time.monotonic()
        return due

    def save(self, state: TrainState, evaluation: Evaluation | None = None) -> None:
        """Start saving ``state`` and its ``evaluation`` after the previous save. The same state isn't saved twice."""
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
            save.failed = self._make_folder()
        except MemoryError as error:
            save.failed = error
        if self._world.rank == 0:
            save.header, save.values = self._header(state, evaluation), copy.deepcopy(self._engine.values())
        self._thread = Thread(target=self._work, args=(save,), name="checkpoint", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # no memory for its stack
            save.failed = save.failed or MemoryError(str(error))
            self._work(save)

    def _make_folder(self) -> OSError | None:
        """Make ``checkpoints/``, and return why that failed.

        The thread doesn't do that, since another directory may take the run's place at any time.
        """
        try:
            if not self._run.gone:
                self._run.checkpoints.mkdir()
        except FileExistsError:
            return None
        except OSError as error:
            return error
        return None

    def wait(self) -> str | None:
        """Wait for the save in progress. Return why the last save failed, the same on all ranks, or None."""
        self._settle()
        self._unreported = None
        return self._failed

    def failure(self) -> str | None:
        """Return, on rank 0, the reason of a failed save that wasn't returned before, else None."""
        if failure := self._unreported:
            self._unreported = None
        return failure

    def close(self) -> None:
        """Drop the save in progress."""
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
                if time.monotonic() - looked > PROGRESS_S:
                    before, seen, looked = seen, self._store.add(self._progress, 0), time.monotonic()
                    if seen != before:
                        self._reports.beat()
            result = self._store.get(key).decode()
        except RuntimeError as error:
            problem = f"Connection to the other ranks lost while saving a checkpoint: {error}"
            raise RuntimeError(problem) from error
        # a collective, so that rank 0, which may hold the store, doesn't exit before the other ranks have read it
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
        with suppress(_Dropped, RuntimeError):  # if the store is gone, the process is about to end
            part = json.dumps(self._write(save)).encode()
            self._store.set(f"save/{save.number}/part/{self._world.rank}", zlib.compress(part))  # type: ignore[arg-type]
            if self._world.rank == 0:
                self._unreported = self._finish(save, self._parts(save.number))
                self._store.set(f"save/{save.number}/result", self._unreported or "")

    def _write(self, save: _Save) -> dict[str, Any]:
        """Write this rank's file. Return its part of the manifest, or why it failed."""
        reported = time.monotonic()

        def beat() -> None:
            nonlocal reported
            self._reports.beat()
            if self._dropped.is_set():
                raise _Dropped
            if time.monotonic() - reported > PROGRESS_S:
                reported, _ = time.monotonic(), self._store.add(self._progress, 1)

        try:
            if save.failed:
                raise save.failed
            save.ready()
            if gone := self._run.gone:
                raise FileNotFoundError(gone)
            aside = aside_of(self._run, save.step)
            with suppress(FileExistsError):
                aside.mkdir()
            return write_part(aside, self._world.rank, save.slices, beat)
        except _Dropped:
            raise
        except Exception as error:  # the other ranks wait for a result
            return {"failed": describe_error(error)}

    def _parts(self, number: int) -> list[dict[str, Any]]:
        """Wait for the parts of all ranks, and return them by rank."""
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
        """Commit the checkpoint. If any rank failed, remove it and return the reason."""
        assert save.header
        failed = [f"{part['failed']} on rank {rank}" for rank, part in enumerate(parts) if "failed" in part]
        if not failed:
            try:
                warnings = commit(self._run, save.step, compose(save.header, parts, save.values), best=save.best)
            except Exception as error:
                failed = [describe_error(error)]
        if failed:
            shutil.rmtree(aside_of(self._run, save.step), ignore_errors=True)
            return f"step {save.step}: {failed[0]}" + f", and {len(failed) - 1} more" * (len(failed) > 1)
        try:
            self._reports.took(time.monotonic() - save.began)
            self._kept[folder_of(self._run, save.step)] = save.header.kept
            for warning in (*warnings, *drop_older(self._run, save.step, self._policy.keep, self._stays)):
                reason = warning.partition(": ")[0]
                if reason not in self._warned:  # a checkpoint that can't be removed fails again at every save
                    self._warned.add(reason)
                    self._reports.warn(f"the checkpoint of step {save.step} is saved, but: {warning}")
        except Exception as error:  # the checkpoint is committed, and the other ranks wait for a result
            self._reports.warn(f"the checkpoint of step {save.step} is saved, but: {describe_error(error)}")
        return None

    def _stays(self, path: Path) -> bool:
        """Return whether a checkpoint is one of ``checkpoint.keep_every``."""
        if path not in self._kept:
            self._kept[path] = is_kept(path)
        return self._kept[path]
