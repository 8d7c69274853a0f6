"""Decide whether to requeue a job, and requeue it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from isobatch.conf.rundir.outcome import known_outcome
from isobatch.conf.rundir.reading import events
from isobatch.scaling.errors import UserError
from isobatch.slurm.end import DUE, End, parse_due, tail, when
from isobatch.slurm.state import JobStart, ask, down_nodes, job, restarted_nodes

STOPS_IN_A_ROW = 3  # by the time limit at the same step, after which the job isn't requeued
EARLY_S = 60  # by which Slurm may signal too early


@dataclass(frozen=True, slots=True)
class Verdict:
    """Hold the decision whether to requeue a job.

    Attributes:
        event: ``requeue``, or the reason against it: ``finished``, ``cancelled``, ``not_requeued``.
        kind: why the job ended: a stop, a crash, or the loss of a node.
        cause: the cause as text.
    """

    event: Literal["requeue", "finished", "cancelled", "not_requeued"]
    kind: Literal["stop", "crash", "node"] | None
    cause: str

    def __str__(self) -> str:
        return f"{'goes back into the queue' if self.event == 'requeue' else 'is not queued again'}: {self.cause}"


def requeued_by_slurm(directory: Path, env: Mapping[str, str] = os.environ) -> Verdict | None:
    """Return why Slurm itself requeued this job, if the script was killed before it could record that; else None.

    Raises:
        UserError: Slurm doesn't answer.
    """
    recorded = [event for event in events(directory) if event.get("event") in ("start", "requeue")]
    if "SLURM_RESTART_COUNT" not in env or not recorded:
        return None
    last, here = recorded[-1], JobStart.here(env).id
    if (last["event"], last.get("job")) != ("start", here):
        return None
    output, hosts = job(here).output, ",".join(last["hosts"])
    due = parse_due(tail(Path(output)), when(last)) if output else None
    if due and due != "NODE FAILURE":
        ended = known_outcome(directory)
        lost = "" if ended and ended.state == "stopped" else "; it was killed before the run was saved"
        return Verdict("requeue", "stop", DUE[due] + lost)
    down, back = down_nodes(hosts), restarted_nodes(hosts, when(last))
    if due or down or back:
        return Verdict("requeue", "node", _lost(down, back))
    return Verdict("requeue", None, "Slurm requeued it for an unknown reason")


def decide_requeue(end: End, max_requeues: int, signal_s: int) -> Verdict:
    """Decide whether to requeue the job. Slurm signals it ``signal_s`` seconds before its time limit.

    A stopped run is requeued unless its user cancelled the job. So is a run that lost a node. A crashed run is requeued
    at most ``max_requeues`` times, as long as it gets further than before. A finished or a rejected run isn't requeued.
    """
    why = _why(end, signal_s)
    if end.state == "finished":
        return Verdict("finished", None, "")
    if _cancelled(end):
        return Verdict("cancelled", "stop", "`scancel`")
    if end.unreached and end.start is None:
        return _after_no_start(end, max_requeues)
    if end.state == "stopped":
        why = why or f"{end.cause or 'a signal'}, for example from `scancel --signal`"
        if why == DUE["TIME LIMIT"] and (stops := _stops_here(end)) >= STOPS_IN_A_ROW:
            cause = f"{why}, {stops + 1} times at step {end.step}, which leaves no time for a step or an evaluation"
            return Verdict("not_requeued", "stop", f"{cause}; raise cluster.time_min, or lower cluster.signal_s")
        return Verdict("requeue", "stop", why)
    if end.down or end.due == "NODE FAILURE":
        return Verdict("requeue", "node", _lost(end.down, end.back))
    if why:
        return Verdict("requeue", "stop", f"{why}; it ended before the run was saved ({end.cause or 'killed'})")
    if end.state == "refused":
        cause = end.cause or f"exit code {end.code} before the run started: {end.complaint}"
        return Verdict("not_requeued", None, cause)
    return _after_crash(end, max_requeues)


def _lost(down: Sequence[str], back: Sequence[str]) -> str:
    if down:
        return f"node {', '.join(down)} is down"
    return f"node {', '.join(back)} went down and came back" if back else DUE["NODE FAILURE"]


def _after_no_start(end: End, max_requeues: int) -> Verdict:
    """Retry a few times, since Slurm may allocate an unreachable node again until it notices the failure."""
    cause = f"node {', '.join(end.unreached)} can't be reached"
    since = itertools.takewhile(lambda event: event.get("event") != "start", reversed(end.events))
    tries = sum(event.get("event") == "requeue" and event.get("job") == end.identifier for event in since)
    if tries < max_requeues:
        return Verdict("requeue", "node", cause)
    return Verdict("not_requeued", "node", f"{cause}; already tried cluster.max_requeues={max_requeues} times")


def _after_crash(end: End, max_requeues: int) -> Verdict:
    cause = end.cause or "it ended without recording a cause"
    crashed = [event for event in end.events if event.get("event") in ("start", "crashed", "oom")][-1:]
    if crashed and crashed[0].get("again") is False:
        return Verdict("not_requeued", "crash", f"{cause}; it would crash the same way again")
    before = [event for event in end.events if event.get("event") == "requeue" and event.get("kind") == "crash"]
    furthest = max((int(event.get("step", 0)) for event in before), default=0)
    if end.step <= furthest:
        reason = f"it got no further than step {furthest}" + ", as before" * bool(before)
    elif sum(event.get("job") == end.identifier for event in before) >= max_requeues:
        reason = f"already requeued cluster.max_requeues={max_requeues} times"
    else:
        return Verdict("requeue", "crash", cause)
    return Verdict("not_requeued", "crash", f"{cause}; {reason}")


def _stops_here(end: End) -> int:
    """Count how often in a row this job was requeued at its current step."""
    before = [event for event in reversed(end.events) if event.get("event") == "requeue"]
    here = (end.identifier, "stop", end.step)
    same = itertools.takewhile(lambda event: (event.get("job"), event.get("kind"), event.get("step")) == here, before)
    return len(list(same))


def _cancelled(end: End) -> bool:
    """Return whether the user cancelled the job: it ends without a requeue, a preemption, or a time limit."""
    ending = end.job.state in ("COMPLETING", "CANCELLED") and end.job.restarts <= end.restart
    return ending and not (end.job.preempted or end.job.at_its_limit or end.due in DUE)


def _why(end: End, signal_s: int) -> str | None:
    """Return why Slurm ended the job, or is about to; None if there is no known reason."""
    if end.job.preempted:
        return DUE["PREEMPTION"]
    if end.due in DUE:
        return DUE[end.due]
    left_s = end.job.left_s(end.now)
    if end.job.at_its_limit or (end.cause == "SIGUSR2" and left_s is not None and left_s <= signal_s + EARLY_S):
        return DUE["TIME LIMIT"]
    return None


def requeue(end: End) -> None:
    """Requeue this process's own job, which soon ends this process. Raises UserError if that fails."""
    try:
        ask("scontrol", "requeue", end.identifier)
    except UserError:
        if job(end.identifier).restarts <= end.restart:  # else the job was requeued all the same
            raise
