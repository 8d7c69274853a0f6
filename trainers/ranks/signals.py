"""Record the signals that ask for a stop, which is answered at the next step boundary. Torch-free."""

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
    """A signal came while there was nothing to finish (see ``Stop.interrupting``)."""


class Stop:
    """Record the first of TERM, INT and USR2.

    Attributes:
        wanted: name of the signal that asked for the stop; None while there was none. The training loop shares it
            between the ranks once a step, so that all of them stop at the same one.
        hurry: a second INT (an impatient Ctrl-C) ends the process at once, with 130. Off in workers: they may get one
            INT from the terminal and the same again from their launcher.
        installed: this process handles the signals, so it is ours and not an API caller's.
    """

    def __init__(self) -> None:
        self.wanted: str | None = None
        self._interrupts = 0
        self.hurry = True
        self.installed = False
        self._raises = False

    def install(self) -> Stop:
        """Handle the three signals from now on, in this process."""
        for number in SIGNALS:
            signal.signal(number, self._record)
        self.installed = True
        return self

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Raise Stopped where a signal came before or comes within: there is no step yet to wait for."""
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
                os.write(2, b"isobatch: ended at once; what was done since the last checkpoint isn't saved\n")
            os._exit(130)
        self.wanted = self.wanted or signal.Signals(number).name
        if self._raises:
            self._raises = False  # once: a second signal doesn't interrupt what the first one set off
            raise Stopped(self.wanted)


def show_cursor() -> None:
    """Show a terminal's cursor again, which the live line of a worker that was killed can't do itself."""
    if sys.stdout.isatty():
        os.write(sys.stdout.fileno(), b"\x1b[?25h")


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Let the kernel signal this process when the one that forked it ends, however it ends: nothing is orphaned."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG
