"""The end of a job: how its run ended, why, and whether the job goes back into the queue."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from isobatch.conf.rundir.files import events, last_step, outcome
from isobatch.scaling.errors import UserError
from isobatch.slurm.output import DUE, parse_complaint, parse_due, parse_unreached, tail
from isobatch.slurm.state import Job, SlurmError, ask, down_nodes, job, job_of, restarted_nodes

STEP_CODE = "ISOBATCH_STEP_CODE"  # in the environment: the exit code of the job's step
STOPPED = 75  # that of a launcher which a signal stopped
SIGNALLED = (128 + signal.SIGTERM, 128 + signal.SIGUSR2)  # … which a signal met before it could heed one
STOPS_IN_A_ROW = 3  # at the same step, by the time limit, after which it isn't tried again
EARLY_S = 60  # that Slurm may signal before it was asked to


@dataclass(frozen=True, slots=True)
class End:
    """What is known at the end of a job.

    Attributes:
        identifier: the job's id; ``restart``: how often it was put back before this start.
        outcome: content of ``outcome.json``, which needn't be of this start; ``events``: of the run.
        step: the last one that the run is known to have completed.
        code: exit code of the job's step.
        job: as Slurm shows it now.
        due: what Slurm wrote that it ends the job for, a key of ``DUE``; None: nothing.
        down: nodes of the job that are gone; ``back``: that were; ``unreached``: on which srun could start nothing.
    """

    identifier: str
    restart: int
    outcome: Mapping[str, Any]
    events: Sequence[Mapping[str, Any]]
    step: int
    code: int
    job: Job
    due: str | None
    down: Sequence[str]
    now: datetime
    back: Sequence[str] = ()
    unreached: Sequence[str] = ()
    complaint: str = "see its output"

    @property
    def start(self) -> Mapping[str, Any] | None:
        """The event of this start of the run; None where it never came so far."""
        return start_of(self.events, self.identifier, self.restart)

    @property
    def state(self) -> str:
        """Of the run; where it never started, ``stopped`` or ``refused``."""
        if self.start:
            return str(self.outcome.get("state", "running"))
        if self.code == 0:  # it showed the result of a finished run
            return "finished"
        return "stopped" if self.code in (STOPPED, *SIGNALLED) else "refused"

    @property
    def said(self) -> str:
        """The cause in the run's own words."""
        return str(self.outcome.get("cause", "")) if self.start else ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a job.

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


def end_of_job(directory: Path, env: Mapping[str, str] = os.environ) -> End:
    """Of the job that this process is the end of, and whose run is in ``directory``.

    Raises:
        UserError: this isn't a job.
        SlurmError: Slurm doesn't answer.
    """
    if "SLURM_JOB_ID" not in env:
        raise UserError("action=requeue is what the script of a Slurm job does at its end, and this isn't a job")
    identifier, restart, said = job_of(env), int(env.get("SLURM_RESTART_COUNT", "0")), tail(Path("/proc/self/fd/2"))
    now, found = job(identifier), events(directory)
    start = start_of(found, identifier, restart)
    began = now.started if now.restarts == restart else None  # else it is put back already, and begins again
    began = _when(start) if start and not began else began
    due = parse_due(said, began or datetime.min)
    return End(
        identifier=identifier,
        restart=restart,
        outcome=outcome(directory),
        events=found,
        step=last_step(directory),
        code=int(env.get(STEP_CODE, "0")),
        job=now,
        due=due,
        down=_down(env["SLURM_JOB_NODELIST"]),
        now=datetime.now(),
        back=restarted_nodes(env["SLURM_JOB_NODELIST"], began) if due == "NODE FAILURE" and began else (),
        unreached=parse_unreached(said),
        complaint=parse_complaint(said) or "see its output",
    )


def _down(nodes: str) -> list[str]:
    with suppress(SlurmError):  # what else is known tells enough
        return down_nodes(nodes)
    return []


def put_back_by_slurm(directory: Path, env: Mapping[str, str] = os.environ) -> Verdict | None:
    """Why Slurm by itself queued this job again, where its script was killed before it could say so; else None.

    Raises:
        SlurmError: Slurm doesn't answer.
    """
    told = [event for event in events(directory) if event.get("event") in ("start", "requeue")]
    if "SLURM_RESTART_COUNT" not in env or not told:
        return None
    last = told[-1]
    if (last["event"], last.get("job")) != ("start", job_of(env)):
        return None
    output, hosts = job(job_of(env)).output, ",".join(last["hosts"])
    due = parse_due(tail(Path(output)), _when(last)) if output else None
    if due and due != "NODE FAILURE":
        lost = "" if outcome(directory).get("state") == "stopped" else "; it was killed before all was saved"
        return Verdict("requeue", "stop", DUE[due] + lost)
    down, back = down_nodes(hosts), restarted_nodes(hosts, _when(last))
    if due or down or back:
        return Verdict("requeue", "node", _lost(down, back))
    return Verdict("requeue", None, "Slurm queued it again by itself")


def start_of(events: Sequence[Mapping[str, Any]], identifier: str, restart: int) -> Mapping[str, Any] | None:
    """The event of the run's last start, where that is of this start of the job."""
    found = [event for event in events if event.get("event") == "start"]
    ours = found and (found[-1].get("job"), found[-1].get("job_restart")) == (identifier, restart)
    return found[-1] if ours else None


def _when(event: Mapping[str, Any]) -> datetime:
    """By this machine's clock, as Slurm gives times."""
    return datetime.fromisoformat(event["time"]).astimezone().replace(tzinfo=None)


def judge(end: End, max_requeues: int, signal_s: int) -> Verdict:
    """Whether the job goes back into the queue.

    What was stopped does, unless its user cancelled the job; and what lost a node. What crashed does ``max_requeues``
    times, as long as it gets further than before. What is finished, or was refused, doesn't.

    Args:
        signal_s: how long before its limit the job is told to stop.
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
    """Slurm takes a node that doesn't answer for a good one for a while, and may give it to the job once more."""
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
    """How often in a row this job was put back at the step where it is now."""
    before = [event for event in reversed(end.events) if event.get("event") == "requeue"]
    here = (end.identifier, "stop", end.step)
    same = itertools.takewhile(lambda event: (event.get("job"), event.get("kind"), event.get("step")) == here, before)
    return len(list(same))


def _cancelled(end: End) -> bool:
    """Its user ended it: Slurm does so now, hasn't put it back, and neither preempts it nor has its time run out."""
    ending = end.job.state in ("COMPLETING", "CANCELLED") and end.job.restarts <= end.restart
    return ending and not (end.job.preempted or end.job.at_its_limit or end.due in DUE)


def _why(end: End, signal_s: int) -> str | None:
    """What Slurm ended the job for, or is about to; None: for nothing that is known."""
    if end.job.preempted:
        return DUE["PREEMPTION"]
    if end.due in DUE:
        return DUE[end.due]
    left_s = end.job.left_s(end.now)
    if end.job.at_its_limit or (end.said == "SIGUSR2" and left_s is not None and left_s <= signal_s + EARLY_S):
        return DUE["TIME LIMIT"]
    return None


def put_back(end: End) -> None:
    """Put one's own job back into the queue, which ends this process soon.

    Raises:
        SlurmError: it can't be.
    """
    try:
        ask("scontrol", "requeue", end.identifier)
    except SlurmError:
        if job(end.identifier).restarts <= end.restart:  # else Slurm has done it, by itself or before it fell silent
            raise
