"""Follow metrics.jsonl for one tracker, in a process of its own.

    python -m isobatch.trainers.trackers.follow RUN_DIRECTORY TRACKER

sends a tracker the lines that it lacks, and ends. A training starts it with its process id as third argument; then it
follows the file until its standard input says that training has ended (``end STEP``), or until the training dies.
"""

from __future__ import annotations

import atexit
import fcntl
import json
import math
import os
import select
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from isobatch.conf.rundir.directory import RunDir
from isobatch.conf.rundir.files import holds_run
from isobatch.conf.rundir.outcome import EXIT_CODE, known_outcome
from isobatch.scaling.errors import UserError
from isobatch.scaling.reading import Unreadable, parse_json, read_yaml
from isobatch.trainers.ranks.signals import die_with_parent
from isobatch.trainers.tensors.names import checkpoints, step_of
from isobatch.trainers.trackers.tracker import Line, RunInfo, Tracker, make_tracker

POLL_S = 1.0  # between looks at the file, and between reports of progress
TAIL = 4096  # bytes by which a replaced file is recognized
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT, signal.SIGHUP)
Report = Callable[[int], None]  # called with the last step that was sent


class Steps:
    """Read metrics.jsonl as it grows; merge the lines of one step (a logged step and its evaluation) into one."""

    def __init__(self, file: Path) -> None:
        self._path, self._at, self._tail, self._lines = file, 0, b"", deque[Line]()

    def take(self, until: float, *, whole: bool) -> Iterator[Line]:
        """Yield the new lines up to step ``until``.

        Args:
            whole: the last step is complete; else it is kept back, as its evaluation may be yet to come.
        """
        self._read()
        while self._lines and self._lines[0]["step"] <= until and (whole or len(self._lines) > 1):
            yield self._lines.popleft()

    def _read(self) -> None:
        with open(self._path, "rb") as file:  # each time, as a network disk may replace it by the same content
            file.seek(self._at - len(self._tail))
            if file.read(len(self._tail)) != self._tail:
                raise RuntimeError(f"{self._path} was replaced")
            text = file.read()
        complete = text[: text.rfind(b"\n") + 1]
        self._at += len(complete)
        self._tail = (self._tail + complete)[-TAIL:]
        for part in complete.splitlines():
            with suppress(Unreadable, KeyError, TypeError):
                line = parse_json(part)
                if not isinstance(line["step"], int):
                    continue
                if self._lines and self._lines[-1]["step"] == line["step"]:
                    self._lines[-1] |= line
                else:
                    self._lines.append(line)


class Training:
    """Wait for the end of training, which standard input announces, and know which steps are safe.

    Args:
        follows: a training is in progress; else the files show all there is.
    """

    def __init__(self, run: RunDir, *, follows: bool) -> None:
        outcome = known_outcome(run.path)
        done = not follows and outcome is not None and outcome.state == "finished"
        self._run, self._said, self._last = run, b"", math.inf if done else -1.0
        self.ended = not follows

    def wait(self) -> None:
        """Wait until the next look, or until training has ended."""
        if not self.ended and select.select([0], [], [], POLL_S)[0]:
            self._said += os.read(0, 100)
            if not self._said:
                os._exit(1)  # the training is gone
            if self._said.endswith(b"\n"):
                self.ended, self._last = True, float(self._said.split()[-1])

    def safe(self, tracker: Tracker) -> float:
        """Return the last step that may be sent to ``tracker``: the one before the newest checkpoint can't be lost."""
        if getattr(tracker, "rewrites", False):
            return math.inf
        return max(self._last, max((step_of(path) for path in checkpoints(self._run)), default=0) - 1)


def follow(tracker: Tracker, info: RunInfo, training: Training, report: Report) -> None:
    """Send ``tracker`` all lines of a run that it lacks, until training has ended."""
    found = tracker.open(info)
    last = -1 if found is None else found
    flush = getattr(tracker, "flush", None)
    steps = Steps(info.directory / "metrics.jsonl")
    ended = False
    while not ended:
        report(last)
        training.wait()
        ended, reported = training.ended, time.monotonic()
        for line in steps.take(training.safe(tracker), whole=ended):
            if line["step"] > last:
                tracker.write(line)
                last = line["step"]
            if time.monotonic() - reported >= POLL_S:
                report(last)
                reported = time.monotonic()
        if flush:
            flush()
    report(last)
    tracker.close()


def main(arguments: list[str]) -> int:
    """Follow a run for one tracker, and return the exit code. A training gets progress and failure as JSON."""
    if len(arguments) not in (2, 3):
        print("usage: python -m isobatch.trainers.trackers.follow RUN_DIRECTORY TRACKER", file=sys.stderr)
        return EXIT_CODE["refused"]
    directory, name, *parent = arguments
    if parent:
        _belong_to(int(parent[0]))
    wire = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what packages print is for the log

    def tell(**content: Any) -> None:
        if parent:
            print(json.dumps(content), file=wire, flush=True)

    try:
        _send(RunDir(directory), name, follows=bool(parent), report=lambda step: tell(sent=step))
    except BaseException as error:
        refused = isinstance(error, UserError)
        if not refused:
            traceback.print_exc()
        cause = str(error) if refused else f"{type(error).__name__}: {error}"
        tell(failed=cause)
        if not parent:
            print(f"isobatch: {cause}", file=sys.stderr)
        return EXIT_CODE["refused" if refused else "crashed"]
    return 0


def _send(run: RunDir, name: str, *, follows: bool, report: Report) -> None:
    """Send a run's lines to the tracker ``name``. Raises UserError if there is no such run or tracker."""
    if not holds_run(run.path):
        raise UserError(f"{run.path} holds no run", "name a run directory")
    tracker = make_tracker(name, read_yaml(run.path / "config.yaml")["log"])
    run.logs.mkdir(exist_ok=True)
    with open(log_file(run, name), "a") as log:
        _lock(log)  # until the follower of an earlier start has ended
        follow(tracker, RunInfo.read(run.path), Training(run, follows=follows), report)


def log_file(run: RunDir, name: str) -> Path:
    """Return the file for what the tracker ``name`` prints."""
    return run.logs / f"tracker-{name}.log"


def _belong_to(parent: int) -> None:
    """Die with the training, leave its signals to it, and let it go first."""
    die_with_parent()
    if os.getppid() != parent:
        os._exit(1)
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED)
    with suppress(OSError):
        os.nice(10)


def _lock(file: IO[str]) -> None:
    with suppress(OSError):  # a disk without flock
        fcntl.flock(file, fcntl.LOCK_EX)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    atexit._run_exitfuncs()  # such as removing temporary folders
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # whatever threads a package has left
