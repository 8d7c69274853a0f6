"""Run Slurm's commands, and parse their output about jobs, nodes and settings."""

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
PATIENCE_S = 300.0  # for a controller to come back, within a job, which can't requeue without it
ASK_AGAIN_S = 3.0
UNANSWERED = re.compile(
    r"unable to contact|timed out|didn't answer|connection (refused|failure)|zero bytes", re.IGNORECASE
)
DOWN = ("down", "fail", "error")  # prefixes of the states of unavailable nodes


def ask(*words: str, env: Mapping[str, str] = os.environ) -> str:
    """Return the output of a Slurm command. Raises UserError if it doesn't exist, fails, or doesn't answer.

    Within a job, the command is retried for a while if the controller doesn't answer.
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
        fix = "run the command on a login node of the cluster; cluster.dry_run=true prints the job's script anywhere"
        raise UserError(problem, fix) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{words[0]} didn't answer within {ANSWER_S:g} s") from None
    if done.returncode:
        errors = "\n".join(line for line in done.stderr.splitlines() if line.strip())
        raise UserError(f"{words[0]} failed ({done.returncode}): {errors or 'no output'}")
    return done.stdout


@dataclass(frozen=True, slots=True)
class Queued:
    """Describe a job in the queue.

    Attributes:
        job: the job's id; ``123_4`` for an element of an array.
        state: PENDING, RUNNING, COMPLETING, …; ``reason``: why it waits; "" if it doesn't.
        since: when it was submitted or, if it runs, started.
        nodes: the nodes it runs on, in Slurm's notation; "" while it waits.
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
        """The directory of its run or sweep; "" if Isobatch didn't submit it."""
        script = Path(self.command)
        return str(script.parent.parent) if script.parent.name == "submissions" else ""

    def __str__(self) -> str:
        reason = f", {self.reason}" if self.reason else ""
        nodes = f" on {self.nodes}" if self.nodes else ""
        return f"{self.state}{reason}{nodes}, since {self.since.replace('T', ' ')}"


def queued(jobs: Iterable[str] = ()) -> dict[str, Queued]:
    """Return the unfinished jobs of this user by id: all of them, or only ``jobs``."""
    identifiers = sorted({job.partition("_")[0] for job in jobs})
    selection = ["--jobs", ",".join(identifiers)] if identifiers else ["--me"]
    try:
        text = ask("squeue", "--noheader", "--array", *selection, "--format", "%i|%T|%r|%V|%S|%N|%o")
    except UserError as error:
        if "Invalid job id" in error.problem:  # Slurm has purged all of these jobs
            return {}
        raise
    return parse_queue(text)


def parse_queue(text: str) -> dict[str, Queued]:
    """Parse lines of ``squeue --format='%i|%T|%r|%V|%S|%N|%o'``, whose last field may contain any characters."""
    found = {}
    for line in re.split(r"\n(?=\d+\S*\|[A-Z_]+\|)", text.removesuffix("\n")) if text else ():
        job, state, reason, submitted, started, nodes, command = line.split("|", 6)
        since = submitted if state == "PENDING" else started
        found[job] = Queued(job, state, "" if reason == "None" else reason, since, nodes, command)
    return found


@dataclass(frozen=True, slots=True)
class Job:
    """Describe this process's own job, as shown by ``scontrol``.

    Attributes:
        restarts: how often it was requeued.
        preempted: a job with a higher priority takes its place.
        ended: when it ends, or ended, at the latest; None without a limit, or if it waits again.
        limit: how long it may run; None without a limit.
        output: the path of its output; "" if unknown.
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
        """Return whether the job has ended, or is ending, because of its time limit."""
        if self.state == "RUNNING" or None in (self.started, self.ended, self.limit):
            return False
        return self.ended >= self.started + self.limit  # type: ignore[operator]

    def left_s(self, now: datetime) -> float | None:
        """Return the seconds until the time limit; None without one."""
        if self.started is None or self.limit is None:
            return None
        return (self.started + self.limit - now).total_seconds()


@dataclass(frozen=True, slots=True)
class JobStart:
    """Identify the start of the job that a process is in. Outside of a job, ``id`` is "".

    The ``id`` of an array element is ``123_4``. SLURM_JOB_ID wouldn't do: in the element that starts last it is the
    number of the array, which means all of its elements.
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
    """Return the job with this id. Raises UserError if Slurm doesn't answer."""
    return parse_job(ask("scontrol", "show", "job", identifier))


def parse_job(text: str) -> Job:
    """Parse the lines of ``scontrol show job``."""
    found = re.findall(r"(?:^|\s)(JobState|Restarts|PreemptTime|StartTime|EndTime|TimeLimit)=(\S*)", text)
    fields = dict(reversed(found))  # the first match of each key, since user-defined texts follow
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
    """Let Slurm expand a node list such as ``gpu-b2[1-3,5],login1``."""
    return ask("scontrol", "show", "hostnames", nodes).split()


def address(node: str) -> str:
    """Return the address at which Slurm reaches a node, on the network that the site has chosen."""
    match = re.search(r"(?:^|\s)NodeAddr=(\S+)", ask("scontrol", "--oneliner", "show", "node", node))
    return match[1] if match else node


def down_nodes(nodes: str) -> list[str]:
    """Return the nodes of a list such as ``n[1-3],n7`` that don't answer, or were taken out of service."""
    text = ask("sinfo", "--noheader", "--Node", "--nodes", nodes, "--format", "%N %T")
    states = dict(line.split(maxsplit=1) for line in text.splitlines() if line.strip())
    # * marks a node that doesn't answer
    return sorted(node for node, state in states.items() if state.lower().startswith(DOWN) or "*" in state)


def restarted_nodes(nodes: str, since: datetime) -> list[str]:
    """Return the ``nodes`` whose daemon started at ``since`` or later, for example after a reboot."""
    text = ask("scontrol", "--oneliner", "show", "node", nodes)
    began = re.findall(r"^NodeName=(\S+) .*?SlurmdStartTime=(\d\S+)", text, re.MULTILINE)
    return sorted({node for node, when in began if datetime.fromisoformat(when) >= since})
