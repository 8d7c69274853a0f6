"""Whether a job goes back into the queue, and why."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from isobatch.conf.rundir.files import events
from isobatch.conf.rundir.outcome import known_outcome
from isobatch.scaling.errors import UserError
from isobatch.slurm.end import DUE, End, parse_due, tail, when
from isobatch.slurm.state import JobStart, ask, down_nodes, job, restarted_nodes

STOPS_IN_A_ROW = 3  # at the same step, by the time limit, after which it isn't tried again
EARLY_S = 60  # that Slurm may signal before it was asked to


@dataclass(frozen=True, slots=True)
class Verdict:
    """Say what becomes of a job.

    Attributes:
        event: ``requeue``: it goes back into the queue; or why not: ``finished``, ``cancelled``, ``not_requeued``.
        kind: what it ended of: a stop, a crash, a node that is gone.
        cause: in words.
    """

    event: Literal["requeue", "finished", "cancelled", "not_requeued"]
    kind: Literal["stop", "crash", "node"] | None
    cause: str

    def __str__(self) -> str:
        return f"{'goes back into the queue' if self.event == 'requeue' else 'is not queued again'}: {self.cause}"


def put_back_by_slurm(directory: Path, env: Mapping[str, str] = os.environ) -> Verdict | None:
    """Return why Slurm itself queued this job again, where its script was killed before it could say so; else None.

    Raises:
        UserError: Slurm doesn't answer.
    """
    told = [event for event in events(directory) if event.get("event") in ("start", "requeue")]
    if "SLURM_RESTART_COUNT" not in env or not told:
        return None
    last, here = told[-1], JobStart.here(env).id
    if (last["event"], last.get("job")) != ("start", here):
        return None
    output, hosts = job(here).output, ",".join(last["hosts"])
    due = parse_due(tail(Path(output)), when(last)) if output else None
    if due and due != "NODE FAILURE":
        ended = known_outcome(directory)
        lost = "" if ended and ended.state == "stopped" else "; it was killed before all was saved"
        return Verdict("requeue", "stop", DUE[due] + lost)
    down, back = down_nodes(hosts), restarted_nodes(hosts, when(last))
    if due or down or back:
        return Verdict("requeue", "node", _lost(down, back))
    return Verdict("requeue", None, "Slurm queued it again by itself")


def decide_requeue(end: End, max_requeues: int, signal_s: int) -> Verdict:
    """Decide whether the job goes back into the queue; it is told to stop ``signal_s`` before its limit.

    A run that was stopped does, unless its user cancelled the job, and so does one that lost a node. One that
    crashed does ``max_requeues`` times, as long as it gets further than before. A finished or a rejected one
    doesn't.
    """
    why = _why(end, signal_s)
    if end.state == "finished":
        return Verdict("finished", None, "")
    if _cancelled(end):
        return Verdict("cancelled", "stop", "`scancel`")
    if end.unreached and end.start is None:
        return _after_no_start(end, max_requeues)
    if end.state == "stopped":
        why = why or f"{end.said or 'a signal'}, as by `scancel --signal`"
        if why == DUE["TIME LIMIT"] and (stops := _stops_here(end)) >= STOPS_IN_A_ROW:
            cause = f"{why}, {stops + 1} times at step {end.step}, as it leaves no time for a step or an evaluation"
            return Verdict("not_requeued", "stop", f"{cause}: a longer cluster.time_min, or a shorter cluster.signal_s")
        return Verdict("requeue", "stop", why)
    if end.down or end.due == "NODE FAILURE":
        return Verdict("requeue", "node", _lost(end.down, end.back))
    if why:
        return Verdict("requeue", "stop", f"{why}; it ended before all was saved ({end.said or 'killed'})")
    if end.state == "refused":
        return Verdict("not_requeued", None, end.said or f"it ended with {end.code} before it began: {end.complaint}")
    return _after_crash(end, max_requeues)


def _lost(down: Sequence[str], back: Sequence[str]) -> str:
    if down:
        return f"node {', '.join(down)} is down"
    return f"node {', '.join(back)} went down, and came back" if back else DUE["NODE FAILURE"]


def _after_no_start(end: End, max_requeues: int) -> Verdict:
    """Try again: for a while Slurm takes a node that doesn't answer for a good one, and may use it once more."""
    cause = f"node {', '.join(end.unreached)} can't be reached"
    since = itertools.takewhile(lambda event: event.get("event") != "start", reversed(end.events))
    tries = sum(event.get("event") == "requeue" and event.get("job") == end.identifier for event in since)
    if tries < max_requeues:
        return Verdict("requeue", "node", cause)
    return Verdict("not_requeued", "node", f"{cause}; that was tried cluster.max_requeues={max_requeues} times")


def _after_crash(end: End, max_requeues: int) -> Verdict:
    cause = end.said or "it ended without a word"
    crashed = [event for event in end.events if event.get("event") in ("start", "crashed", "oom")][-1:]
    if crashed and crashed[0].get("again") is False:
        return Verdict("not_requeued", "crash", f"{cause}; it would crash again the same way")
    before = [event for event in end.events if event.get("event") == "requeue" and event.get("kind") == "crash"]
    furthest = max((int(event.get("step", 0)) for event in before), default=0)
    if end.step <= furthest:
        reason = f"it got no further than step {furthest}" + ", as before" * bool(before)
    elif sum(event.get("job") == end.identifier for event in before) >= max_requeues:
        reason = f"that was done cluster.max_requeues={max_requeues} times"
    else:
        return Verdict("requeue", "crash", cause)
    return Verdict("not_requeued", "crash", f"{cause}; {reason}")


def _stops_here(end: End) -> int:
    """Count how often in a row this job was queued again at the step where it is now."""
    before = [event for event in reversed(end.events) if event.get("event") == "requeue"]
    here = (end.identifier, "stop", end.step)
    same = itertools.takewhile(lambda event: (event.get("job"), event.get("kind"), event.get("step")) == here, before)
    return len(list(same))


def _cancelled(end: End) -> bool:
    """Tell whether its user ended it: Slurm ends it now without queueing it again, a preemption, or its time limit."""
    ending = end.job.state in ("COMPLETING", "CANCELLED") and end.job.restarts <= end.restart
    return ending and not (end.job.preempted or end.job.at_its_limit or end.due in DUE)


def _why(end: End, signal_s: int) -> str | None:
    """Return why Slurm ended the job, or is about to; None: for no known reason."""
    if end.job.preempted:
        return DUE["PREEMPTION"]
    if end.due in DUE:
        return DUE[end.due]
    left_s = end.job.left_s(end.now)
    if end.job.at_its_limit or (end.said == "SIGUSR2" and left_s is not None and left_s <= signal_s + EARLY_S):
        return DUE["TIME LIMIT"]
    return None


def put_back(end: End) -> None:
    """Queue one's own job again, which ends this process soon. Raises UserError where it can't be."""
    try:
        ask("scontrol", "requeue", end.identifier)
    except UserError:
        if job(end.identifier).restarts <= end.restart:  # else Slurm has done it, by itself or before it fell silent
            raise
