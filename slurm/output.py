"""What Slurm writes into the output of a job when it ends it, or can't start it."""

from __future__ import annotations

import os
import re
from datetime import datetime
from pathlib import Path

TAIL_BYTES = 1 << 16  # of an output, whose end has what Slurm said last

# What it says, and what that means.
DUE = {
    "PREEMPTION": "preempted: a job with a higher priority took its place",
    "JOB REQUEUE": "`scontrol requeue`",
    "TIME LIMIT": "its time limit",
    "NODE FAILURE": "a node failed",
}


def tail(output: Path) -> str:
    """Return the end of a job's output; empty where it can't be read."""
    try:
        with open(output, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
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
    found = re.findall(r"^srun: error: Task launch for \S+ failed on node (\S+): ", _of_this_start(text), re.MULTILINE)
    return sorted(set(found))


def parse_complaint(text: str) -> str:
    """Return the last thing that a launcher of this start said was wrong; empty where there is nothing."""
    return "".join(re.findall(r"^isobatch: (.*)$", _of_this_start(text), re.MULTILINE)[-1:])


def _of_this_start(text: str) -> str:
    return text.rpartition("*** JOB ")[2]
