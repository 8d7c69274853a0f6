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
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO

from isobatch.conf.rundir.files import holds_run, identity_of, place_of
from isobatch.conf.rundir.outcome import known_outcome
from isobatch.conf.rundir.owner import OWNER, Owner, Seen, create
from isobatch.scaling.errors import UserError

LOCK = "lock"
LOCK_FD = "ISOBATCH_LOCK_FD"  # in the environment of forked workers: what ``open_lock`` gave their launcher
BEAT_S = 1.0  # between two signs of life of an owner
LOOKS = 2  # in a row that find the directory gone before it is believed: a network disk may have a bad moment
DYING_S = 1.0  # for the processes of a launch that was just killed to be gone
LEASE_S = 180.0  # after which a network disk gives up the locks of a machine that is gone; NFS takes 90
SHOWN_S = 60.0  # since its last sign of life, by this machine's clock, that an owner elsewhere is shown as running
SILENT_S = 8.0  # without a sign of life, after which an owner on another machine is dead


def open_lock(folder: Path) -> IO[str]:
    """Open the file that ``RunDir.lock`` locks, to be handed on to processes that are forked from this one.

    What one of them locks stays locked as long as any of them, or this one, has it open: so between two starts of the
    workers, too, and no longer than there is one of them, however they end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return open(folder / LOCK, "a+")


def hold(lock: IO[str]) -> None:
    """Keep a lock until this process ends, and no longer: what a task forks may outlive it, and closes its copy."""
    os.register_at_fork(after_in_child=lock.close)  # which keeps the file open here


class Lock:
    """The hold of this launch on a run directory; ``file``: the open lock file, which has the flock."""

    def __init__(self, folder: Path, file: IO[str], owner: Owner) -> None:
        self.folder, self.file, self.owner, self._by = folder, file, owner, os.getpid()
        self._identity = identity_of(folder)
        self._released = threading.Event()

    def known(self) -> Owner:
        """Return this launch, once it has the flock; the flock is left out where it excludes nobody."""
        if self.owner.lock and not _excludes(self.folder / LOCK):
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

        def beat_on() -> None:
            wrong = 0
            while not self._released.wait(BEAT_S):
                cause = self.beat()
                wrong = wrong + 1 if cause else 0
                if wrong == LOOKS and not self._released.is_set():
                    lost(cause)
                    return

        threading.Thread(target=beat_on, name="owner", daemon=True).start()

    def beat(self) -> str:
        """Show a sign of life; return why the directory isn't this launch's any more, or ""."""
        with suppress(OSError):  # of a network disk, for a moment
            seen = Seen.of(self.folder)
            if not self._is_there():
                place = self.place
                return f"run directory {self.folder} was {f'moved to {place}' if place else 'deleted'} during the run"
            if not holds_run(self.folder):
                return f"run directory {self.folder} was emptied during the run"
            if seen is None:
                return "" if self.claim() else self.beat()
            if seen.text != self._text:
                return f"another launch has taken run directory {self.folder} ({seen})"
            os.utime(self.folder / OWNER)
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
                if self._is_named():
                    (self.folder / OWNER).unlink()

    def close(self) -> None:
        self.release()
        self.file.close()

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _text(self) -> str:
        return json.dumps(asdict(self.owner))

    def _is_named(self) -> bool:
        seen = Seen.of(self.folder)
        return seen is not None and seen.text == self._text

    def _is_there(self) -> bool:
        """Return whether the path still leads to the directory that was taken."""
        try:
            return identity_of(self.folder) == self._identity or self._is_named()  # some network disks number anew
        except (FileNotFoundError, NotADirectoryError):
            return False


def works(folder: Path) -> bool:
    """Tell whether some launch has ``folder`` now, as far as this machine can tell."""
    with suppress(OSError, UserError), open(folder / LOCK) as file:
        if not _flocked(file, fcntl.LOCK_SH):
            return True
        seen = Seen.of(folder)
        if seen and seen.owner and not _has_ended(folder, seen.owner):
            asking = Lock(folder, file, Owner.here(folder, file, os.getpid(), "", "", 0))
            lives = seen.owner.lives(asking.known())
            return abs(time.time() - seen.time_ns / 1e9) < SHOWN_S if lives is None else lives
    return False


def become_owner(lock: Lock, launches: Collection[str]) -> None:
    """Wait until this launch is the owner. Raises UserError once it is known that it won't be."""
    began, met, first, since = time.monotonic(), False, None, 0.0  # ``first``: how the present owner was first seen
    while True:
        waited_s = time.monotonic() - began
        if not _flocked(lock.file):
            _refuse_flocked(lock, waited_s)
        elif (seen := Seen.of(lock.folder)) is None:
            lock.known()
            told = known_outcome(lock.folder) if not met and waited_s < LOOKS * BEAT_S else None
            # An owner that works names itself again, where somebody removed the file.
            if (told is None or told.state != "running") and lock.claim():
                return
        else:
            met, lives = True, _lives(seen.owner, lock, launches) if seen.owner else None
            if lives is None:  # only its heartbeat can tell
                if first is None or seen.text != first.text:
                    first, since = seen, time.monotonic()
                if seen.time_ns != first.time_ns:
                    raise _refusal(lock.folder, f"{seen}; its heartbeat was seen")
                lives = False if time.monotonic() - since > SILENT_S else None
            if lives is False:
                seen.remove(lock.folder)
            elif lives and waited_s > DYING_S:
                raise _refusal(lock.folder, str(seen))
        time.sleep(0.02)


def _refuse_flocked(lock: Lock, waited_s: float) -> None:
    """Raise UserError where the flock of another process won't be given up soon."""
    seen = Seen.of(lock.folder)
    before = seen and seen.owner and seen.owner.is_earlier_start_of(lock.owner)
    if waited_s > (LEASE_S if before else DYING_S):
        raise _refusal(lock.folder, str(seen or "it just started"))


def _refusal(folder: Path, holder: str) -> UserError:
    fix = "wait for it, stop it, or start another run beside it with run.new=true"
    return UserError(f"another launch works in {folder} ({holder})", fix, "run.dir", str(folder))


def _lives(owner: Owner, lock: Lock, launches: Collection[str]) -> bool | None:
    """Tell whether an owner is another launch that works; None where that can't be told from here."""
    mine = lock.known()
    ours = owner.attempt in launches or owner.same_launch(mine) or owner.is_earlier_start_of(mine)
    return False if ours or _has_ended(lock.folder, owner) else owner.lives(mine)


def _has_ended(folder: Path, owner: Owner) -> bool:
    """Tell whether an owner has said how it ended."""
    told = known_outcome(folder)
    return told is not None and told.attempt == owner.attempt and told.state != "running"


def _flocked(file: IO[str], kind: int = fcntl.LOCK_EX) -> bool:
    """Return whether this process gets, or has, the flock; or the disk has none, and excludes nobody."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    return True


def _excludes(path: Path) -> bool:
    """Return whether the flock on ``path``, which this process has, keeps another out."""
    with suppress(OSError), open(path, "r+") as again:  # NFS locks only what can be written
        try:
            fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
