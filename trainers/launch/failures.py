"""Decide what follows a failed start of the workers, and record it. Torch-free."""

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
    """Say what follows a failed start of the workers.

    Attributes:
        retry: start the workers again.
        per_gpu_limit: the most samples in a pass of the next start, where memory ran out; 0: there is no smaller pass,
            or it would be another run. None: memory didn't run out.
    """

    failure: Failure
    retry: bool
    per_gpu_limit: int | None = None


@dataclass(slots=True)
class Starts:
    """Keep what the failed starts of the workers have come to, and decide whether there is another.

    Attributes:
        restarts: how many of them may still crash; None: torchrun counts them.
        furthest: the step that one of them reached before it crashed; -1: none has crashed.
        step, samples: that any of them reached.
        per_gpu_limit: the most samples in a pass, since memory ran out.
    """

    restarts: int | None = None
    furthest: int = -1
    step: int = 0
    samples: int = 0
    per_gpu_limit: int | None = None

    def decide(self, failure: Failure, *, over: bool = False) -> Verdict:
        """Decide whether to start the workers again after ``failure``; not where the run is ``over``, or asked to stop.

        They aren't where that can't help, nor where the last start got no further than one before it. Where
        memory ran out they are started with half the samples in a pass; that doesn't count as a restart.
        """
        retry = failure.again and not over
        if failure.kind == "oom":
            limit = 0 if failure.reached.fixed else failure.reached.half
            return Verdict(failure, retry and limit > 0, limit)
        retry = retry and self.restarts != 0
        if retry and failure.reached.step <= self.furthest:
            cause = f"{failure.cause}; not started again, since the last start got no further than one before"
            return Verdict(replace(failure, cause=cause), retry=False)
        return Verdict(failure, retry)

    def add(self, verdict: Verdict) -> Verdict:
        """Take in what a start has come to; return the verdict of it with how far any start had come."""
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
    """Print once what ended the run, and write it to the run directory where that is this launch's."""
    cause = failure.summary + (f"; {_advice(failure)}" if failure.kind == "oom" else "")
    where = f"; traceback in {failure.log}" if failure.again and failure.log else ""
    if failure.again and not where:
        say(failure.traceback, to, end="")
    say(f"isobatch: {cause}{where}", to)
    tell_torchrun(f"isobatch: {cause}{where}")
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
    """Record in the events why the workers were restarted, for the ``restart``-th time."""
    failure, reached = verdict.failure, verdict.failure.reached
    fields: dict[str, Any] = {"rank": failure.rank, "cause": failure.cause}
    fields |= {"step": reached.step, "samples": reached.samples}
    if verdict.per_gpu_limit is not None:
        fields |= {"kind": "oom", "per_gpu_before": reached.per_gpu, "per_gpu": verdict.per_gpu_limit}
    with suppress(OSError):  # a full disk is no reason not to try again
        run.event("restart", **fields, restart=restart)


def _advice(failure: Failure) -> str:
    """Return what would work where memory ran out."""
    if half := failure.reached.half:
        alone = "numerics=bitwise can't go on with fewer samples in a pass; as a run of its own "
        return f"{alone if failure.reached.fixed else ''}batch.per_gpu={half} needs less"
    smallest = "there is no smaller batch.per_gpu: " if failure.reached.per_gpu else ""
    return f"{smallest}a smaller model or more memory would do"
