"""The run directory, through whose files launchers, workers and Slurm scripts communicate. Torch-free."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from isobatch.conf.rundir.files import holds_run, write_atomic
from isobatch.conf.rundir.lock import LOCK, LOCK_FD, Lock, become_owner, open_lock
from isobatch.conf.rundir.outcome import Outcome, read_outcome
from isobatch.conf.rundir.owner import OWNER, Owner
from isobatch.scaling.errors import UserError
from isobatch.scaling.reading import Unreadable

UNUSABLE = (None, errno.EISDIR, errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENXIO)  # None: a pipe can't be read back


class RunDir:
    """The paths and small files of one run. ``held`` is the lock, if this process or its launcher has taken it."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.logs, self.checkpoints, self.final = (self.path / name for name in ("logs", "checkpoints", "final"))
        self.held: Lock | None = None

    def outcome(self) -> Outcome | None:
        """Return the content of ``outcome.json``; None if there is none. Raises UserError if it is damaged."""
        try:
            return read_outcome(self.path)
        except Unreadable as error:
            problem = f"{self.path / 'outcome.json'} is damaged ({error})"
            raise UserError(problem, "move it away, or give another run.dir", "run.dir") from None

    def refuse_foreign(self) -> None:
        """Raise UserError for a folder with files but no run, so that foreign files are never mixed with a run's."""
        if holds_run(self.path) or not self.path.is_dir():
            return
        early = (LOCK, OWNER, ".config.yaml.", ".outcome.json.", "tune")  # left by a start that was killed, and tuning
        links = {path for path in (self.checkpoints, self.final) if path.is_symlink()}  # to another disk
        if foreign := sorted(path.name for path in {*self.path.iterdir()} - links if not path.name.startswith(early)):
            shown = ", ".join(foreign[:3]) + ", …" * (len(foreign) > 3)
            problem = f"run.dir={self.path} holds no run, but {shown}"
            raise UserError(problem, "give an empty or a new folder", "run.dir", str(self.path))

    def write_outcome(self, outcome: Outcome) -> None:
        """Write ``outcome.json``. ``stopped`` never replaces another final state of the same attempt.

        If the disk is completely full, the space of the old file is overwritten.
        """
        if outcome.state == "stopped":
            before = self.outcome()
            if before and before.attempt == outcome.attempt and before.state not in ("running", "stopped"):
                return
        file, content = self.path / "outcome.json", (json.dumps(asdict(outcome), indent=1) + "\n").encode()
        try:
            write_atomic(file, content)
        except OSError:
            if not file.exists() or file.stat().st_blocks * 512 < len(content):
                raise
            with open(file, "r+b", buffering=0) as existing:  # one call, so that a kill can't leave a mix of both
                existing.write(content.ljust(file.stat().st_size))

    def event(self, event: str, **fields: Any) -> None:
        """Append a line to ``events.jsonl`` in one write, so that a reader never sees half a line.

        Raises:
            OSError: the disk is full, or this launch has lost the directory.
        """
        if gone := self.gone:
            raise FileNotFoundError(gone)
        line = json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, **fields}) + "\n"
        with open(self.path / "events.jsonl", "ab", buffering=0) as file:
            file.write(line.encode())

    def await_attempt(self, attempt: str, within_s: float = 30.0) -> None:
        """Wait until rank 0's outcome can be read here. Raises UserError if this machine uses another disk."""
        deadline = time.monotonic() + within_s
        while (seen := self.outcome()) is None or (seen.attempt != attempt and seen.state != "finished"):
            if time.monotonic() > deadline:
                problem = f"{socket.gethostname()} can't see the files that rank 0 wrote to {self.path}"
                raise UserError(problem, "put run.dir on a disk shared by all nodes", "run.dir", str(self.path))
            time.sleep(0.05)

    def lock(self, job: str = "", restart: int = 0, attempt: str = "", launches: Collection[str] = ()) -> Lock:
        """Lock the directory for this launch, until the returned lock and the lock it was inherited from are closed.

        Args:
            job: the scheduler's job of this launch; ``restart``: how often that was restarted. Earlier starts of the
                job have ended, though the disk may still hold their lock if their machine was lost.
            attempt: id of this launch; ``launches``: ids on all of its machines, any of which may hold the lock.

        Raises:
            UserError: another launch holds the lock, or the lock's files can't be used.
        """
        inherited = os.environ.get(LOCK_FD)
        try:
            file = os.fdopen(os.dup(int(inherited)), "a+") if inherited else open_lock(self.path)
            pid = os.getppid() if inherited else os.getpid()
            lock = Lock(self.path, file, Owner.here(self.path, file, pid, attempt, job, restart))
            become_owner(lock, launches)
        except OSError as error:
            if error.errno not in UNUSABLE:
                raise
            problem = f"{LOCK} or {OWNER} in {self.path} can't be used ({error})"
            fix = "make them writable files, or remove them if no launch works there"
            raise UserError(problem, fix, "run.dir", str(self.path)) from error
        lock.record()
        self.held = lock
        return lock

    @property
    def gone(self) -> str:
        """Return why this launch has lost the directory; "" if it hasn't."""
        if self.held:
            return self.held.beat()
        return "" if self.path.is_dir() else f"run directory {self.path} was moved or deleted during the run"

    @property
    def now(self) -> RunDir | None:
        """Return this directory at its current path, in case it was moved during the run; None if it is gone."""
        place = self.held.place if self.held else self.path
        return RunDir(place) if place else None
