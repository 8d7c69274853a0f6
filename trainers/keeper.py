"""Saving checkpoints in the background: the loop waits for a copy only; threads write it, and rank 0's commits it."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from torch._C._distributed_c10d import HashStore

from trainers import manifest
from trainers.checkpoint import Slice, write_part
from trainers.manifest import Header, folder_of
from trainers.rundir import Refused, RunDir
from trainers.state import TrainState
from trainers.world import World

if TYPE_CHECKING:
    from trainers.engines import Engine

POLL_S = 0.005


class _Dropped(Exception):
    """The process is about to end."""


class Keeper:
    """Saves the state of a run, and keeps the newest checkpoints and the best.

    All ranks call ``save``, ``wait`` and ``improves`` at the same places.

    Args:
        header: what the manifest says of the run, for a state and the values of its evaluation; called on rank 0.
        every_s: seconds between two saves, for ``due``.
        keep: how many of the newest checkpoints stay.
        best: ``val/accuracy:max``: keep the best one, too. ``best_before``: its value so far.
        beat: called every few MB that are written, from the thread, and while others are seen to write.
        resumed: header of the checkpoint that this start went on from.
    """

    def __init__(
        self,
        run: RunDir,
        world: World,
        engine: Engine,
        header: Callable[[TrainState, dict[str, float | None] | None], Header],
        *,
        every_s: float | None,
        keep: int,
        best: str | None,
        best_before: float | None,
        beat: Callable[[], None],
        resumed: Header | None = None,
    ) -> None:
        self._run, self._world, self._engine, self._header = run, world, engine, header
        self._every_s, self._keep, self._beat = every_s, keep, beat
        self._best_key, _, self._best_way = best.rpartition(":") if best else ("", "", "")
        self._best = best_before
        self._resumed = resumed
        self._store = world.store or HashStore()
        self._began = time.monotonic()
        self._number = 0
        self._saved: set[int] = set()
        self._current: tuple[int, bool] | None = (resumed.step, resumed.evaluation_owed) if resumed else None
        self._best_saved = best_before
        self._thread: Thread | None = None
        self._result: str | None = None
        self._untold: str | None = None
        self._dropped = Event()

    @property
    def due(self) -> bool:
        """On rank 0: whether it's time for the next one."""
        if self._world.rank or self._every_s is None or (self._thread and self._thread.is_alive()):
            return False
        return time.monotonic() - self._began >= self._every_s

    def save(self, state: TrainState, evaluation: dict[str, float | None] | None = None) -> None:
        failed = self._settle()
        if self._current == (state.steps, state.evaluation_owed) and not failed and evaluation is None:
            return
        self._number, self._began = self._number + 1, time.monotonic()
        self._current = (state.steps, state.evaluation_owed)
        better = evaluation is not None and self.improves(evaluation)
        slices = [Slice(s.name, s.shape, s.start, s.data.detach().cpu().clone()) for s in self._engine.slices()]
        job: dict[str, Any] = {"step": state.steps, "slices": slices, "better": better}
        if better:
            assert evaluation is not None
            self._best = evaluation[self._best_key]
        if self._world.rank == 0:
            job |= {"header": self._header(state, evaluation), "values": copy.deepcopy(self._engine.values())}
        self._thread = Thread(target=self._work, args=(self._number, job), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> str | None:
        failure = self._settle()
        self._untold = None
        return failure

    def failure(self) -> str | None:
        failure, self._untold = self._untold, None
        return failure

    def improves(self, values: Mapping[str, float | None]) -> bool:
        if not self._best_key:
            return False
        if self._best_key not in values:
            raise Refused(
                f"checkpoint.best={self._best_key}:{self._best_way}: an evaluation gives {', '.join(sorted(values))}"
            )
        value = values[self._best_key]
        if value is None or not math.isfinite(value):
            return False
        return self._best is None or (value > self._best if self._best_way == "max" else value < self._best)

    def close(self) -> None:
        self._dropped.set()
        if self._thread:
            self._thread.join(5)

    def _settle(self) -> str | None:
        if self._number == 0:
            return None
        key = f"save/{self._number}/result"
        while not self._store.check([key]):
            time.sleep(POLL_S)
        # agreed on, so that rank 0, where the store may be, doesn't leave before the others have read it
        return self._world.agree(self._store.get(key).decode()) or None

    def _beating(self) -> None:
        if self._dropped.is_set():
            raise _Dropped
        self._beat()

    def _work(self, number: int, job: dict[str, Any]) -> None:
        try:
            self._post(number, self._part(job))
            if self._world.rank == 0:
                failure = self._commit(number, job)
                self._untold = failure
                self._store.set(f"save/{number}/result", failure or "")
        except _Dropped:
            pass

    def _part(self, job: dict[str, Any]) -> dict[str, Any]:
        try:
            aside = self._aside(job["step"])
            aside.mkdir(parents=True, exist_ok=True)
            return write_part(aside, self._world.rank, job["slices"], self._beating)
        except Exception as error:
            if isinstance(error, _Dropped):
                raise
            return {"failed": f"{type(error).__name__}: {error}"}

    def _aside(self, step: int) -> Path:
        target = folder_of(self._run, step)
        return target.with_name(f".{target.name}.tmp")

    def _post(self, number: int, part: dict[str, Any]) -> None:
        self._store.set(f"save/{number}/part/{self._world.rank}", zlib.compress(json.dumps(part).encode()))  # type: ignore[arg-type]

    def _commit(self, number: int, job: dict[str, Any]) -> str | None:
        aside = self._aside(job["step"])
        parts = []
        for rank in range(self._world.size):
            key = f"save/{number}/part/{rank}"
            while not self._store.check([key]):
                if self._dropped.is_set():
                    raise _Dropped
                time.sleep(POLL_S)
            parts.append(json.loads(zlib.decompress(self._store.get(key))))
            self._store.delete_key(key)
        try:
            for rank, part in enumerate(parts):
                if "failed" in part:
                    raise OSError(f"rank {rank}: {part['failed']}")
            manifest.write(aside, manifest.compose(job["header"], parts, job["values"]))
            target = folder_of(self._run, job["step"])
            shutil.rmtree(target, ignore_errors=True)
            aside.rename(target)
            manifest.sync(target.parent)
            self._saved.add(job["step"])
            if job["better"]:
                link = target.parent / ".best.tmp"
                link.unlink(missing_ok=True)
                link.symlink_to(target.name)
                os.replace(link, target.parent / "best")
        except Exception as error:
            shutil.rmtree(aside, ignore_errors=True)
            return f"step {job['step']}: {error}"
        return None


def clear_leftovers(run: RunDir) -> None:
    """Remove what dead attempts left half-written or half-deleted. Of rank 0, at the start."""
    for path in (run.path / "checkpoints").glob(".*"):
        shutil.rmtree(path, ignore_errors=True)
