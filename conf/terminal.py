"""Print to streams that may close or whose disk may be full. Torch-free."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from isobatch.scaling.limits import printable

SLOW_S = 2.0  # after which people wonder whether something hangs


class Unwritable(OSError):
    """The answer to a command couldn't be printed."""


class Patient(io.FileIO):
    """A stream whose writes never fail: where a terminal is closed or a disk is full, only what is printed is lost.

    Attributes:
        failure: the first write that failed.
    """

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failure = self.failure or error
            return memoryview(data).nbytes


def secure_streams() -> None:
    """Make writes to stdout and stderr harmless whatever becomes of them, also where user code prints.

    A closed stream is reopened on /dev/null, since the next opened file would get its descriptor and its output.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
    for name, descriptor, errors in (("stdout", 1, "replace"), ("stderr", 2, "backslashreplace")):
        before = getattr(sys, name)
        encoding, by_line = (before.encoding, before.line_buffering) if before else ("utf-8", True)
        raw = io.BufferedWriter(Patient(descriptor, "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(raw, encoding, errors, line_buffering=by_line))
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115


def say(text: str, to: TextIO | None = None, end: str = "\n") -> None:
    """Print ``text``, by default to stdout; do nothing if that fails."""
    with suppress(OSError, ValueError):
        print(printable(text), end=end, file=to or sys.stdout, flush=True)


def tell_torchrun(cause: str) -> None:
    """Put ``cause`` into the report with which torchrun ends, below ours, after a worker failed."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with suppress(OSError), open(file, "x") as report:
            # a second early: torchrun takes the earliest for the root cause, and knows whole seconds only
            extra = {"timestamp": int(time.time()) - 1}
            json.dump({"message": {"message": printable(cause), "extraInfo": extra}}, report)


@contextmanager
def say_if_slow(text: str, to: TextIO | None = None) -> Iterator[None]:
    """Print ``text`` where the body takes longer than ``SLOW_S``."""
    timer = threading.Timer(SLOW_S, say, (text, to))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def first() -> bool:
    """Return whether this process is the first of those given the command: ranks of torchrun, nodes of a job."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def say_once(text: str) -> None:
    """Print ``text`` in the first of the processes that were given the command."""
    if first():
        say(text)


def answer_once(text: str) -> None:
    """Print the answer to a command in the first of the processes. Raises Unwritable if that fails."""
    if first():
        answer(text)


def answer(text: str, end: str = "\n") -> None:
    """Print the answer to a command.

    Raises:
        Unwritable: printing failed.
    """
    print(printable(text), end=end, flush=True)
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if failure := getattr(raw, "failure", None):
        said = "" if isinstance(failure, BrokenPipeError) else f"the output can't be written: {failure.strerror}"
        raise Unwritable(said)
