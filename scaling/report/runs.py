"""Runs that are there, a row each: how far they have come, and why they stopped last."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from isobatch.conf.rundir.files import holds_a_run, read_run
from isobatch.conf.rundir.lock import works
from isobatch.scaling.report.result import WITHOUT_A_WORD, clock, grid

ENDS = ("stopped", "crashed", "oom", "refused", "requeue", "cancelled", "not_requeued", "restart")
DEPTH = 3  # of runs below a folder: runs/<sweep>/<run>
CAUSE_CHARS = 60  # of a cause, in a table


@dataclass(frozen=True, slots=True)
class Row:
    """Describe a run, as far as its directory tells.

    Attributes:
        state: of ``outcome.json``; ``queued`` where a job waits; ``died`` where it says that it is running, and isn't;
            ``damaged`` where a file isn't what a run writes, and ``cause`` says which.
        step, steps: completed, and of the whole run.
        samples_per_s, eta_s: where it is running: of the last logged step, and seconds to the end at that pace.
        job: of Slurm, the last one that was submitted for it, or worked on it; ``queue``: what Slurm says of it; None:
            it is over.
        cause: why it stopped last.
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
    """Return the runs in ``root``: itself, or those at most ``depth`` below it, sweeps included; by name."""
    if holds_a_run(root):
        return [root]
    inner: list[Path] = []
    with suppress(OSError):  # it isn't a folder, or one that can't be listed
        inner = [one for one in root.iterdir() if one.is_dir() and not one.is_symlink()] if depth else []
    return sorted(run for one in inner for run in directories(one, depth - 1))


def listing(roots: Sequence[str], queue: Mapping[str, str], output: str) -> str:
    """Return the runs in ``roots`` as a table, or as JSON where ``output`` says so.

    Args:
        queue: what Slurm says of the jobs that aren't over, by id.
    """
    found = {run.absolute(): run for root in roots for run in directories(Path(os.path.expanduser(root)))}
    rows = [row(run, works(run), queue) for run in found.values()]
    if output == "json":
        return json.dumps([asdict(one) for one in rows], indent=1)
    return grid([one.cells() for one in rows]) if rows else f"no runs in {', '.join(roots)}"


def row(directory: Path, works: bool, queue: Mapping[str, str]) -> Row:
    """Return the row of the run in ``directory``.

    Args:
        works: some launch has it now.
        queue: what Slurm says of the jobs that aren't over, by id.
    """
    files = read_run(directory)
    happened, logged = files.events, [line for line in files.metrics if "loss" in line]
    jobs = [str(event["job"]) for event in happened if event.get("event") in ("submitted", "start") and "job" in event]
    told = queue.get(jobs[-1]) if jobs else None
    state = files.outcome.get("state", "—")
    if told and told.startswith("PENDING"):
        state = "queued"
    elif state == "running" and not works:
        state = "died"
        happened = [*happened, {"event": "crashed", "cause": WITHOUT_A_WORD}]  # as its next start will note
    running, last = state == "running", logged[-1] if logged else {}
    pace = last.get("samples_per_s") if running else None
    whole, at = files.plan.get("samples"), last.get("samples")
    left = None if whole is None or at is None else whole - at
    causes = [event["cause"] for event in happened if event.get("event") in ENDS and event.get("cause")]
    return Row(
        run=str(directory),
        state="damaged" if files.damage else state,
        step=max(line.get("step", 0) for line in (files.outcome, *files.metrics[-1:])),
        steps=files.plan.get("steps"),
        loss=next((line["loss"] for line in reversed(logged) if line.get("loss") is not None), None),
        samples_per_s=pace,
        eta_s=None if left is None or not pace or pace < 0 else max(0.0, left / pace),
        job=jobs[-1] if jobs else None,
        queue=told,
        cause=files.damage or (causes[-1] if causes else None),
    )
