"""Taking a run directory: who has it, whether that launch still works, and how this one gets it. Torch-free."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from isobatch.conf.rundir.lock import BEAT_S, LOCK, LOOKS, Lock, flocked, remove
from isobatch.conf.rundir.outcome import Outcome
from isobatch.conf.rundir.owner import OWNER, Owner, Seen
from isobatch.scaling.errors import UserError

LOCK_FD = "ISOBATCH_LOCK_FD"  # in the environment of forked workers: what ``open_lock`` gave their launcher
DYING_S = 1.0  # for the processes of a launch that was just killed to be gone
LEASE_S = 180.0  # after which a network disk gives up the locks of a machine that is gone; NFS takes 90
SHOWN_S = 60.0  # since its last sign of life, by this machine's clock, that an owner elsewhere is shown as running
SILENT_S = 8.0  # without a sign of life, after which an owner on another machine is dead
UNUSABLE = (None, errno.EISDIR, errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENXIO)  # None: a pipe can't be read back


def open_lock(folder: Path) -> IO[str]:
    """Open the file that ``take`` locks, to be handed on to processes that are forked from this one.

    What one of them locks stays locked as long as any of them, or this one, has it open: so between two starts of the
    workers, too, and no longer than there is one of them, however they end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return open(folder / LOCK, "a+")


def hold(lock: IO[str]) -> None:
    """Keep a lock until this process ends, and no longer: what a task forks may outlive it, and closes its copy."""
    os.register_at_fork(after_in_child=lock.close)  # which keeps the file open here


def take(folder: Path, job: str = "", restart: int = 0, attempt: str = "", launches: Collection[str] = ()) -> Lock:
    """Take ``folder`` for this launch, until the returned lock and those it was handed on from are closed.

    Args:
        job: a scheduler's, that this launch is of, and how often that was restarted. A start of the same job before
            this one isn't at work any more, but the disk may not know that yet, if its machine was lost.
        attempt: of this launch; ``launches``: those of all machines of it, of which any may have had it.

    Raises:
        UserError: another launch has it, and which; or its files can't be used.
    """
    handed_on = os.environ.get(LOCK_FD)
    try:
        file = os.fdopen(os.dup(int(handed_on)), "a+") if handed_on else open_lock(folder)
        owner = Owner.here(folder, file, os.getppid() if handed_on else os.getpid(), attempt, job, restart)
        taking = _Taking(Lock(folder, file, owner), launches)
        while not taking.done():
            time.sleep(0.02)
    except OSError as error:
        if error.errno not in UNUSABLE:
            raise
        problem = f"{LOCK} or {OWNER} in {folder} can't be used ({error})"
        fix = "they have to be files that can be written; remove them where no launch works there"
        raise UserError(problem, fix, "run.dir", str(folder)) from error
    file.truncate(0)
    file.write(str(owner))
    file.flush()
    return taking.lock


def works(folder: Path) -> bool:
    """Tell whether some launch has ``folder`` now, as far as this machine can tell."""
    try:
        with open(folder / LOCK) as file:
            if not flocked(file, fcntl.LOCK_SH):
                return True
            seen = Seen.of(folder)
            if seen is None or seen.owner is None or _has_ended(folder, seen.owner):
                return False
            asking = Lock(folder, file, Owner.here(folder, file, os.getpid(), "", "", 0))
            lives = seen.owner.lives(asking.known())
            return abs(time.time() - seen.time_ns / 1e9) < SHOWN_S if lives is None else lives
    except (OSError, UserError):
        return False


@dataclass
class _Taking:
    """Try to take a directory until it is known whether it is free.

    Attributes:
        began: when; ``met``: there was an owner.
        first, since: what was seen first of the present owner, and when.
    """

    lock: Lock
    launches: Collection[str]
    began: float = field(default_factory=time.monotonic)
    met: bool = False
    first: Seen | None = None
    since: float = 0.0

    def done(self) -> bool:
        """Take the directory if it is free. Raises UserError once it is known that it won't be."""
        waited_s = time.monotonic() - self.began
        if not flocked(self.lock.file):
            self._refuse_flocked(waited_s)
            return False
        seen, mine = Seen.of(self.lock.folder), self.lock.known()
        if seen is None:
            outcome = _outcome(self.lock.folder) if not self.met and waited_s < LOOKS * BEAT_S else None
            # An owner that works names itself again, where somebody removed the file.
            return self.lock.claim() if outcome is None or outcome.state != "running" else False
        self.met, lives = True, self._lives(seen.owner, mine) if seen.owner else None
        if lives is None and (lives := self._shows_life(seen)):
            raise self._refusal(f"{seen}; its heartbeat was seen")
        if lives is False:
            remove(self.lock.folder, seen)
        elif lives and waited_s > DYING_S:
            raise self._refusal(str(seen))
        return False

    def _refuse_flocked(self, waited_s: float) -> None:
        """Raise UserError where the flock of another process won't be given up soon."""
        self.lock.file.seek(0)
        holder, mine = self.lock.file.read().strip(), self.lock.owner
        before = re.search(rf", job {re.escape(mine.job)} start (\d+)$", holder)
        ours = before is not None and int(before[1]) < mine.job_restart
        if waited_s > (LEASE_S if ours else DYING_S):
            raise self._refusal(holder or "it just started")

    def _lives(self, owner: Owner, mine: Owner) -> bool | None:
        """Tell whether an owner is another launch that works; None where that can't be told from here."""
        before = mine.job and owner.job == mine.job and owner.job_restart < mine.job_restart
        ours = owner.attempt in self.launches or owner.same_launch(mine) or before
        return False if ours or _has_ended(self.lock.folder, owner) else owner.lives(mine)

    def _shows_life(self, seen: Seen) -> bool | None:
        """Tell whether an owner elsewhere has shown a sign of life, or been silent for long; None until then."""
        if self.first is None or seen.text != self.first.text:
            self.first, self.since = seen, time.monotonic()
        if seen.time_ns != self.first.time_ns:
            return True
        return False if time.monotonic() - self.since > SILENT_S else None

    def _refusal(self, holder: str) -> UserError:
        problem = f"another launch works in {self.lock.folder} ({holder})"
        fix = "wait for it, stop it, or start another run beside it with run.new=true"
        return UserError(problem, fix, "run.dir", str(self.lock.folder))


def _has_ended(folder: Path, owner: Owner) -> bool:
    """Tell whether an owner has said how it ended."""
    outcome = _outcome(folder)
    return outcome is not None and outcome.attempt == owner.attempt and outcome.state != "running"


def _outcome(folder: Path) -> Outcome | None:
    with suppress(UserError):
        return Outcome.read(folder)
    return None
