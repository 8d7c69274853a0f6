"""List runs: a row each, with their progress and why they last stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from isobatch.conf.rundir.files import read_run
from isobatch.conf.rundir.lock import works
from isobatch.scaling.report.result import WITHOUT_A_WORD, clock, grid

ENDS = ("stopped", "crashed", "oom", "refused", "requeue", "cancelled", "not_requeued", "restart")
LISTED = ("outcome.json", "events.jsonl")  # mark a run; config.yaml is a common name, and sweeps have submissions, too
DEPTH = 3  # levels below a folder that are searched for runs: runs/<sweep>/<run>
CAUSE_CHARS = 60  # of a cause in a table


@dataclass(frozen=True, slots=True)
class Row:
    """Describe a run from its directory.

    Attributes:
        state: the state in ``outcome.json``; ``queued``: a job waits; ``died``: the outcome is ``running``, but no
            process works on the run; ``damaged``: a file is invalid, and ``cause`` names it.
        step, steps: completed steps, and steps of the whole run.
        samples_per_s, eta_s: speed at the last logged step, and seconds to the end at that speed; only while running.
        job: the last Slurm job submitted for the run or working on it; ``queue``: its state; None: the job is over.
        cause: why the run last stopped.
    """

    run: str
    state: str
    step: int
    steps: int | None
    loss: float | None
    samples_per_s: float | None
    eta_s: float | None
    job: str | None
    queue: str | None
    cause: str | None

    def cells(self) -> dict[str, Any]:
        """Return the row's cells by column."""
        cause = self.cause if self.cause is None or len(self.cause) <= CAUSE_CHARS else f"{self.cause[:CAUSE_CHARS]}…"
        return {
            "run": self.run,
            "state": self.state,
            "step": f"{self.step:,}/{'?' if self.steps is None else f'{self.steps:,}'}",
            "loss": self.loss,
            "samples/s": None if self.samples_per_s is None else round(self.samples_per_s),
            "ETA": None if self.eta_s is None else clock(self.eta_s),
            "job": self.job and f"{self.job} {self.queue or 'over'}",
            "stopped last by": cause,
        }


def directories(root: Path, depth: int = DEPTH) -> list[Path]:
    """Return the directories of runs, sorted: ``root`` itself, or those up to ``depth`` levels below it."""
    if any(os.path.lexists(root / name) for name in LISTED):
        return [root]
    inner: list[Path] = []
    with suppress(OSError):  # root isn't a folder, or can't be listed
        inner = [child for child in root.iterdir() if child.is_dir() and not child.is_symlink()] if depth else []
    return sorted(run for child in inner for run in directories(child, depth - 1))


def listing(roots: Sequence[str], queue: Mapping[str, str], output: str) -> str:
    """Return the runs in ``roots`` as a table, or as JSON if ``output`` is ``json``.

    Args:
        queue: Slurm's states of unfinished jobs, by id.
    """
    found = {run.absolute(): run for root in roots for run in directories(Path(os.path.expanduser(root)))}
    rows = [row(run, works(run), queue) for run in found.values()]
    if output == "json":
        return json.dumps([asdict(found_row) for found_row in rows], indent=1)
    return grid([found_row.cells() for found_row in rows]) if rows else f"no runs in {', '.join(roots)}"


def row(directory: Path, works: bool, queue: Mapping[str, str]) -> Row:
    """Return the row of the run in ``directory``.

    Args:
        works: a launch is working on the run now.
        queue: Slurm's states of unfinished jobs, by id.
    """
    files = read_run(directory)
    events, logged = files.events, [line for line in files.metrics if "loss" in line]
    jobs = [str(event["job"]) for event in events if event.get("event") in ("submitted", "start") and "job" in event]
    job_state = queue.get(jobs[-1]) if jobs else None
    state: str = files.outcome.state if files.outcome else "—"
    if job_state and job_state.startswith("PENDING"):
        state = "queued"
    elif state == "running" and not works:
        state = "died"
        events = [*events, {"event": "crashed", "cause": WITHOUT_A_WORD}]  # which the next start will record
    running, last = state == "running", logged[-1] if logged else {}
    pace = last.get("samples_per_s") if running else None
    total, done = files.plan.get("samples"), last.get("samples")
    left = None if total is None or done is None else total - done
    causes = [event["cause"] for event in events if event.get("event") in ENDS and event.get("cause")]
    return Row(
        run=str(directory),
        state="damaged" if files.damage else state,
        step=max(files.outcome.step if files.outcome else 0, files.metrics[-1].get("step", 0) if files.metrics else 0),
        steps=files.plan.get("steps"),
        loss=next((line["loss"] for line in reversed(logged) if line.get("loss") is not None), None),
        samples_per_s=pace,
        eta_s=None if left is None or not pace or pace < 0 else max(0.0, left / pace),
        job=jobs[-1] if jobs else None,
        queue=job_state,
        cause=files.damage or (causes[-1] if causes else None),
    )
