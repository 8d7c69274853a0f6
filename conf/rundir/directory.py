"""The run directory: the files by which launchers, workers and Slurm scripts know of each other. Torch-free."""

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
    """Paths and small files of one run; ``held``: the lock on it, where this process or its launcher has taken it."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.logs, self.checkpoints, self.final = (self.path / name for name in ("logs", "checkpoints", "final"))
        self.held: Lock | None = None

    def outcome(self) -> Outcome | None:
        """Return what ``outcome.json`` says; None if there is none. Raises UserError where it is damaged."""
        try:
            return read_outcome(self.path)
        except Unreadable as error:
            problem = f"{self.path / 'outcome.json'} is damaged ({error})"
            raise UserError(problem, "move it away, or name another run.dir", "run.dir") from None

    def refuse_foreign(self) -> None:
        """Raise UserError for a folder that holds something, but no run: nobody's files are taken for an old run's."""
        if holds_run(self.path) or not self.path.is_dir():
            return
        ours = (LOCK, OWNER, ".config.yaml.", ".outcome.json.")  # of a start that was killed at once
        links = {path for path in (self.checkpoints, self.final) if path.is_symlink()}  # to another disk
        if foreign := sorted(path.name for path in {*self.path.iterdir()} - links if not path.name.startswith(ours)):
            shown = ", ".join(foreign[:3]) + ", …" * (len(foreign) > 3)
            problem = f"run.dir={self.path} holds no run, but {shown}"
            raise UserError(problem, "name an empty folder or a new one", "run.dir", str(self.path))

    def write_outcome(self, outcome: Outcome) -> None:
        """Set ``outcome.json``. ``stopped`` never replaces another end of the same attempt.

        On a disk that is full to the last byte it is written into the space that the old file has.
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
            with open(file, "r+b", buffering=0) as there:  # in one call: whoever is killed leaves no half of each
                there.write(content.ljust(file.stat().st_size))

    def event(self, event: str, **fields: Any) -> None:
        """Append a line to ``events.jsonl`` in one write, so that a reader never sees half a line.

        Raises:
            OSError: the disk is full, or the directory isn't this launch's any more.
        """
        if gone := self.gone:
            raise FileNotFoundError(gone)
        line = json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, **fields}) + "\n"
        with open(self.path / "events.jsonl", "ab", buffering=0) as file:
            file.write(line.encode())

    def await_attempt(self, attempt: str, within_s: float = 30.0) -> None:
        """Wait until what rank 0 wrote can be read here. Raises UserError where this machine has another disk."""
        deadline = time.monotonic() + within_s
        while (seen := self.outcome()) is None or (seen.attempt != attempt and seen.state != "finished"):
            if time.monotonic() > deadline:
                problem = f"{socket.gethostname()} doesn't see what rank 0 wrote to {self.path}"
                raise UserError(problem, "run.dir has to be on a disk that all nodes share", "run.dir", str(self.path))
            time.sleep(0.05)

    def lock(self, job: str = "", restart: int = 0, attempt: str = "", launches: Collection[str] = ()) -> Lock:
        """Take the directory for this launch, until the returned lock and those it was handed on from are closed.

        Args:
            job: a scheduler's, that this launch is of, and how often that was restarted. A start of the same job before
                this one isn't at work any more, but the disk may not know that yet, if its machine was lost.
            attempt: of this launch; ``launches``: those of all machines of it, of which any may have had it.

        Raises:
            UserError: another launch has it, and which; or its files can't be used.
        """
        handed_on = os.environ.get(LOCK_FD)
        try:
            file = os.fdopen(os.dup(int(handed_on)), "a+") if handed_on else open_lock(self.path)
            pid = os.getppid() if handed_on else os.getpid()
            lock = Lock(self.path, file, Owner.here(self.path, file, pid, attempt, job, restart))
            become_owner(lock, launches)
        except OSError as error:
            if error.errno not in UNUSABLE:
                raise
            problem = f"{LOCK} or {OWNER} in {self.path} can't be used ({error})"
            fix = "they have to be files that can be written; remove them where no launch works there"
            raise UserError(problem, fix, "run.dir", str(self.path)) from error
        file.truncate(0)
        file.write(str(lock.owner))
        file.flush()
        self.held = lock
        return lock

    @property
    def gone(self) -> str:
        """Return why the directory isn't this launch's any more, as far as this process can tell; else ""."""
        if self.held:
            return self.held.beat()
        return "" if self.path.is_dir() else f"run directory {self.path} was moved or deleted during the run"

    @property
    def now(self) -> RunDir | None:
        """Return this directory where it is now, if it was moved during the run; None where it is gone."""
        place = self.held.place if self.held else self.path
        return RunDir(place) if place else None
