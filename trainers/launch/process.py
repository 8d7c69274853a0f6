"""Start, watch and kill one worker process from its agent."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from isobatch.conf.rundir.lock import LOCK_FD, hold
from isobatch.trainers.ranks.failure import KILLED_HINT, Failure
from isobatch.trainers.ranks.notes import GRACE_S
from isobatch.trainers.ranks.signals import Stop, die_with_parent, signal_main_thread
from isobatch.trainers.ranks.watch import Watch

LOOK_S = 0.1  # between an agent's looks at its workers
SUSPENDED = "suspended (by SIGSTOP, or a debugger)"


class WorkerProcess:
    """Run ``work(*args, watch)`` in a process that has ``env`` in its environment and dies with this process.

    Args:
        context: multiprocessing's ``fork`` or ``spawn`` context.
        stop: records signals in the worker, and holds a signal that this process received before.
    """

    def __init__(
        self, context: Any, rank: int, env: dict[str, str], stop: Stop, work: Callable[..., Any], args: tuple[Any, ...]
    ) -> None:
        self.rank = rank
        self._watch, self._signalled, self._seen_alive = Watch(context), False, time.time()
        self._process = context.Process(target=_child, args=(env, os.getpid(), stop, self._watch, work, args))
        self._process.start()
        self.pid, self.sentinel = int(self._process.pid), int(self._process.sentinel)  # ready once it has ended

    @property
    def code(self) -> int | None:
        """Return the exit code, negative for the signal that ended the worker; None if it hasn't ended."""
        return self._process.exitcode  # type: ignore[no-any-return]

    def forward_signal(self, name: str) -> None:
        """Send the worker a signal once, as soon as it handles signals."""
        if self._watch.started and not self._signalled:
            os.kill(self.pid, signal.Signals[name])
            self._signalled = True
            self._watch.reset()

    def look(self, timeout_s: float) -> str | None:
        """Check the worker, every ``LOOK_S``. Return the problem if it hangs and can't detect that itself.

        A worker can't if it is suspended, holds the interpreter's lock, or ignores a signal before it trains.
        """
        self._seen_alive = time.time()
        silent_s = self._watch.look() * LOOK_S
        if silent_s < timeout_s + GRACE_S or not (self._watch.training or self._signalled):
            return None
        state = SUSPENDED if self.suspended else "it hung"
        return f"{state}: no sign of life within cluster.timeout_s={timeout_s:g}"

    @property
    def suspended(self) -> bool:
        with suppress(OSError):
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
        return False

    def death(self) -> str | None:
        """Return the signal or exit code that ended the worker; None if it succeeded or hasn't ended."""
        if not (code := self.code):
            return None
        cause = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        return cause + (KILLED_HINT if code == -signal.SIGKILL else "")

    def failure(self, cause: str, *, silent: bool = False) -> Failure:
        """Describe the worker's failure, its progress, and when it was last seen alive."""
        return Failure(self.rank, cause, silent=silent, reached=self._watch.reached, time=self._seen_alive)

    def show_stacks(self) -> None:
        """Let the worker and its data loaders write their stacks, from where they are if they are suspended."""
        for pid in (self.pid, *self._children()):
            with suppress(ProcessLookupError, PermissionError):
                signal_main_thread(pid, signal.SIGQUIT)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGCONT)

    def _children(self) -> list[int]:
        """Return the process ids of the worker's children in its process group, such as its data loaders."""
        found = []
        with suppress(OSError):
            for child in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split():
                with suppress(ProcessLookupError):
                    if os.getpgid(int(child)) == self.pid:
                        found.append(int(child))
        return found

    def kill(self, within_s: float) -> None:
        """Kill the worker and its data loaders."""
        self._process.kill()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.join(within_s)


def _child(
    env: dict[str, str], parent: int, stop: Stop, watch: Watch, work: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.setsid()  # Ctrl-C reaches only the launcher, which forwards it
    die_with_parent()
    if os.getppid() != parent:
        os._exit(1)
    os.environ.update(env)
    if LOCK_FD in env:
        hold(os.fdopen(int(env[LOCK_FD])))
    signal.signal(signal.SIGQUIT, signal.SIG_IGN)  # until a log for stacks is open
    stop.hurry = False
    stop.install()
    watch.beat()
    work(*args, watch)
