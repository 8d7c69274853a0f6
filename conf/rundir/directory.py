"""The run directory: the files by which launchers, workers and Slurm scripts know of each other. Torch-free."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal, get_args

from isobatch.conf.rundir.lock import BEAT_S, LOCK, LOOKS, Lock, Watched, flocked, remove
from isobatch.conf.rundir.owner import OWNER, Owner, Seen
from isobatch.scaling.errors import UserError
from isobatch.scaling.reading import read_json

State = Literal["running", "finished", "stopped", "refused", "oom", "crashed"]

OF_RUNS = ("outcome.json", "config.yaml", "events.jsonl", "submissions")  # any of them makes a folder a run's
LOCK_FD = "ISOBATCH_LOCK_FD"  # in the environment of forked workers: what ``open_lock`` gave their launcher
DYING_S = 1.0  # for the processes of a launch that was just killed to be gone
SHOWN_S = 60.0  # since its last sign of life, by this machine's clock, that an owner elsewhere is shown as running
UNUSABLE = (None, errno.EISDIR, errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENXIO)  # None: a pipe can't be read back
LEASE_S = 180.0  # after which a network disk gives up the locks of a machine that is gone; NFS takes 90

EXIT_CODE: dict[State, int] = {"finished": 0, "refused": 2, "stopped": 75, "oom": 1, "crashed": 1, "running": 1}


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt at a run ended (or that it is ``running``); the content of ``outcome.json``.

    Attributes:
        step, samples: optimizer steps and samples completed.
        attempt: id of this start of the command; ``restarts`` counts the agent's restarts within it.
    """

    state: State
    cause: str
    step: int
    samples: int
    attempt: str
    restarts: int = 0

    @property
    def exit_code(self) -> int:
        return EXIT_CODE[self.state]

    @classmethod
    def of(cls, fields: Any) -> Outcome:
        """Checked reading. Raises ValueError for anything but what ``outcome.json`` holds."""
        kinds = {"state": str, "cause": str, "step": int, "samples": int, "attempt": str, "restarts": int}
        if not isinstance(fields, dict) or any(type(fields.get(key)) is not kind for key, kind in kinds.items()):
            raise ValueError(f"not an outcome: {fields!r:.200}")
        if fields["state"] not in get_args(State):
            raise ValueError(f"not a state of a run: {fields['state']!r:.200}")
        if not all(0 <= fields[key] < 2**63 for key in ("step", "samples", "restarts")):
            raise ValueError(f"not an outcome: a count in {fields!r:.200}")
        return cls(**{key: fields[key] for key in kinds})


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write under a temporary name in the same folder, fsync, rename: readers see all of it or the old file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def hold(lock: IO[str]) -> None:
    """Keep a lock until this process ends, and no longer: what a task forks may outlive it, and closes its copy."""
    os.register_at_fork(after_in_child=lock.close)  # which keeps the file open here


def _fits(file: Path, content: str) -> bool:
    """On a full disk: whether the file that is there has room for this."""
    return file.exists() and file.stat().st_blocks * 512 >= len(content)


class RunDir:
    """Paths and small files of one run."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.held: Lock | None = None  # by this process, or the launcher of it

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def final(self) -> Path:
        return self.path / "final"

    def outcome(self) -> Outcome | None:
        """What ``outcome.json`` says; None if there is none.

        Raises:
            UserError: the file is damaged.
        """
        file = self.path / "outcome.json"
        try:
            return Outcome.of(read_json(file))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise UserError(f"{file} is damaged ({error}); move it away, or name another run.dir") from None

    @property
    def begun(self) -> bool:
        """The folder holds a run, however far it came."""
        return any(os.path.exists(self.path / name) for name in OF_RUNS)

    def refuse_foreign(self) -> None:
        """A run begins in an empty folder or in a run's own, so that nobody's files are taken for an old run's.

        Raises:
            UserError: the folder holds something, but no run.
        """
        if self.begun or not self.path.is_dir():
            return
        ours = (LOCK, OWNER, ".config.yaml.", ".outcome.json.")  # of a start that was killed at once
        links = {path for path in (self.checkpoints, self.final) if path.is_symlink()}  # to another disk
        if foreign := sorted(path.name for path in {*self.path.iterdir()} - links if not path.name.startswith(ours)):
            shown = ", ".join(foreign[:3]) + ", …" * (len(foreign) > 3)
            raise UserError(f"run.dir={self.path} holds no run, but {shown}; name an empty folder or a new one")

    def write_outcome(self, outcome: Outcome) -> None:
        """Set ``outcome.json``. ``stopped`` never replaces another end of the same attempt.

        On a disk that is full to the last byte it is written into the place that the file there has.
        """
        if outcome.state == "stopped":
            before = self.outcome()
            if before and before.attempt == outcome.attempt and before.state not in ("running", "stopped"):
                return
        file, content = self.path / "outcome.json", json.dumps(asdict(outcome), indent=1) + "\n"
        try:
            write_atomic(file, content)
        except OSError:
            if not _fits(file, content):
                raise
            with open(file, "r+b", buffering=0) as there:  # in one call: whoever is killed leaves no half of each
                there.write(content.encode().ljust(file.stat().st_size))

    def event(self, event: str, **fields: Any) -> None:
        """Append a line to ``events.jsonl``: one write of one line, so that a reader never sees half of another's."""
        line = json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, **fields}) + "\n"
        with open(self.path / "events.jsonl", "ab", buffering=0) as file:
            file.write(line.encode())

    def await_attempt(self, attempt: str, within_s: float = 30.0) -> None:
        """Wait until what rank 0 wrote at the start can be read here; a network disk may take a moment.

        Raises:
            UserError: it can't, so this machine doesn't share the disk.
        """
        deadline = time.monotonic() + within_s
        while (seen := self.outcome()) is None or (seen.attempt != attempt and seen.state != "finished"):
            if time.monotonic() > deadline:
                raise UserError(
                    f"{socket.gethostname()} doesn't see what rank 0 wrote to {self.path}: run.dir has to be on a disk "
                    "that all nodes share"
                )
            time.sleep(0.05)

    def open_lock(self) -> IO[str]:
        """The file that ``lock`` locks, to be handed on to processes that are forked from this one.

        What one of them locks stays locked as long as any of them, or this one, has it open: so between two starts of
        the workers, too, and no longer than there is one of them, however they end.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        return open(self.path / LOCK, "a+")

    def works(self) -> bool:
        """Return whether some launch has the directory now, as far as this machine can tell."""
        try:
            with open(self.path / LOCK) as file:
                if not flocked(file, fcntl.LOCK_SH):
                    return True
                seen = Seen.of(self.path)
                if seen is None or seen.owner is None or self._is_over(seen.owner):
                    return False
                asking = Lock(self.path, file, Owner.here(self.path, file, os.getpid(), "", "", 0))
                lives = seen.owner.lives(asking.known())
                return abs(time.time() - seen.time_ns / 1e9) < SHOWN_S if lives is None else lives
        except (OSError, UserError):
            return False

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
            file = os.fdopen(os.dup(int(handed_on)), "a+") if handed_on else self.open_lock()
            owner = Owner.here(self.path, file, os.getppid() if handed_on else os.getpid(), attempt, job, restart)
            lock, watched, began = Lock(self.path, file, owner), Watched(), time.monotonic()
            while not self._taken(lock, launches, watched, began):
                time.sleep(0.02)
        except OSError as error:
            if error.errno not in UNUSABLE:
                raise
            raise UserError(
                f"{LOCK} or {OWNER} in {self.path} can't be used ({error}): they have to be files that can be written; "
                "remove them where no launch works there"
            ) from error
        file.truncate(0)
        file.write(str(owner))
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
        """This directory where it is now, if it was moved during the run; None where it is gone."""
        place = self.held.place if self.held else self.path
        return RunDir(place) if place else None

    def _taken(self, lock: Lock, launches: Collection[str], watched: Watched, began: float) -> bool:
        """Take the directory if it is free. Raises UserError once it is known that it won't be."""
        waited_s = time.monotonic() - began
        if not flocked(lock.file):
            lock.file.seek(0)
            holder = lock.file.read().strip()
            before = re.search(rf", job {re.escape(lock.owner.job)} start (\d+)$", holder)
            ours = before is not None and int(before[1]) < lock.owner.job_restart
            if waited_s > (LEASE_S if ours else DYING_S):
                raise self._refusal(holder or "it just started")
            return False
        seen, mine = Seen.of(self.path), lock.known()
        if seen is None:
            if self._attempt_at_work() and not watched.met and waited_s < LOOKS * BEAT_S:
                return False  # its owner names itself again, where somebody removed the file
            return lock.claim()
        watched.met, there = True, seen.owner
        if there and (there.attempt in launches or there.same_launch(mine) or self._is_over(there, mine)):
            lives: bool | None = False
        else:
            lives = there.lives(mine) if there else None
        if lives is None:
            lives = watched.lives(seen)
            if lives:
                raise self._refusal(f"{seen}; its heartbeat was seen")
        if lives is False:
            remove(self.path, seen)
        elif lives and waited_s > DYING_S:
            raise self._refusal(str(seen))
        return False

    def _refusal(self, holder: str) -> UserError:
        return UserError(
            f"another launch works in {self.path} ({holder}); wait for it, stop it, or start another run beside it "
            "with run.new=true"
        )

    def _attempt_at_work(self) -> bool:
        with suppress(UserError):
            return (outcome := self.outcome()) is not None and outcome.state == "running"
        return False

    def _is_over(self, owner: Owner, mine: Owner | None = None) -> bool:
        """Return whether an owner has said how it ended, or was an earlier start of the job that ``mine`` is of."""
        if mine and mine.job and owner.job == mine.job and owner.job_restart < mine.job_restart:
            return True
        with suppress(UserError):
            outcome = self.outcome()
            return outcome is not None and outcome.attempt == owner.attempt and outcome.state != "running"
        return False
