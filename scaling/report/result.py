"""Read the result of a run from its directory: a line, or a row of a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isobatch.scaling.geometry import counted
from isobatch.scaling.limits import one_line
from isobatch.scaling.report.grid import clock, rounded, shortened
from isobatch.scaling.report.run import read


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
