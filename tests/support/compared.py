"""Write runs whose measures end at given values, and compare them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from isobatch.scaling.report.compare.compare import compare as compare_by
from isobatch.scaling.report.compare.comparison import Report
from isobatch.scaling.report.compare.measure import asked
from isobatch.scaling.report.run import Run, read
from isobatch.scaling.report.runs import directories
from tests.support.runs import write_run


def read_all(folder: Path) -> list[Run]:
    """Read the runs in a folder."""
    return [read(run) for run in directories(folder)]


def compare(runs: list[Run], metric: str | None = None, target: str | None = None) -> Report:
    """Compare runs by the values of ``report.metric`` and ``report.target``."""
    return compare_by(runs, asked(metric, target))


def ended(value: float, *, name: str = "val/accuracy", steps: int = 10, batch: int = 64) -> list[dict[str, Any]]:
    """Return the lines of a run whose measure climbs from half of ``value`` to it."""
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        place = {"step": step, "samples": step * batch, "time_s": 0.5 * step}
        lines.append({**place, "loss": 2.0 - step / steps, "samples_per_s": 100.0})
        lines.append({**place, name: value * (0.5 + 0.5 * step / steps)})
    return lines


def write_values(folder: Path, values: dict[tuple[int, float], list[float]], **settings: Any) -> Path:
    """Write a run for each value at the end, by batch and learning rate; their number is the seed."""
    for (batch, lr), ends in values.items():
        for seed, value in enumerate(ends):
            name = f"batch={batch},lr={lr},seed={seed}"
            write_run(folder / name, ended(value, batch=batch), batch=batch, lr=lr, seed=seed, **settings)
    return folder
