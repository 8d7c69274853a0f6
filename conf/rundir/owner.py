"""The owner of a run directory, as ``.owner`` there names it, and whether it is still at work. Torch-free."""

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
    """Describe the launch that has a directory, as ``.owner`` does.

    Attributes:
        pid: of the launcher; ``started``: when, in the kernel's ticks, since process ids are used again.
        job, job_restart: of a scheduler's job, and how often that was restarted; "" outside of one.
        boot, namespace: of the machine and of its process ids.
        folder, lock: inodes of the run directory and of its lock file; ``lock`` is 0 where flock excludes nobody.
        attempt: as in ``outcome.json``; ``token``: of this start alone.
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
        """Describe the launch ``pid`` of this machine, which has opened ``file`` as the lock of ``folder``."""
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
        """Tell whether both are starts of one job, of which this one isn't at work any more."""
        return bool(self.job) and self.job == other.job and self.job_restart < other.job_restart

    def lives(self, mine: Owner) -> bool | None:
        """Tell whether this owner is at work; None where that can't be told from here.

        Args:
            mine: the launch that asks, which has the flock: on this machine an owner that lives would still have it.
        """
        if self.boot != mine.boot:
            return None
        here = self.folder == mine.folder  # else it was copied with the directory
        if here and mine.lock and self.lock == mine.lock:
            return False
        if self.namespace != mine.namespace or (started := _started(self.pid)) == 0:
            return None
        if started != self.started:
            return False
        return True if here else None


_ADAPTER = TypeAdapter(Owner)


@dataclass(frozen=True, slots=True)
class Seen:
    """Hold ``.owner`` as it was found: its text, its time, and the owner, None where the text can't be parsed."""

    text: str
    time_ns: int
    owner: Owner | None

    @classmethod
    def of(cls, folder: Path) -> Seen | None:
        """Look at the owner of ``folder``; None where there is none. Raises OSError, also where it is a link."""
        try:
            descriptor = os.open(folder / OWNER, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        try:
            text, owner = os.read(descriptor, READ_BYTES).decode(errors="replace"), None
            with suppress(ValidationError):
                owner = _ADAPTER.validate_json(text, strict=True)
            return cls(text, os.fstat(descriptor).st_mtime_ns, owner)
        finally:
            os.close(descriptor)

    def __str__(self) -> str:
        return str(self.owner) if self.owner else "it just started"

    def remove(self, folder: Path) -> None:
        """Remove this owner's ``.owner``, since it is dead, unless it is another's by now."""
        grave = folder / f"{OWNER}.{uuid.uuid4().hex}"
        with suppress(FileNotFoundError):
            (folder / OWNER).rename(grave)
            if (text := grave.read_text(errors="replace")) != self.text:
                create(folder / OWNER, text)
            grave.unlink()


def create(path: Path, text: str) -> bool:
    """Write a file that wasn't there; False where it was. Of all who try, also over a network, one succeeds."""
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
    """Return when a process started, in the kernel's ticks; 0 if unknown; None if there is no such process."""
    with suppress(OSError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else int(fields[18])
    with suppress(OSError):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
    return 0
