"""Collect how a job ended: from its run directory, from Slurm, and from the job's output."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from isobatch.conf.rundir.outcome import EXIT_CODE, Outcome, known_outcome
from isobatch.conf.rundir.reading import events, last_step
from isobatch.scaling.errors import UserError
from isobatch.slurm.state import Job, JobStart, down_nodes, job, restarted_nodes

TAIL_BYTES = 1 << 16  # of an output, whose end has Slurm's last messages

# reasons in Slurm's messages, and the causes to report for them
DUE = {
    "PREEMPTION": "preempted: a job with a higher priority took its place",
    "JOB REQUEUE": "`scontrol requeue`",
    "TIME LIMIT": "its time limit",
    "NODE FAILURE": "a node failed",
}

STEP_CODE = "ISOBATCH_STEP_CODE"  # environment variable with the exit code of the job's step
# exit codes of a launcher that a signal stopped or killed
STOPPED = (EXIT_CODE["stopped"], 128 + signal.SIGTERM, 128 + signal.SIGUSR2)


@dataclass(frozen=True, slots=True)
class End:
    """Describe the end of a job.

    Attributes:
        identifier: the job's id; ``restart``: how often it was requeued before this start.
        outcome: the run's outcome, possibly from an earlier start; ``events``: the run's events.
        step: the last step that the run is known to have completed.
        code: exit code of the job's step.
        job: the job's current state in Slurm.
        due: the reason in Slurm's message that ended the job, a key of ``DUE``; None without such a message.
        down: nodes of the job that are down; ``back``: nodes that rebooted; ``unreached``: nodes on which srun failed.
    """

    identifier: str
    restart: int
    outcome: Outcome | None
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
        """Return the ``start`` event of this start; None if the run didn't start."""
        return start_of(self.events, self.identifier, self.restart)

    @property
    def state(self) -> str:
        """Return the state of the run; ``finished``, ``stopped`` or ``refused`` if it didn't start."""
        if self.start:
            return self.outcome.state if self.outcome else "running"
        if self.code == 0:  # it printed the result of a finished run
            return "finished"
        return "stopped" if self.code in STOPPED else "refused"

    @property
    def cause(self) -> str:
        """The cause that the run recorded."""
        return self.outcome.cause if self.outcome and self.start else ""


def end_of_job(directory: Path, env: Mapping[str, str] = os.environ) -> End:
    """Collect how the job that this process is in ended. Its run is in ``directory``.

    Raises:
        UserError: this process isn't in a job, or Slurm doesn't answer.
    """
    if "SLURM_JOB_ID" not in env:
        problem = "action=requeue is for the end of a Slurm job's script, but this process isn't in a job"
        raise UserError(problem, key="action", value="requeue")
    here, output = JobStart.here(env), tail(Path("/proc/self/fd/2"))
    now, found = job(here.id), events(directory)
    start = start_of(found, here.id, here.restart)
    began = now.started if now.restarts == here.restart else None  # else Slurm already shows the next start
    began = when(start) if start and not began else began
    due, nodes, down = parse_due(output, began or datetime.min), env["SLURM_JOB_NODELIST"], list[str]()
    with suppress(UserError):  # the other facts are enough
        down = down_nodes(nodes)
    back = restarted_nodes(nodes, began) if due == "NODE FAILURE" and began else ()
    return End(
        identifier=here.id, restart=here.restart, outcome=known_outcome(directory), events=found,
        step=last_step(directory), code=int(env.get(STEP_CODE, "0")), job=now, due=due, down=down,
        now=datetime.now(), back=back, unreached=parse_unreached(output),
        complaint=parse_complaint(output) or "see its output",
    )  # fmt: skip


def start_of(events: Sequence[Mapping[str, Any]], identifier: str, restart: int) -> Mapping[str, Any] | None:
    """Return the run's last ``start`` event if it belongs to this start of the job, else None."""
    found = [event for event in events if event.get("event") == "start"]
    same = found and (found[-1].get("job"), found[-1].get("job_restart")) == (identifier, restart)
    return found[-1] if same else None


def when(event: Mapping[str, Any]) -> datetime:
    """Return the time of an event in local time, which Slurm uses too."""
    return datetime.fromisoformat(event["time"]).astimezone().replace(tzinfo=None)


def tail(output: Path) -> str:
    """Return the end of a job's output; empty if it can't be read."""
    with suppress(OSError), open(output, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
        return file.read().decode(errors="replace")
    return ""


def parse_due(text: str, since: datetime) -> str | None:
    """Return the reason, a key of ``DUE``, for which Slurm ended a job at ``since`` or later; None without one.

    Parses lines such as ``… *** JOB 4 ON n4 CANCELLED AT 2026-11-26T00:36:37 DUE TO PREEMPTION ***``.
    """
    found = re.findall(r"\*\*\* (?:JOB|STEP) \S+ ON \S+ CANCELLED AT (\S+) DUE TO ([A-Z ]+)", text)
    reasons = [reason.strip() for at, reason in found if datetime.fromisoformat(at) >= since]
    return next((known for known in DUE for reason in reasons[-1:] if reason.startswith(known)), None)


def parse_unreached(text: str) -> list[str]:
    """Return the nodes on which srun couldn't start this start's step.

    Parses ``srun: error: Task launch for StepId=18.0 failed on node n2: Communication connection failure``.
    """
    text = text.rpartition("*** JOB ")[2]  # the output of an earlier start ends with such a line
    return sorted(set(re.findall(r"^srun: error: Task launch for \S+ failed on node (\S+): ", text, re.MULTILINE)))


def parse_complaint(text: str) -> str:
    """Return the last message of this start's launcher; empty if there is none."""
    text = text.rpartition("*** JOB ")[2]
    return "".join(re.findall(r"^isobatch: (.*)$", text, re.MULTILINE)[-1:])
