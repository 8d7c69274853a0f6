"""Read the result of a run from its directory, and format tables of results and plans."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isobatch.conf.rundir.files import read_run
from isobatch.scaling.geometry import counted
from isobatch.scaling.limits import one_line
from isobatch.scaling.plan import Plan

WITHOUT_A_WORD = "ended without a word: it was killed, or its machine went down"


@dataclass(frozen=True, slots=True)
class Result:
    """Hold the progress of a run, or how it ended.

    Attributes:
        state: the state in ``outcome.json``; ``—`` if there is none.
        loss: the last logged loss; ``val`` holds the values of the last evaluation by name.
        peak: the plan's peak learning rate.
        restarts: restarts of the workers in all attempts; ``skipped``: steps whose loss or gradient wasn't finite.
        damage: the problem of a damaged file, which the other fields leave out.
        per_gpu: the largest micro-batch before the first and after the last out-of-memory error; None: no such error.
    """

    state: str = "—"
    steps: int = 0
    samples: int = 0
    loss: float | None = None
    val: dict[str, float] = field(default_factory=dict)
    peak: float | None = None
    restarts: int = 0
    skipped: int = 0
    per_gpu: tuple[int, int] | None = None
    damage: str | None = field(default=None, compare=False)

    def __str__(self) -> str:
        known = {name: value for name, value in {"loss": self.loss, **self.val}.items() if value is not None}
        values = [f"{one_line(name)} {value:.4g}" for name, value in known.items()]
        done = f"{self.state} after {counted(self.steps, 'step')}, {counted(self.samples, 'sample')}"
        return " · ".join([done, *self._mishaps(), *values])

    def _mishaps(self) -> Iterator[str]:
        """Yield a description of each deviation from the plan."""
        if self.damage:
            yield f"damaged: {one_line(self.damage)}"
        if self.restarts:
            yield counted(self.restarts, "restart")
        if self.per_gpu:
            yield f"per-GPU batch {self.per_gpu[0]:,} → {self.per_gpu[1]:,} (out of memory)"
        if self.skipped:
            yield f"{counted(self.skipped, 'step')} skipped (not finite)"

    def row(self) -> dict[str, Any]:
        """Return the result as a row of a table of runs."""
        reached = {"state": self.state, "steps": self.steps, "samples": self.samples}
        mishaps = {"restarts": self.restarts, "skipped": self.skipped}
        seen = {name: number for name, number in mishaps.items() if number}
        return {**reached, "peak LR": self.peak, "loss": self.loss, **self.val, **seen}


def result(directory: Path) -> Result:
    """Return the result of the run in ``directory``; values from missing or damaged files keep their defaults."""
    files = read_run(directory)
    ended = files.outcome
    loss: float | None = None
    val: dict[str, float] = {}
    for line in files.metrics:
        loss = loss if line.get("loss") is None else line["loss"]
        val = {name: value for name, value in line.items() if name.startswith(("val/", "ema/"))} or val
    return Result(
        *((ended.state, ended.step, ended.samples) if ended else ("—", 0, 0)),
        loss,
        val,
        files.plan.get("lr", {}).get("peak"),
        *_mishaps(files.events),
        damage=files.damage,
    )


def _mishaps(events: Sequence[dict[str, Any]]) -> tuple[int, int, tuple[int, int] | None]:
    """Return the restarts, the skipped steps, and the per-GPU batch before and after memory ran out, from events."""
    restarts = [event for event in events if event.get("event") == "restart"]
    sizes = [(event.get("per_gpu_before"), event.get("per_gpu")) for event in restarts if event.get("kind") == "oom"]
    halved = [(before, after) for before, after in sizes if before is not None and after is not None]
    skipped: set[int] = set()
    for event in events:
        if event.get("event") == "skip":
            skipped.add(event.get("step", 0))
        elif event.get("event") == "going_on":  # later steps were repeated after resuming
            skipped = {step for step in skipped if step <= event.get("step", 0)}
    return len(restarts), len(skipped), (halved[0][0], halved[-1][1]) if halved else None


def plan_row(plan: Plan) -> dict[str, Any]:
    """Return ``plan`` as a row of a table of plans."""
    return {
        "global batch": plan.cut.global_size,
        "per GPU": plan.cut.per_gpu,
        "ranks": plan.cut.world,
        "accumulation": plan.cut.accumulation,
        "steps": plan.steps,
        "samples": plan.samples,
        "peak LR": plan.peak.lr,
        "identity": plan.identity,
    }


def grid(rows: Sequence[dict[str, Any]]) -> str:
    """Format rows as columns under their names, in order of first appearance; numbers are right-aligned."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[one_line(name) for name in names]] + [[_cell(row.get(name)) for name in names] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    right = [all(isinstance(row.get(name), int | float | None) for row in rows) for name in names]
    return "\n".join(
        "  ".join(
            text.rjust(w) if r else text.ljust(w) for text, w, r in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in cells
    )


def _cell(value: Any) -> str:
    if value is None:
        return "—"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else one_line(str(value))


def clock(seconds: float) -> str:
    """Format a time as ``3:05:07``, rounded up to whole seconds."""
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
