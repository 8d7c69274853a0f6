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
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from isobatch.conf.rundir.directory import RunDir
from isobatch.conf.rundir.outcome import EXIT_CODE, known_outcome
from isobatch.scaling.reading import Unreadable, parse_json, read_yaml
from isobatch.trainers.ranks.signals import die_with_parent
from isobatch.trainers.tensors.names import checkpoints, step_of
from isobatch.trainers.trackers.tracker import Line, RunInfo, Tracker, make_tracker

POLL_S = 1.0  # between looks at the file
BATCH = 200  # lines between reports
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT, signal.SIGHUP)
Report = Callable[[str, Any], None]


class Steps:
    """Read metrics.jsonl as it grows; merge the lines of one step (a logged step and its evaluation) into one."""

    def __init__(self, file: Path) -> None:
        self._path, self._file = file, open(file, "rb")  # noqa: SIM115  open until this process ends
        self._part, self._lines = b"", deque[Line]()

    def take(self, until: float, *, whole: bool) -> Iterator[Line]:
        """Yield the new lines up to step ``until``.

        Args:
            whole: the last step is complete; else it is kept back, as its evaluation may be yet to come.
        """
        self._read()
        while self._lines and self._lines[0]["step"] <= until and (whole or len(self._lines) > 1):
            yield self._lines.popleft()

    def _read(self) -> None:
        if os.stat(self._path).st_ino != os.fstat(self._file.fileno()).st_ino:
            raise RuntimeError(f"{self._path} was replaced")
        *complete, self._part = (self._part + self._file.read()).split(b"\n")
        for text in complete:
            with suppress(Unreadable, KeyError, TypeError):
                line = parse_json(text)
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
        self._run, self._said = run, b""
        outcome = known_outcome(run.path)
        done = outcome is not None and outcome.state == "finished"
        self.ended_at: float | None = None if follows else math.inf if done else self._saved

    def wait(self) -> None:
        """Wait until the next look, or until training has ended."""
        if self.ended_at is None and select.select([0], [], [], POLL_S)[0]:
            self._said += os.read(0, 100)
            if not self._said:
                os._exit(1)  # the training is gone
            if self._said.endswith(b"\n"):
                self.ended_at = float(self._said.split()[-1])

    def safe(self, tracker: Tracker) -> float:
        """Return the last step that may be sent to ``tracker``."""
        if getattr(tracker, "rewrites", False):
            return math.inf
        return self._saved if self.ended_at is None else self.ended_at

    @property
    def _saved(self) -> float:
        """Return the step before the newest checkpoint: a resume from there can't lose it."""
        return max((step_of(path) for path in checkpoints(self._run)), default=0) - 1


def follow(tracker: Tracker, info: RunInfo, training: Training, report: Report) -> None:
    """Send ``tracker`` all lines of a run that it lacks, until training has ended."""
    found = tracker.open(info)
    last = -1 if found is None else found
    flush = getattr(tracker, "flush", None)
    steps, count, ended = Steps(info.directory / "metrics.jsonl"), 0, False
    report("sent", last)
    while not ended:
        training.wait()
        ended = training.ended_at is not None
        for line in steps.take(training.safe(tracker), whole=ended):
            if line["step"] > last:
                tracker.write(line)
                last, count = line["step"], count + 1
                if count % BATCH == 0:
                    report("sent", last)
        if flush:
            flush()
        report("sent", last)
    tracker.close()


def main(arguments: list[str]) -> int:
    """Follow a run for one tracker, and return the exit code. A failure is reported on standard output, as JSON."""
    if len(arguments) not in (2, 3):
        print("usage: python -m isobatch.trainers.trackers.follow RUN_DIRECTORY TRACKER", file=sys.stderr)
        return EXIT_CODE["refused"]
    directory, name, *parent = arguments
    if parent:
        _belong_to(int(parent[0]))
    wire = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what packages print is for the log

    def report(key: str, value: Any) -> None:
        if parent or key == "failed":
            print(json.dumps({key: value}) if parent else f"isobatch: {name} {value}", file=wire, flush=True)

    with open(directory_log(Path(directory), name), "a") as log:
        _lock(log)  # until the follower of an earlier start has ended
        try:
            config = read_yaml(Path(directory) / "config.yaml")
            info = RunInfo.read(Path(directory))
            tracker = make_tracker(name, config["log"])
            follow(tracker, info, Training(RunDir(directory), follows=bool(parent)), report)
        except BaseException as error:
            traceback.print_exc()
            report("failed", f"{type(error).__name__}: {error}")
            return EXIT_CODE["crashed"]
    return 0


def directory_log(directory: Path, name: str) -> Path:
    """Return the file for what a tracker prints."""
    return directory / "logs" / f"tracker-{name}.log"


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
