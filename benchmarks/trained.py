"""Train many short runs, one per core, for the benchmarks of learning."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.cores import on_all_cores
from tests.support.harness import Runs

CONSTANT = ("evaluate.every=null", "checkpoint.every=null", "data.fingerprint=false", "log.every=1st")


@dataclass(frozen=True, slots=True)
class Trained:
    """The lines of metrics of a run that has ended (none if it failed), and its time."""

    lines: list[dict[str, Any]]
    seconds: float

    def last(self, name: str) -> float:
        """Return the last value of ``name``, or infinity if the run failed."""
        values = [line[name] for line in self.lines if line.get(name) is not None]
        return float(values[-1]) if values and values[-1] == values[-1] else float("inf")


def train_all(commands: Sequence[Sequence[str]]) -> list[Trained]:
    """Train a run for each command, given as overrides. Each core trains one single-threaded run at a time."""
    return [Trained(*result) for result in on_all_cores([partial(_train, command) for command in commands])]


def _train(command: Sequence[str], folder: Path) -> tuple[list[dict[str, Any]], float]:
    """Return the metrics of a run that finished, else none, and its seconds."""
    began = time.perf_counter()
    run = Runs(folder, deadline_s=600)(1, *CONSTANT, *command)
    lines = run.metrics() if run.ends[0].get("state") == "finished" else []
    return lines, time.perf_counter() - began


def spread(values: Sequence[float]) -> str:
    """Format the mean ± standard deviation over seeds."""
    if not all(value < float("inf") for value in values):
        return "diverged"
    return f"{statistics.fmean(values):.4g} ± {statistics.stdev(values) if len(values) > 1 else 0:.2g}"
