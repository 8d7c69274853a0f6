"""Start, watch and end the followers of a training, on rank 0: nothing that a tracker does reaches the training."""

from __future__ import annotations

import json
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

from isobatch.conf.rundir.directory import RunDir
from isobatch.conf.rundir.outcome import Outcome
from isobatch.scaling.errors import UserError
from isobatch.scaling.limits import one_line
from isobatch.trainers.loop.metrics import tell
from isobatch.trainers.model.targets import check_call, locate
from isobatch.trainers.ranks.session import Session, raise_on_all
from isobatch.trainers.trackers.follow import IGNORED, directory_log
from isobatch.trainers.trackers.tracker import names

if TYPE_CHECKING:
    from isobatch.trainers.data.state import TrainState

IDLE_S, MOST_S = 30.0, 120.0  # waiting for a tracker at the end of training: without progress, and at all
STOPPING_S = 5.0  # the same after a signal to stop: the next start sends the rest
LONGEST_RETRY_S = 60.0
LOOK_S = 1.0


class Followers:
    """Run a follower for each tracker of ``run``; None, on ranks other than 0, has no followers.

    As a context manager, it ends the followers at once after an error.
    """

    def __init__(self, run: RunDir | None, session: Session) -> None:
        self._run, self._session = run, session
        self._followers: list[Follower] = []

    @property
    def ready(self) -> bool:
        """True once each tracker is open."""
        return all(follower.opened for follower in self._followers)

    def start(self) -> None:
        """Start following metrics.jsonl, which has the lines that this attempt resumes from."""
        if self._run:
            self._followers = [Follower(self._run, name) for name in names(self._session.config.log)]
        for follower in self._followers:
            follower.start()

    def finish(self, outcome: Outcome, state: TrainState) -> None:
        """Let the followers send the rest, and give up those that don't.

        Args:
            outcome: the end of this attempt; its steps can't be lost any more.
        """
        owed = state.evaluation_owed and outcome.state != "finished"
        last = math.inf if outcome.state == "finished" else outcome.step - owed
        for follower in self._followers:
            follower.finish(last)
        began, stop = time.monotonic(), self._session.stop
        while any(follower.is_alive() for follower in self._followers):
            self._session.watch.beat()
            late = time.monotonic() - began
            hurry = outcome.state != "finished" or stop.wanted
            for follower in self._followers:
                if late > (STOPPING_S if hurry else MOST_S) or follower.idle_s > IDLE_S:
                    follower.give_up()
            if late > MOST_S + STOPPING_S:
                break  # not even a kill ends a process that waits for a dead disk
            time.sleep(0.02)
        for follower in self._followers:
            follower.report_end()

    def __enter__(self) -> Followers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for follower in self._followers:
            follower.give_up()


class Follower(threading.Thread):
    """Keep one tracker's follower process running until it has sent all lines; restart it after a failure.

    The process dies with the thread that starts it (see die_with_parent), which is this one.

    Attributes:
        opened: the tracker has been opened.
    """

    def __init__(self, run: RunDir, name: str) -> None:
        super().__init__(name=f"tracker-{name}", daemon=True)
        self.opened = False
        self._run, self._tracker = run, name
        self._process: subprocess.Popen[bytes] | None = None
        self._last: float | None = None  # the last step to send, once training has ended
        self._ended, self._given_up, self._lock = threading.Event(), threading.Event(), threading.Lock()
        self._moved, self._sent, self._failure, self._complete = time.monotonic(), -1, "", False

    @property
    def idle_s(self) -> float:
        """Return the seconds since the tracker's last progress."""
        return time.monotonic() - self._moved

    def run(self) -> None:
        """Start the process, again after each failure, until it succeeds, or fails after the end of training."""
        signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)  # for the process, until it ignores them
        failures = 0
        while not self._complete and not self._given_up.is_set():
            tries_last = self._ended.is_set()
            try:
                cause = self._follow()
            except OSError as error:  # no memory for a process, no disk for its log
                cause = str(error)
            self._complete = cause == ""
            if not self._complete and not self._given_up.is_set():
                self._warn(cause)
                if tries_last:
                    return
                failures += 1
                self._ended.wait(min(LONGEST_RETRY_S, 2.0**failures))

    def finish(self, last: float) -> None:
        """Tell the process that training has ended, and that the steps up to ``last`` can't be lost."""
        with self._lock:
            self._last = last
            self._tell_end()
        self._moved = time.monotonic()
        self._ended.set()

    def give_up(self) -> None:
        """Kill the process, and what it has started."""
        self._given_up.set()
        self._ended.set()
        with self._lock:
            self._kill()

    def report_end(self) -> None:
        """Report lines that weren't sent."""
        if not self._complete:
            cause = self._failure or "it made no progress"
            command = f"python -m isobatch.trainers.trackers.follow {self._run.path} {self._tracker}"
            self._tell(
                f"was given up after step {max(0, self._sent)} ({cause}); the next start sends the rest, or {command}"
            )

    def _follow(self) -> str:
        """Run the process to its end; return why it failed, or an empty string."""
        self._spawn()
        process, cause, part = self._process, "", b""
        assert process
        assert process.stdout
        pipe = process.stdout.fileno()
        while True:
            ended = process.poll() is not None  # before the last read, which then has all there is
            readable = select.select([pipe], [], [], 0 if ended else LOOK_S)[0]
            text = os.read(pipe, 1 << 16) if readable else b""
            *lines, part = (part + text).split(b"\n")
            for line in lines:
                cause = self._handle_report(json.loads(line)) or cause
            if not text and (ended or readable):
                break
        code = process.wait()
        with self._lock:
            self._kill()  # what it may have left
            process.stdout.close()
            self._process = None
        if code == 0:
            return ""
        return cause or (f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}")

    def _spawn(self) -> None:
        path = os.pathsep.join(entry for entry in sys.path if entry)
        words = ["-P", "-m", "isobatch.trainers.trackers.follow", str(self._run.path), self._tracker, str(os.getpid())]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with open(directory_log(self._run.path, self._tracker), "ab") as log, self._lock:
            if self._given_up.is_set():
                raise OSError("given up")
            self._process = subprocess.Popen(
                [sys.executable, *words],
                env={**os.environ, "PYTHONPATH": path},
                stderr=log,
                start_new_session=True,
                bufsize=0,
                **pipes,
            )
            self._tell_end()

    def _tell_end(self) -> None:
        if self._process and self._process.stdin and self._last is not None:
            with suppress(OSError):  # it has just ended
                self._process.stdin.write(f"end {self._last}\n".encode())

    def _handle_report(self, report: dict[str, Any]) -> str:
        """Record the progress in a report of the process; return the failure in it, or an empty string."""
        self._moved = time.monotonic()
        self.opened |= "sent" in report
        self._sent = max(self._sent, report.get("sent", -1))
        return str(report.get("failed", ""))

    def _kill(self) -> None:
        if self._process:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _warn(self, cause: str) -> None:
        """Warn of the first failure."""
        cause = one_line(cause)[:300]
        if not self._failure and not self._ended.is_set():
            log = directory_log(self._run.path, self._tracker)
            self._tell(f"failed: {cause} (see {log}); training continues, and the tracker is tried again")
        self._failure = cause

    def _tell(self, text: str) -> None:
        tell(self._run, "warning", f"tracker {self._tracker} {text}", tracker=self._tracker)


def refuse_bad_tracker(session: Session) -> None:
    """Raise UserError on all ranks if rank 0 can't import ``log._target_``, or can't call it with its arguments."""
    log = session.config.log
    if not log.target:
        return
    error = None
    if session.world.rank == 0:
        try:
            made = locate("log._target_", log.target)
            if missing := [name for name in ("open", "write", "close") if not hasattr(made, name)]:
                problem = f"log._target_={log.target} has no {', '.join(missing)}"
                raise UserError(problem, "a tracker has open, write and close", "log._target_", log.target)
            check_call("log.args", log.target, made, (), log.own_args)
        except UserError as caught:
            error = caught
    raise_on_all(session.world, error)
