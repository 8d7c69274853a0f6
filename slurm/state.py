"""What Slurm's own commands say of jobs, nodes and settings, as values."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from isobatch.scaling.errors import UserError

ANSWER_S = 60.0  # for a busy controller
PATIENCE_S = 300.0  # within a job, whose stop or start would be lost: as long as a controller may take to come back
ASK_AGAIN_S = 3.0
UNANSWERED = re.compile(
    r"unable to contact|timed out|didn't answer|connection (refused|failure)|zero bytes", re.IGNORECASE
)
DOWN = ("down", "fail", "error")  # how a node's state begins that won't be heard of


def ask(*words: str, env: Mapping[str, str] = os.environ) -> str:
    """Return what a command of Slurm's prints. Raises UserError where it isn't here, failed, or didn't answer.

    Within a job, a controller that doesn't answer is asked again for a while.
    """
    env, deadline = {**env, "SLURM_TIME_FORMAT": "standard"}, time.monotonic() + PATIENCE_S
    while True:
        try:
            return _ask_once(words, env)
        except UserError as error:
            if not UNANSWERED.search(str(error)) or "SLURM_JOB_ID" not in env or time.monotonic() > deadline:
                raise
        time.sleep(ASK_AGAIN_S)


def _ask_once(words: Sequence[str], env: Mapping[str, str]) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=ANSWER_S, errors="replace", env=env)
    except FileNotFoundError:
        problem = f"there is no {words[0]} on this machine"
        fix = "give the command on a login node of the cluster; cluster.dry_run=true prints the job's script anywhere"
        raise UserError(problem, fix) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{words[0]} didn't answer within {ANSWER_S:g} s") from None
    if done.returncode:
        said = "\n".join(line for line in done.stderr.splitlines() if line.strip())
        raise UserError(f"{words[0]} failed ({done.returncode}): {said or 'it said nothing'}")
    return done.stdout


@dataclass(frozen=True, slots=True)
class Queued:
    """Describe a job in the queue.

    Attributes:
        job: its id; ``123_4`` for an element of an array.
        state: PENDING, RUNNING, COMPLETING, …; ``reason``: why it waits, if it does.
        since: when it was submitted or, if it runs, started.
        nodes: those it runs on, as Slurm writes them; "" while it waits.
        command: the path of its script.
    """

    job: str
    state: str
    reason: str
    since: str
    nodes: str
    command: str

    @property
    def root(self) -> str:
        """The directory of its run or sweep, where Isobatch submitted it; else ""."""
        script = Path(self.command)
        return str(script.parent.parent) if script.parent.name == "submissions" else ""

    def __str__(self) -> str:
        reason = f", {self.reason}" if self.reason else ""
        nodes = f" on {self.nodes}" if self.nodes else ""
        return f"{self.state}{reason}{nodes}, since {self.since.replace('T', ' ')}"


def queued(jobs: Iterable[str] = ()) -> dict[str, Queued]:
    """Return the jobs of this user that aren't over, by id: all of them, or those of ``jobs``."""
    asked = sorted({job.partition("_")[0] for job in jobs})
    which = ["--jobs", ",".join(asked)] if asked else ["--me"]
    try:
        text = ask("squeue", "--noheader", "--array", *which, "--format", "%i|%T|%r|%V|%S|%N|%o")
    except UserError as error:
        if "Invalid job id" in error.problem:  # all of them are over, and forgotten
            return {}
        raise
    return parse_queue(text)


def parse_queue(text: str) -> dict[str, Queued]:
    """Parse lines of ``squeue --format='%i|%T|%r|%V|%S|%N|%o'``, of which the last field may hold anything."""
    found = {}
    for line in re.split(r"\n(?=\d+\S*\|[A-Z_]+\|)", text.removesuffix("\n")) if text else ():
        job, state, reason, submitted, started, nodes, command = line.split("|", 6)
        since = submitted if state == "PENDING" else started
        found[job] = Queued(job, state, "" if reason == "None" else reason, since, nodes, command)
    return found


@dataclass(frozen=True, slots=True)
class Job:
    """Describe this process's own job, as ``scontrol`` shows it.

    Attributes:
        restarts: how often it was put back into the queue.
        preempted: a job with a higher priority takes its place.
        ended: when it is or was to end at the latest; None without a limit, or where it waits again.
        limit: how long it may run; None: without a limit.
        output: the file that it writes to; "" where that isn't told.
    """

    state: str
    restarts: int
    preempted: bool
    started: datetime | None
    ended: datetime | None
    limit: timedelta | None
    output: str = ""

    @property
    def at_its_limit(self) -> bool:
        """Tell whether it has ended, or ends, because its time is over."""
        if self.state == "RUNNING" or None in (self.started, self.ended, self.limit):
            return False
        return self.ended >= self.started + self.limit  # type: ignore[operator]

    def left_s(self, now: datetime) -> float | None:
        """Return the seconds until its limit; None without one."""
        if self.started is None or self.limit is None:
            return None
        return (self.started + self.limit - now).total_seconds()


@dataclass(frozen=True, slots=True)
class JobStart:
    """Name the job that a process is in, and how often that was queued again; outside of one, ``id`` is "".

    The ``id`` of an element of an array is ``123_4``. The element that begins last has the array's own number as
    SLURM_JOB_ID, by which Slurm takes all of them.
    """

    id: str = ""
    restart: int = 0

    @classmethod
    def here(cls, env: Mapping[str, str] = os.environ) -> JobStart:
        job = env.get("SLURM_JOB_ID", "")
        if "SLURM_ARRAY_JOB_ID" in env:
            job = f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
        return cls(job, int(env.get("SLURM_RESTART_COUNT", "0")))


def job(identifier: str) -> Job:
    """Return the job with this id. Raises UserError where Slurm doesn't answer."""
    return parse_job(ask("scontrol", "show", "job", identifier))


def parse_job(text: str) -> Job:
    """Parse the lines of ``scontrol show job``."""
    found = re.findall(r"(?:^|\s)(JobState|Restarts|PreemptTime|StartTime|EndTime|TimeLimit)=(\S*)", text)
    fields = dict(reversed(found))  # the first of each: behind them come texts of the user's own
    started, preempted = _time(fields.get("StartTime", "")), _time(fields.get("PreemptTime", ""))
    return Job(
        fields.get("JobState", "UNKNOWN"),
        int(fields.get("Restarts", "0")),
        preempted is not None and (started is None or preempted >= started),  # of this start
        started,
        _time(fields.get("EndTime", "Unknown")),
        _limit(fields.get("TimeLimit", "")),
        "".join(re.findall(r"^ *StdOut=(.*)$", text, re.MULTILINE)[-1:]),
    )


def _time(text: str) -> datetime | None:
    return datetime.fromisoformat(text) if re.match(r"\d{4}-", text) else None


def _limit(text: str) -> timedelta | None:
    """Parse ``1-02:03:04``: days, hours, minutes, seconds."""
    match = re.fullmatch(r"(?:(?P<days>\d+)-)?(?P<hours>\d+):(?P<minutes>\d+):(?P<seconds>\d+)", text)
    return timedelta(**{unit: int(number) for unit, number in match.groupdict("0").items()}) if match else None


def hostnames(nodes: str) -> list[str]:
    """Return the machines of a list such as ``gpu-b2[1-3,5],login1``, by Slurm's own reading of it."""
    return ask("scontrol", "show", "hostnames", nodes).split()


def address(node: str) -> str:
    """Return where Slurm reaches a node: of several networks, the one that the site has chosen."""
    match = re.search(r"(?:^|\s)NodeAddr=(\S+)", ask("scontrol", "--oneliner", "show", "node", node))
    return match[1] if match else node


def down_nodes(nodes: str) -> list[str]:
    """Return those nodes of a list such as ``n[1-3],n7`` that don't answer any more, or were taken out."""
    text = ask("sinfo", "--noheader", "--Node", "--nodes", nodes, "--format", "%N %T")
    states = dict(line.split(maxsplit=1) for line in text.splitlines() if line.strip())
    # a * says that a node doesn't answer
    return sorted(node for node, state in states.items() if state.lower().startswith(DOWN) or "*" in state)


def restarted_nodes(nodes: str, since: datetime) -> list[str]:
    """Return those of ``nodes`` whose daemon began at ``since`` or later, as it does when a machine starts."""
    text = ask("scontrol", "--oneliner", "show", "node", nodes)
    began = re.findall(r"^NodeName=(\S+) .*?SlurmdStartTime=(\d\S+)", text, re.MULTILINE)
    return sorted({node for node, when in began if datetime.fromisoformat(when) >= since})
