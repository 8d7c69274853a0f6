"""Start, watch and end the followers of a training, on rank 0: nothing that a tracker does reaches the training."""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import subprocess
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

from isobatch.conf.command import command_of
from isobatch.conf.rundir.directory import RunDir
from isobatch.conf.rundir.outcome import Outcome
from isobatch.scaling.errors import UserError
from isobatch.scaling.limits import one_line
from isobatch.trainers.loop.metrics import tell
from isobatch.trainers.model.targets import check_call, locate
from isobatch.trainers.ranks.notes import GRACE_S
from isobatch.trainers.ranks.session import Session, raise_on_all
from isobatch.trainers.trackers.follow import IGNORED, log_file
from isobatch.trainers.trackers.tracker import draw_id, names

if TYPE_CHECKING:
    from isobatch.trainers.data.state import TrainState

IDLE_S, MOST_S = 30.0, 120.0  # waiting for a tracker at the end of training: without progress, and at all
STOPPING_S = 5.0  # the same after a signal to stop: the next start sends the rest
CRASHED_S = GRACE_S - 0.5  # after another rank's failure this rank is killed after GRACE_S


class Followers:
    """Run a follower for each tracker of ``run``; None, on ranks other than 0, has no followers.

    As a context manager, it lets the followers send the rest after an error, too.

    Attributes:
        followers: one for each tracker, once they are started.
    """

    def __init__(self, run: RunDir | None, session: Session) -> None:
        self._run, self._session = run, session
        self.followers: list[Follower] = []

    def start(self) -> None:
        """Start following metrics.jsonl, which has the lines that this attempt resumes from."""
        to = names(self._session.config.log)
        if self._run and to:
            with suppress(OSError):  # the followers try it again
                draw_id(self._run.path)
            self.followers = [Follower(self._run, name) for name in to]
        for follower in self.followers:
            follower.start()

    def finish(self, outcome: Outcome, state: TrainState) -> None:
        """Let the followers send the rest, and give up those that don't.

        Args:
            outcome: the end of this attempt; its steps can't be lost any more.
        """
        if outcome.state == "finished":
            self._end(math.inf, MOST_S)
        else:
            self._end(outcome.step - state.evaluation_owed, STOPPING_S)

    def _end(self, last: float, most_s: float) -> None:
        """Let the followers send the rest within ``most_s``.

        Args:
            last: the last step that can't be lost; -1 if only the checkpoints tell.
        """
        for follower in self.followers:
            follower.finish(last)
        began, stop = time.monotonic(), self._session.stop
        try:
            while any(follower.is_alive() for follower in self.followers):
                self._session.watch.beat()
                late_s, most_s = time.monotonic() - began, min(most_s, STOPPING_S) if stop.wanted else most_s
                for follower in self.followers:
                    if late_s > most_s or follower.idle_s > IDLE_S:
                        follower.give_up()
                if late_s > most_s + STOPPING_S:
                    break  # not even a kill ends a process that waits for a dead disk
                time.sleep(0.02)
        finally:
            for follower in self.followers:
                follower.give_up()
        for follower in self.followers:
            follower.report_end(finished=last == math.inf)

    def __enter__(self) -> Followers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error:
            self._end(-1, CRASHED_S)


class Follower(threading.Thread):
    """Keep one tracker's follower process running until it has sent all lines; restart it after a failure.

    The process dies with the thread that starts it (see die_with_parent), which is this one.

    Attributes:
        sent: the last step that the tracker has, -1 if it has none; None until it was opened.
    """

    def __init__(self, run: RunDir, name: str) -> None:
        super().__init__(name=f"tracker-{name}", daemon=True)
        self.sent: int | None = None
        self._run, self._tracker, self._log = run, name, log_file(run, name)
        self._command = command_of("isobatch.trainers.trackers.follow", str(run.path.absolute()), name)
        self._by_hand = f"cd {shlex.quote(os.getcwd())} && {shlex.join(self._command)}"
        self._process: subprocess.Popen[bytes] | None = None
        self._last: float | None = None  # the last step to send, once training has ended
        self._ended, self._given_up, self._lock = threading.Event(), threading.Event(), threading.Lock()
        self._moved, self._failure, self._complete = time.monotonic(), "", False

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
                self._ended.wait(2.0 ** min(failures, 6))

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

    def report_end(self, *, finished: bool) -> None:
        """Report lines that weren't sent, and who sends them: the next start, unless the run is ``finished``."""
        if not self._complete:
            at = "before it was open" if self.sent is None else f"after step {max(0, self.sent)}"
            fix = f"send the rest by: {self._by_hand}" if finished else "the next start sends the rest"
            self._tell(f"was given up {at} ({self._failure or 'it made no progress'}; see {self._log}); {fix}")

    def _follow(self) -> str:
        """Run the process to its end; return why it failed, or an empty string."""
        process, cause = self._spawn(), ""
        assert process.stdout
        for line in process.stdout:
            report = json.loads(line)
            self._moved, self.sent = time.monotonic(), report.get("sent", self.sent)
            cause = report.get("failed", cause)
        code = process.wait()
        with self._lock:
            self._kill()  # what it may have left
            process.stdout.close()
            self._process = None
        if code == 0:
            return ""
        return cause or (f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}")

    def _spawn(self) -> subprocess.Popen[bytes]:
        command = [*self._command, str(os.getpid())]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
        with open(self._log, "ab") as log, self._lock:
            if self._given_up.is_set():
                raise OSError("given up")
            self._process = process = subprocess.Popen(command, stderr=log, start_new_session=True, **pipes)
            self._tell_end()
        return process

    def _tell_end(self) -> None:
        if self._process and self._process.stdin and self._last is not None:
            with suppress(OSError):  # it has just ended
                self._process.stdin.write(f"end {self._last}\n".encode())

    def _kill(self) -> None:
        if self._process:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _warn(self, cause: str) -> None:
        """Warn of the first failure."""
        cause = one_line(cause)[:300]
        if not self._failure and not self._ended.is_set():
            self._tell(f"failed: {cause} (see {self._log}); training continues, and the tracker is tried again")
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
