"""Decide whether to restart after a failed start of the workers, and record the failure. Torch-free."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TextIO

from isobatch.conf.rundir.directory import RunDir
from isobatch.conf.rundir.outcome import Outcome
from isobatch.conf.terminal import say, tell_torchrun
from isobatch.trainers.ranks.failure import Failure


@dataclass(frozen=True, slots=True)
class Verdict:
    """Hold a failed start of the workers and the decision whether to restart them.

    Attributes:
        retry: restart the workers.
        per_gpu_limit: if memory ran out, the most samples in a pass of the next start; 0 if no smaller pass exists,
            or it would change the run. None if memory didn't run out, or did in a probe, which the next start knows.
    """

    failure: Failure
    retry: bool
    per_gpu_limit: int | None = None


@dataclass(slots=True)
class Starts:
    """Record the failed starts of the workers, and decide whether to restart.

    Attributes:
        restarts: remaining restarts after a crash; None if torchrun counts them.
        furthest: the furthest step that a start reached before it crashed; -1 if none has crashed.
        step, samples: the furthest position that any start reached.
        per_gpu_limit: the most samples in a pass, set after memory ran out.
    """

    restarts: int | None = None
    furthest: int = -1
    step: int = 0
    samples: int = 0
    per_gpu_limit: int | None = None

    def decide(self, failure: Failure, *, over: bool = False) -> Verdict:
        """Decide whether to restart the workers after ``failure``.

        Don't restart if the run is ``over``, if a retry can't help, or if the last start got no further than an
        earlier one. After running out of memory, retry with half the samples in a pass, without counting a restart.
        """
        retry = failure.again and not over
        if failure.kind == "oom" and failure.reached.probe:
            return Verdict(failure, retry)
        if failure.kind == "oom":
            limit = 0 if failure.reached.fixed else failure.reached.half
            return Verdict(failure, retry and limit > 0, limit)
        retry = retry and self.restarts != 0
        if retry and failure.reached.step <= self.furthest:
            cause = f"{failure.cause}; not restarted, since the last start got no further than an earlier one"
            return Verdict(replace(failure, cause=cause), retry=False)
        return Verdict(failure, retry)

    def add(self, verdict: Verdict) -> Verdict:
        """Record a failed start. Return its verdict with the furthest position of any start."""
        failure, reached = verdict.failure, verdict.failure.reached
        if failure.kind != "oom":
            self.restarts = self.restarts and self.restarts - 1
            self.furthest = max(self.furthest, reached.step)
        self.per_gpu_limit = verdict.per_gpu_limit or self.per_gpu_limit
        self.step, self.samples = max(self.step, reached.step), max(self.samples, reached.samples)
        reached = replace(reached, step=self.step, samples=self.samples)
        return replace(verdict, failure=replace(failure, reached=reached))


def record_end(
    failure: Failure, run: RunDir | None, attempt: str, restarts: int = 0, to: TextIO = sys.stderr
) -> Outcome:
    """Print once why the run ended, and write the outcome to the run directory if this launch has entered it."""
    cause = failure.summary + (f"; {_advice(failure)}" if failure.kind == "oom" else "")
    log = f"; traceback in {failure.log}" if failure.again and failure.log else ""
    if failure.again and not log:
        say(failure.traceback, to, end="")
    say(f"isobatch: {cause}{log}", to)
    tell_torchrun(f"isobatch: {cause}{log}")
    step, samples = failure.reached.step, failure.reached.samples
    end = Outcome(failure.kind, cause, step, samples, attempt, restarts)
    if run:
        try:
            run.write_outcome(end)
            run.event(end.state, cause=cause, step=step, samples=samples, again=failure.again)
        except OSError as full:
            say(f"isobatch: {run.path} can't be written: {full}", to)
    return end


def record_restart(verdict: Verdict, run: RunDir, restart: int) -> None:
    """Record the ``restart``-th restart of the workers and its cause in the events."""
    failure, reached = verdict.failure, verdict.failure.reached
    fields: dict[str, Any] = {"rank": failure.rank, "cause": failure.cause}
    fields |= {"step": reached.step, "samples": reached.samples}
    if failure.kind == "oom":
        fields |= {"kind": "oom", "per_gpu_before": reached.per_gpu}
    if verdict.per_gpu_limit is not None:
        fields["per_gpu"] = verdict.per_gpu_limit
    with suppress(OSError):  # a full disk mustn't prevent the restart
        run.event("restart", **fields, restart=restart)


def _advice(failure: Failure) -> str:
    """Return the fix to suggest after memory ran out."""
    if half := failure.reached.half:
        fixed = "numerics=bitwise can't resume with fewer samples in a pass; in another run, "
        return f"{fixed if failure.reached.fixed else ''}batch.per_gpu={half} needs less"
    smallest = "there is no smaller batch.per_gpu: " if failure.reached.per_gpu else ""
    return f"{smallest}use a smaller model or more memory"
