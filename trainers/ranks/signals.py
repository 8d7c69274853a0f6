"""Record signals that ask for a stop; the training loop stops at the next step boundary. Torch-free."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class Stopped(BaseException):
    """A signal arrived while no step was in progress (see ``Stop.interrupting``)."""


class Stop:
    """Record the first of TERM, INT and USR2.

    Attributes:
        wanted: name of the signal that asked for the stop; None if there was none. The training loop shares it between
            the ranks once per step, so that all of them stop at the same step.
        hurry: a second INT (an impatient Ctrl-C) ends the process at once, with exit code 130. Off in workers, which
            may receive the same INT twice: from the terminal and from their launcher.
        installed: the signal handlers are installed, so the process is Isobatch's own and not an API caller's.
    """

    def __init__(self) -> None:
        self.wanted: str | None = None
        self._interrupts = 0
        self.hurry = True
        self.installed = False
        self._raises = False

    def install(self) -> Stop:
        """Install handlers for the three signals."""
        for number in SIGNALS:
            signal.signal(number, self._record)
        self.installed = True
        return self

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Raise Stopped for a signal received before or inside this block, which has no step to finish."""
        self._raises = True
        try:
            if self.wanted:
                raise Stopped(self.wanted)
            yield
        finally:
            self._raises = False

    def _record(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self.hurry and self._interrupts > 1:
            with suppress(OSError):  # a terminal that is gone
                show_cursor()
                os.write(2, b"isobatch: ended at once; progress since the last checkpoint isn't saved\n")
            os._exit(130)
        self.wanted = self.wanted or signal.Signals(number).name
        if self._raises:
            self._raises = False  # a second signal mustn't interrupt the handling of the first
            raise Stopped(self.wanted)


def signal_main_thread(pid: int, number: int) -> None:
    """Send a signal to the main thread of a process. If that is suspended, it handles the signal before it continues.

    A signal to the whole process may be handled by another thread, while the main thread already continues.
    """
    tgkill = getattr(ctypes.CDLL(None, use_errno=True), "tgkill", None)  # only Linux has it
    if tgkill is None:
        os.kill(pid, number)
    elif tgkill(pid, pid, number):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def show_cursor() -> None:
    """Show the terminal's cursor, which a killed worker's live line leaves hidden."""
    if sys.stdout.isatty():
        os.write(sys.stdout.fileno(), b"\x1b[?25h")


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Let the kernel signal this process when its parent ends for any reason, so that it is never orphaned."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG
