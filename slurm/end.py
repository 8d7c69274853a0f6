"""What is known at the end of a job: how its run ended, and what Slurm says, also in the job's output."""

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

from isobatch.conf.rundir.files import events, last_step
from isobatch.conf.rundir.outcome import EXIT_CODE, Outcome, known_outcome
from isobatch.scaling.errors import UserError
from isobatch.slurm.state import Job, JobStart, down_nodes, job, restarted_nodes

TAIL_BYTES = 1 << 16  # of an output, whose end has what Slurm said last

# What it says, and what that means.
DUE = {
    "PREEMPTION": "preempted: a job with a higher priority took its place",
    "JOB REQUEUE": "`scontrol requeue`",
    "TIME LIMIT": "its time limit",
    "NODE FAILURE": "a node failed",
}

STEP_CODE = "ISOBATCH_STEP_CODE"  # in the environment: the exit code of the job's step
# Of a launcher that a signal stopped, or met too early.
STOPPED = (EXIT_CODE["stopped"], 128 + signal.SIGTERM, 128 + signal.SIGUSR2)


@dataclass(frozen=True, slots=True)
class End:
    """Hold what is known at the end of a job.

    Attributes:
        identifier: the job's id; ``restart``: how often it was put back before this start.
        outcome: as in ``outcome.json``, which needn't be of this start; ``events``: of the run.
        step: the last one that the run is known to have completed.
        code: exit code of the job's step.
        job: as Slurm shows it now.
        due: what Slurm wrote that it ends the job for, a key of ``DUE``; None: nothing.
        down: nodes of the job that are gone; ``back``: that were; ``unreached``: on which srun could start nothing.
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
        """Return the event of this start of the run; None where it never came so far."""
        return start_of(self.events, self.identifier, self.restart)

    @property
    def state(self) -> str:
        """Return the state of the run; where it never started, ``stopped`` or ``refused``."""
        if self.start:
            return self.outcome.state if self.outcome else "running"
        if self.code == 0:  # it showed the result of a finished run
            return "finished"
        return "stopped" if self.code in STOPPED else "refused"

    @property
    def said(self) -> str:
        """The cause in the run's own words."""
        return self.outcome.cause if self.outcome and self.start else ""


def end_of_job(directory: Path, env: Mapping[str, str] = os.environ) -> End:
    """Collect what is known of the job that this process is the end of, and whose run is in ``directory``.

    Raises:
        UserError: this isn't a job, or Slurm doesn't answer.
    """
    if "SLURM_JOB_ID" not in env:
        problem = "action=requeue is what the script of a Slurm job does at its end, and this isn't a job"
        raise UserError(problem, key="action", value="requeue")
    here, said = JobStart.here(env), tail(Path("/proc/self/fd/2"))
    now, found = job(here.id), events(directory)
    start = start_of(found, here.id, here.restart)
    began = now.started if now.restarts == here.restart else None  # else it is put back already, and begins again
    began = when(start) if start and not began else began
    due, nodes, down = parse_due(said, began or datetime.min), env["SLURM_JOB_NODELIST"], list[str]()
    with suppress(UserError):  # what else is known tells enough
        down = down_nodes(nodes)
    back = restarted_nodes(nodes, began) if due == "NODE FAILURE" and began else ()
    return End(
        identifier=here.id, restart=here.restart, outcome=known_outcome(directory), events=found,
        step=last_step(directory), code=int(env.get(STEP_CODE, "0")), job=now, due=due, down=down,
        now=datetime.now(), back=back, unreached=parse_unreached(said),
        complaint=parse_complaint(said) or "see its output",
    )  # fmt: skip


def start_of(events: Sequence[Mapping[str, Any]], identifier: str, restart: int) -> Mapping[str, Any] | None:
    """Return the event of the run's last start, where that is of this start of the job."""
    found = [event for event in events if event.get("event") == "start"]
    ours = found and (found[-1].get("job"), found[-1].get("job_restart")) == (identifier, restart)
    return found[-1] if ours else None


def when(event: Mapping[str, Any]) -> datetime:
    """Return the time of an event by this machine's clock, as Slurm gives times."""
    return datetime.fromisoformat(event["time"]).astimezone().replace(tzinfo=None)


def tail(output: Path) -> str:
    """Return the end of a job's output; empty where it can't be read."""
    with suppress(OSError), open(output, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
        return file.read().decode(errors="replace")
    return ""


def parse_due(text: str, since: datetime) -> str | None:
    """Return why Slurm said, at ``since`` or later, that it ends a job, a key of ``DUE``; None: it didn't say.

    Of lines such as ``… *** JOB 4 ON n4 CANCELLED AT 2026-11-26T00:36:37 DUE TO PREEMPTION ***``.
    """
    found = re.findall(r"\*\*\* (?:JOB|STEP) \S+ ON \S+ CANCELLED AT (\S+) DUE TO ([A-Z ]+)", text)
    late = [why.strip() for at, why in found if datetime.fromisoformat(at) >= since]
    return next((known for known in DUE for why in late[-1:] if why.startswith(known)), None)


def parse_unreached(text: str) -> list[str]:
    """Return nodes on which this start's step couldn't be started; an earlier start's text ends with the job's end.

    Of lines such as ``srun: error: Task launch for StepId=18.0 failed on node n2: Communication connection failure``.
    """
    text = text.rpartition("*** JOB ")[2]
    return sorted(set(re.findall(r"^srun: error: Task launch for \S+ failed on node (\S+): ", text, re.MULTILINE)))


def parse_complaint(text: str) -> str:
    """Return the last thing that a launcher of this start said was wrong; empty where there is nothing."""
    text = text.rpartition("*** JOB ")[2]
    return "".join(re.findall(r"^isobatch: (.*)$", text, re.MULTILINE)[-1:])
