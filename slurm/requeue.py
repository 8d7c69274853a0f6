"""The end of a job: how its run ended, why, and whether the job goes back into the queue."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from conf.explain import ConfigError
from scaling.report import events, last_step, outcome
from slurm.state import Job, SlurmError, ask, down_nodes, job, job_of

STEP_CODE = "ISOBATCH_STEP_CODE"  # in the environment: the exit code of the job's step
STOPPED = 75  # that of a launcher which a signal stopped
TAIL_BYTES = 1 << 16  # of a job's output, whose end has what Slurm said last
EARLY_S = 60  # that Slurm may signal before it was asked to

# What Slurm writes into the output of a job that it ends, and what that means.
DUE = {
    "PREEMPTION": "preempted: a job with a higher priority took its place",
    "JOB REQUEUE": "`scontrol requeue`",
    "TIME LIMIT": "its time limit",
    "NODE FAILURE": "a node failed",
}


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
        down: nodes of the job that are gone.
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

    @property
    def start(self) -> Mapping[str, Any] | None:
        """The event of this start of the run; None where it never came so far."""
        found = [event for event in self.events if event.get("event") == "start"]
        ours = found and (found[-1].get("job"), found[-1].get("job_restart")) == (self.identifier, self.restart)
        return found[-1] if ours else None

    @property
    def state(self) -> str:
        """Of the run; where it never started, ``stopped`` or ``refused``."""
        if self.start:
            return str(self.outcome.get("state", "running"))
        return "stopped" if self.code == STOPPED else "refused"

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
        ConfigError: this isn't a job.
        SlurmError: Slurm doesn't answer.
    """
    if "SLURM_JOB_ID" not in env:
        raise ConfigError("action=requeue is what the script of a Slurm job does at its end, and this isn't a job")
    found, identifier = events(directory), job_of(env)
    started = [event["time"] for event in found if event.get("event") == "start"]
    since = datetime.strptime(started[-1], "%Y-%m-%dT%H:%M:%S%z").replace(tzinfo=None) if started else datetime.min
    hosts = [event["hosts"] for event in found if event.get("event") == "start"]
    return End(
        identifier=identifier,
        restart=int(env.get("SLURM_RESTART_COUNT", "0")),
        outcome=outcome(directory),
        events=found,
        step=last_step(directory),
        code=int(env.get(STEP_CODE, "0")),
        job=job(identifier),
        due=due_of(Path("/proc/self/fd/2"), since),
        down=down_nodes(hosts[-1]) if hosts else [],
        now=datetime.now(),
    )


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
    if end.state == "stopped":
        return Verdict("requeue", "stop", why or f"{end.said or 'a signal'}, as by `scancel --signal`")
    if end.down or end.due == "NODE FAILURE":
        return Verdict("requeue", "node", f"node {', '.join(end.down)} is down" if end.down else DUE["NODE FAILURE"])
    if why:
        return Verdict("requeue", "stop", f"{why}; it ended before all was saved ({end.said or 'killed'})")
    if end.state == "refused":
        return Verdict("not_requeued", None, end.said or f"it ended with {end.code} before it began: see its output")
    return _after_crash(end, max_requeues)


def _after_crash(end: End, max_requeues: int) -> Verdict:
    cause = end.said or "it ended without a word"
    before = [event for event in end.events if event.get("event") == "requeue" and event.get("kind") == "crash"]
    furthest = max((int(event.get("step", 0)) for event in before), default=0)
    if end.step <= furthest:
        reason = f"it got no further than step {furthest}" + ", as before" * bool(before)
    elif sum(event.get("job") == end.identifier for event in before) >= max_requeues:
        reason = f"that was done cluster.max_requeues={max_requeues} times"
    else:
        return Verdict("requeue", "crash", cause)
    return Verdict("not_requeued", "crash", f"{cause}; {reason}")


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


def due_of(output: Path, since: datetime) -> str | None:
    """What Slurm wrote into a job's output that it ends it for, at ``since`` or later; None: nothing."""
    try:
        with open(output, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            return parse_due(file.read().decode(errors="replace"), since)
    except OSError:
        return None


def parse_due(text: str, since: datetime) -> str | None:
    """Of lines such as ``… *** JOB 4 ON n4 CANCELLED AT 2026-11-26T00:36:37 DUE TO PREEMPTION ***``."""
    found = re.findall(r"\*\*\* (?:JOB|STEP) \S+ ON \S+ CANCELLED AT (\S+) DUE TO ([A-Z ]+)", text)
    late = [why.strip() for at, why in found if datetime.fromisoformat(at) >= since]
    return next((known for known in DUE for why in late[-1:] if why.startswith(known)), None)


def put_back(identifier: str) -> None:
    """Put one's own job back into the queue, which ends this process soon.

    Raises:
        SlurmError: it can't be.
    """
    try:
        ask("scontrol", "requeue", identifier)
    except SlurmError as error:
        if "pending" not in error.said.lower():  # Slurm has done it by itself
            raise
