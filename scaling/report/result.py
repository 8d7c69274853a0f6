"""Read the result of a run from its directory, and format tables of results and plans."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isobatch.scaling.geometry import counted
from isobatch.scaling.limits import one_line
from isobatch.scaling.plan import Plan
from isobatch.scaling.report.run import read

CAUSE_CHARS = 60  # of a cause in a table
LEAST_CHARS = 12  # of a column of text


class Figure(str):
    """The text of a number, which a table aligns as one."""


@dataclass(frozen=True, slots=True)
class Result:
    """Hold the progress of a run, or how it ended.

    Attributes:
        state: the state in ``outcome.json``; ``—`` if there is none.
        loss: the last logged loss; ``val`` holds the values of the last evaluation by name.
        peak: the plan's peak learning rate.
        restarts: restarts of the workers in all attempts; ``skipped``: steps whose loss or gradient wasn't finite.
        damage: the problem of a damaged file, which the other fields leave out.
        time_s, samples_per_s: as in ``run.Progress``.
        cause: why the run last stopped; ``early``: why a finished one ended before the end of its plan.
        per_gpu: the largest micro-batch before the first and after the last out-of-memory error; None: no such error.
    """

    state: str = "—"
    steps: int = 0
    samples: int = 0
    loss: float | None = None
    val: dict[str, float | None] = field(default_factory=dict)
    peak: float | None = None
    restarts: int = 0
    skipped: int = 0
    per_gpu: tuple[int, int] | None = None
    time_s: float | None = None
    samples_per_s: float | None = None
    cause: str | None = field(default=None, compare=False)
    early: str = ""
    damage: str | None = field(default=None, compare=False)

    def __str__(self) -> str:
        known = {name: value for name, value in {"loss": self.loss, **self.val}.items() if value is not None}
        values = [f"{one_line(name)} {value:.4g}" for name, value in known.items()]
        done = f"{self.state} after {counted(self.steps, 'step')}, {counted(self.samples, 'sample')}"
        return " · ".join([done, *([one_line(self.early)] if self.early else []), *self._mishaps(), *values])

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
        pace = {"time": None if self.time_s is None else clock(self.time_s), "samples/s": rounded(self.samples_per_s)}
        mishaps = {"restarts": self.restarts, "skipped": self.skipped}
        seen = {name: number for name, number in mishaps.items() if number}
        why = {"cause": shortened(self.cause)} if self.cause and self.state != "finished" else {}
        return {**reached, "peak LR": self.peak, "loss": self.loss, **self.val, **pace, **seen, **why}


def result(directory: Path) -> Result:
    """Return the result of the run in ``directory``; values from missing or damaged files keep their defaults."""
    run = read(directory)
    return Result(
        run.recorded,
        run.done.step,
        run.done.samples,
        run.loss,
        run.evaluation,
        run.recipe.lr_peak,
        *_mishaps(run.events),
        time_s=run.done.time_s,
        samples_per_s=run.done.samples_per_s,
        cause=run.cause,
        early=run.early,
        damage=run.damage,
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


def grid(
    rows: Sequence[dict[str, Any]], width: int = 0, optional: Sequence[str] = (), shortened: Sequence[str] = ()
) -> str:
    """Format rows as columns under their names, in order of first appearance; numbers are right-aligned.

    Args:
        width: the most characters of a line, if that can be reached; 0: any.
        optional: columns that are left out for it, in this order; then those of ``shortened`` lose their middle.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    texts = {name: [one_line(name), *(_cell(row.get(name)) for row in rows)] for name in names}
    widths = {name: max(map(len, texts[name])) for name in names}
    for name in (*optional, *shortened) if width else ():
        over = sum(widths.values()) + 2 * (len(widths) - 1) - width
        if over > 0 and name in widths and name in optional:
            del widths[name]
        elif over > 0 and name in widths:
            widths[name] = max(min(LEAST_CHARS, widths[name]), widths[name] - over)
    right = {name: all(isinstance(row.get(name), int | float | Figure | None) for row in rows) for name in widths}
    lines = [
        "  ".join(
            texts[name][row].rjust(w) if right[name] else cut(texts[name][row], w).ljust(w)
            for name, w in widths.items()
        ).rstrip()
        for row in range(len(rows) + 1)
    ]
    if left_out := [name for name in names if name not in widths]:
        lines.append(f"(too narrow for {', '.join(left_out)}; output=json has everything)")
    return "\n".join(lines)


def cut(text: str, width: int) -> str:
    """Return ``text`` with its middle left out if it is wider than ``width``."""
    if len(text) <= width:
        return text
    end = (width - 1) // 2
    return f"{text[: width - 1 - end]}…{text[len(text) - end :]}"


def rounded(value: float | None) -> int | None:
    return None if value is None else round(value)


def _cell(value: Any) -> str:
    if value is None:
        return "—"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else one_line(str(value))


def shortened(cause: str) -> str:
    """Return a cause that fits into a table."""
    return cause if len(cause) <= CAUSE_CHARS else f"{cause[:CAUSE_CHARS]}…"


def clock(seconds: float) -> str:
    """Format a time as ``3:05:07``, rounded up to whole seconds."""
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
