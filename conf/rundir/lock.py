"""The lock on a run directory: one launch works there at a time, also where flock excludes nobody. Torch-free.

Two files say so. ``lock`` is held by flock, which ends with the processes that hold it; but some network disks don't
pass it on to other machines, and a user may remove the file. ``.owner`` names the owner. It is created exclusively, and
the owner renews its time every second. On the owner's machine its process is looked for. Elsewhere the file is watched
until its time changes or has been still for a while: clocks of machines differ, so none is compared.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO

from isobatch.conf.rundir.owner import OWNER, Owner, Seen, create

LOCK = "lock"
BEAT_S = 1.0  # between two signs of life of an owner
LOOKS = 2  # in a row that find the directory gone before it is believed: a network disk may have a bad moment
REMOVED = " (deleted)"  # behind the path of an open file that was removed


class Lock:
    """The hold of this launch on a run directory.

    Args:
        file: the open lock file, which has the flock.
    """

    def __init__(self, folder: Path, file: IO[str], owner: Owner) -> None:
        self.folder, self.file, self.owner, self._by = folder, file, owner, os.getpid()
        self._identity = identity_of(folder)
        self._released = threading.Event()

    @property
    def _text(self) -> str:
        return json.dumps(asdict(self.owner))

    def known(self) -> Owner:
        """Return this launch, once it has the flock; the flock is left out where it excludes nobody."""
        if self.owner.lock and not excludes(self.folder / LOCK):
            self.owner = replace(self.owner, lock=0)
        return self.owner

    def claim(self) -> bool:
        """Name this launch as the owner; False where another one is named."""
        try:
            return create(self.folder / OWNER, self._text)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            return True  # on a full disk flock has to do, until there is room

    def keep(self, lost: Callable[[str], None]) -> None:
        """Show signs of life in a thread from now on; call ``lost`` with the cause where the directory is lost."""
        threading.Thread(target=self._keep, args=(lost,), name="owner", daemon=True).start()

    def _keep(self, lost: Callable[[str], None]) -> None:
        wrong = 0
        while not self._released.wait(BEAT_S):
            cause = self.beat()
            wrong = wrong + 1 if cause else 0
            if wrong == LOOKS and not self._released.is_set():
                lost(cause)
                return

    def beat(self) -> str:
        """Show a sign of life; return why the directory isn't this launch's any more, or ""."""
        try:
            seen = Seen.of(self.folder)
            if not self._is_there():
                place = self.place
                return f"run directory {self.folder} was {f'moved to {place}' if place else 'deleted'} during the run"
            if not _has_files(self.folder):
                return f"run directory {self.folder} was emptied during the run"
            if seen is None:
                return "" if self.claim() else self.beat()
            if seen.text != self._text:
                return f"another launch has taken run directory {self.folder} ({seen})"
            os.utime(self.folder / OWNER)
        except OSError:  # of a network disk, for a moment
            pass
        return ""

    @property
    def place(self) -> Path | None:
        """Return where the run directory is now; None if it is gone."""
        return self.folder if self._is_there() else place_of(self.file, self._identity)

    def release(self) -> None:
        """Give the directory up, where this process took it."""
        self._released.set()
        if os.getpid() == self._by:
            with suppress(OSError):
                seen = Seen.of(self.folder)
                if seen and seen.text == self._text:
                    (self.folder / OWNER).unlink()

    def close(self) -> None:
        self.release()
        self.file.close()

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _is_there(self) -> bool:
        """Return whether the path still leads to the directory that was taken."""
        try:
            if identity_of(self.folder) == self._identity:
                return True
        except (FileNotFoundError, NotADirectoryError):
            return False
        seen = Seen.of(self.folder)  # some network disks number their files anew
        return seen is not None and seen.text == self._text


def flocked(file: IO[str], kind: int = fcntl.LOCK_EX) -> bool:
    """Return whether this process gets, or has, the flock; or the disk has none, and excludes nobody."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    return True


def excludes(path: Path) -> bool:
    """Return whether the flock on ``path``, which this process has, keeps another out."""
    try:
        with open(path, "r+") as again:  # NFS locks only what can be written
            fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def remove(folder: Path, seen: Seen) -> None:
    """Remove a dead owner's ``.owner``, unless it is another's by now."""
    grave = folder / f"{OWNER}.{uuid.uuid4().hex}"
    with suppress(FileNotFoundError):
        (folder / OWNER).rename(grave)
        if (text := grave.read_text(errors="replace")) != seen.text:
            create(folder / OWNER, text)
        grave.unlink()


def identity_of(folder: Path) -> tuple[int, int]:
    there = folder.stat()
    return there.st_dev, there.st_ino


def place_of(file: IO[str], identity: tuple[int, int]) -> Path | None:
    """Return where the directory is now in which ``file`` was opened; None where it is gone or empty."""
    with suppress(OSError):
        link = os.readlink(f"/proc/self/fd/{file.fileno()}")
        path = Path(link.removesuffix(REMOVED)).parent
        if (not link.endswith(REMOVED) or identity_of(path) == identity) and _has_files(path):
            return path
    return None


def _has_files(folder: Path) -> bool:
    """Return whether ``folder`` has more of a run than its lock."""
    return any((folder / name).exists() for name in ("outcome.json", "config.yaml", "plan.json", "submissions"))
