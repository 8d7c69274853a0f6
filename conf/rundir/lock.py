"""Lock a run directory for one launch at a time, also on disks where flock doesn't exclude. Torch-free.

Two files form the lock. ``lock`` is held by flock, which ends with the processes that hold it. But some network disks
don't propagate it to other machines, and a user may remove the file. ``.owner`` names the owner. It is created
exclusively, and the owner updates its time every second. On the owner's machine, its process is looked up. Other
machines watch whether the time changes, and never compare it with their own clocks, which may differ. ``lock`` names
the owner, too, since a full disk may have no room for ``.owner``.
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

from isobatch.conf.rundir.files import identity_of, is_emptied, place_of
from isobatch.conf.rundir.outcome import known_outcome
from isobatch.conf.rundir.owner import OWNER, READ_BYTES, Owner, Seen, create, parse_owner
from isobatch.scaling.errors import UserError

LOCK = "lock"
LOCK_FD = "ISOBATCH_LOCK_FD"  # set for forked workers: the descriptor from their launcher's ``open_lock``
BEAT_S = 1.0  # between heartbeats of an owner
LOOKS = 2  # consecutive failed looks before the directory counts as gone, since a network disk may fail for a moment
DYING_S = 1.0  # for the processes of a killed launch to end
LEASE_S = 180.0  # after which a network disk drops the locks of a lost machine; NFS takes 90
SHOWN_S = 60.0  # for which an owner elsewhere is shown as running after a heartbeat, by this machine's clock
SILENT_S = 8.0  # without a heartbeat, after which an owner on another machine counts as dead


def open_lock(folder: Path) -> IO[str]:
    """Open the file that ``RunDir.lock`` locks, for this process and those forked from it.

    The lock lasts as long as any of these processes has the file open. So it lasts from one start of the workers to
    the next, and ends with the last process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return open(folder / LOCK, "a+")


def hold(lock: IO[str]) -> None:
    """Keep a lock until this process ends. Children that the task forks may live longer, so they close their copy."""
    os.register_at_fork(after_in_child=lock.close)  # this reference keeps the file open


class Lock:
    """This launch's lock on a run directory. ``file`` is the open lock file, which has the flock."""

    def __init__(self, folder: Path, file: IO[str], owner: Owner) -> None:
        self.folder, self.file, self.owner, self._by = folder, file, owner, os.getpid()
        self._identity = identity_of(folder)
        self._released = threading.Event()
        self._beating = threading.RLock()  # the heartbeat thread and the writers of events beat at once

    def known(self) -> Owner:
        """Return this launch, which has the flock, as owner. Its ``lock`` is 0 if the flock doesn't exclude."""
        if self.owner.lock and not _excludes(self.folder / LOCK):
            self.owner = replace(self.owner, lock=0)
        return self.owner

    def claim(self) -> bool:
        """Write this launch to ``.owner``. Return False if another launch is named there."""
        try:
            return create(self.folder / OWNER, self._text)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            return True  # on a full disk, rely on flock until there is space

    def record(self) -> None:
        """Write this launch to the lock file as well."""
        with suppress(OSError):  # the disk is full
            os.ftruncate(self.file.fileno(), 0)
            os.write(self.file.fileno(), self._text.encode())

    def recorded(self) -> Owner | None:
        """Return the last launch that was written to the lock file; None if it can't be read."""
        return parse_owner(os.pread(self.file.fileno(), READ_BYTES, 0).decode(errors="replace"))

    def keep(self, lost: Callable[[str], None]) -> None:
        """Start a thread that sends heartbeats, and calls ``lost`` with the cause if the directory is lost."""

        def send_heartbeats() -> None:
            failures = 0
            while not self._released.wait(BEAT_S):
                cause = self.beat()
                failures = failures + 1 if cause else 0
                if failures == LOOKS and not self._released.is_set():
                    lost(cause)
                    return

        threading.Thread(target=send_heartbeats, name="owner", daemon=True).start()

    def beat(self) -> str:
        """Send a heartbeat. Return why this launch has lost the directory, or ""."""
        with self._beating, suppress(OSError):  # a network disk may fail for a moment
            seen = Seen.of(self.folder)
            if not self._is_in_place():
                place = self.place
                return f"run directory {self.folder} was {f'moved to {place}' if place else 'deleted'} during the run"
            if is_emptied(self.folder):
                return f"run directory {self.folder} was emptied during the run"
            if seen is None:
                return "" if self._released.is_set() or self.claim() else self.beat()
            if seen.text != self._text:
                return f"another launch has taken run directory {self.folder} ({seen})"
            os.utime(self.folder / OWNER)
        return ""

    @property
    def place(self) -> Path | None:
        """Return the current path of the run directory; None if it is gone."""
        return self.folder if self._is_in_place() else place_of(self.file, self._identity)

    def release(self) -> None:
        """Remove ``.owner``, if this process created the lock."""
        self._released.set()
        if os.getpid() == self._by:
            with self._beating, suppress(OSError):
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

    def _is_in_place(self) -> bool:
        """Return whether the path still leads to the directory that was locked."""
        try:
            return identity_of(self.folder) == self._identity or self._is_named()  # some network disks change inodes
        except (FileNotFoundError, NotADirectoryError):
            return False


def works(folder: Path) -> bool:
    """Return whether a launch works in ``folder``, as far as this machine can tell."""
    with suppress(OSError), open(folder / LOCK) as file:
        if not _flocked(file, fcntl.LOCK_SH):
            return True
        seen = Seen.of(folder)
        if seen and seen.owner and not _has_ended(folder, seen.owner):
            observer = Lock(folder, file, Owner.here(folder, file, os.getpid(), "", "", 0))
            lives = seen.owner.lives(observer.known())
            return abs(time.time() - seen.time_ns / 1e9) < SHOWN_S if lives is None else lives
    return False


def become_owner(lock: Lock, launches: Collection[str]) -> None:
    """Wait until this launch is the owner. Raises UserError if another launch turns out to be running."""
    began, met, first, since = time.monotonic(), False, None, 0.0  # ``first``: the current owner as first seen
    while True:
        waited_s = time.monotonic() - began
        if not _flocked(lock.file):
            _refuse_flocked(lock, waited_s)
        elif (seen := Seen.of(lock.folder)) is None:
            lock.known()
            recorded = known_outcome(lock.folder) if not met and waited_s < LOOKS * BEAT_S else None
            # if the file was removed, an owner that still works writes it again
            if (recorded is None or recorded.state != "running") and lock.claim():
                return
        else:
            met, lives = True, _lives(seen.owner, lock, launches) if seen.owner else None
            if lives is None:  # only a heartbeat can show it
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
    """Raise UserError if another process isn't about to release its flock."""
    seen = Seen.of(lock.folder)
    holder = seen.owner if seen else lock.recorded()
    earlier = holder and holder.is_earlier_start_of(lock.owner)
    if waited_s > (LEASE_S if earlier else DYING_S):
        raise _refusal(lock.folder, str(holder or "it just started"))


def _refusal(folder: Path, holder: str) -> UserError:
    fix = "wait for it, stop it, or start another run beside it with run.new=true"
    return UserError(f"another launch works in {folder} ({holder})", fix, "run.dir", str(folder))


def _lives(owner: Owner, lock: Lock, launches: Collection[str]) -> bool | None:
    """Return whether ``owner`` is another running launch; None if this machine can't tell."""
    own = lock.known()
    same = owner.attempt in launches or owner.same_launch(own) or owner.is_earlier_start_of(own)
    return False if same or _has_ended(lock.folder, owner) else owner.lives(own)


def _has_ended(folder: Path, owner: Owner) -> bool:
    """Return whether ``owner`` has recorded its final state."""
    recorded = known_outcome(folder)
    return recorded is not None and recorded.attempt == owner.attempt and recorded.state != "running"


def _flocked(file: IO[str], kind: int = fcntl.LOCK_EX) -> bool:
    """Take the flock. Return False if another process has it, and True also on a disk without flock."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    return True


def _excludes(path: Path) -> bool:
    """Return whether this process's flock on ``path`` excludes a second one."""
    with suppress(OSError), open(path, "r+") as again:  # NFS locks only writable files
        try:
            fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
