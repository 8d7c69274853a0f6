"""Read and write the owner of a run directory in ``.owner``, and check whether it is alive. Torch-free."""

from __future__ import annotations

import os
import socket
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pydantic import TypeAdapter, ValidationError

OWNER = ".owner"
READ_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Owner:
    """Describe the launch that owns a run directory, as stored in ``.owner``.

    Attributes:
        pid: process id of the launcher; ``started``: its start in kernel ticks, since process ids are reused.
        job, job_restart: the scheduler's job id ("" without one), and how often the job was restarted.
        boot, namespace: ids of the machine's boot and of its process id namespace.
        folder, lock: inodes of the run directory and of its lock file; ``lock`` is 0 if flock doesn't exclude.
        attempt: as in ``outcome.json``; ``token``: unique id of this start.
    """

    host: str
    pid: int
    since: str
    job: str
    job_restart: int
    started: int
    boot: str
    namespace: str
    folder: int
    lock: int
    attempt: str
    token: str

    @classmethod
    def here(cls, folder: Path, file: IO[str], pid: int, attempt: str, job: str, job_restart: int) -> Owner:
        """Describe the launch with process id ``pid`` on this machine, which opened ``folder``'s lock as ``file``."""
        host, boot, namespace = socket.gethostname(), socket.gethostname(), ""
        with suppress(OSError):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            namespace = os.readlink("/proc/self/ns/pid")
        since, token, started = time.strftime("%Y-%m-%d %H:%M:%S"), uuid.uuid4().hex, _started(pid) or 0
        inodes = folder.stat().st_ino, os.fstat(file.fileno()).st_ino
        return cls(host, pid, since, job, job_restart, started, boot, namespace, *inodes, attempt, token)

    def __str__(self) -> str:
        job = f", job {self.job} start {self.job_restart}" if self.job else ""
        return f"host {self.host}, pid {self.pid}, since {self.since}{job}"

    def same_launch(self, other: Owner) -> bool:
        return (self.boot, self.namespace, self.pid, self.started) == (
            other.boot, other.namespace, other.pid, other.started,
        )  # fmt: skip

    def is_earlier_start_of(self, other: Owner) -> bool:
        """Return whether this is an earlier, already ended start of the job of ``other``."""
        return bool(self.job) and self.job == other.job and self.job_restart < other.job_restart

    def lives(self, observer: Owner) -> bool | None:
        """Return whether this owner is alive; None if ``observer`` can't tell.

        Args:
            observer: a launch that has the flock. A live owner on the same machine would still have it.
        """
        if self.boot != observer.boot:
            return None
        same_folder = self.folder == observer.folder  # else it was copied with the directory
        if same_folder and observer.lock and self.lock == observer.lock:
            return False
        if self.namespace != observer.namespace or (started := _started(self.pid)) == 0:
            return None
        if started != self.started:
            return False
        return True if same_folder else None


_ADAPTER = TypeAdapter(Owner)


def parse_owner(text: str) -> Owner | None:
    """Return the owner stored as ``text``; None if it can't be parsed."""
    with suppress(ValidationError):
        return _ADAPTER.validate_json(text, strict=True)
    return None


@dataclass(frozen=True, slots=True)
class Seen:
    """Hold the content of ``.owner``: its text, its time, and the owner, or None if the text can't be parsed."""

    text: str
    time_ns: int
    owner: Owner | None

    @classmethod
    def of(cls, folder: Path) -> Seen | None:
        """Read the owner of ``folder``; None if there is none. Raises OSError, also if the file is a link."""
        try:
            descriptor = os.open(folder / OWNER, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        try:
            text = os.read(descriptor, READ_BYTES).decode(errors="replace")
            return cls(text, os.fstat(descriptor).st_mtime_ns, parse_owner(text))
        finally:
            os.close(descriptor)

    def __str__(self) -> str:
        return str(self.owner) if self.owner else "it just started"

    def remove(self, folder: Path) -> None:
        """Remove the ``.owner`` of this dead owner, unless another owner has replaced it."""
        removed = folder / f"{OWNER}.{uuid.uuid4().hex}"
        with suppress(FileNotFoundError):
            (folder / OWNER).rename(removed)
            if (text := removed.read_text(errors="replace")) != self.text:
                create(folder / OWNER, text)
            removed.unlink()


def create(path: Path, text: str) -> bool:
    """Create a file exclusively, also over a network. Return False if it exists."""
    try:
        file = open(path, "xb", buffering=0)  # noqa: SIM115  closed below
    except FileExistsError:
        return False
    try:
        with file:
            file.write(text.encode())
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True


def _started(pid: int) -> int | None:
    """Return the start of a process in kernel ticks; 0 if unknown; None if there is no such process."""
    with suppress(OSError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else int(fields[18])
    with suppress(OSError):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
    return 0
