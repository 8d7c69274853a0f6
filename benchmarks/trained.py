"""Train many short runs, one per core, for the benchmarks of learning."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    with tempfile.TemporaryDirectory() as folder:
        cores = os.cpu_count() or 1
        drivers = [_drive(commands, first, cores, Path(folder)) for first in range(min(cores, len(commands)))]
        codes = [os.waitpid(pid, 0)[1] for pid in drivers]
        if any(codes):
            raise RuntimeError("".join(file.read_text() for file in Path(folder).glob("*.log")))
        found = [json.loads((Path(folder) / f"{index}.json").read_text()) for index in range(len(commands))]
    return [Trained(*result) for result in found]


def _drive(commands: Sequence[Sequence[str]], first: int, stride: int, folder: Path) -> int:
    """Fork a process that runs every ``stride``-th command, and return its id."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        log = os.open(folder / f"{first}.log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        for index in range(first, len(commands), stride):
            began = time.perf_counter()
            run = Runs(folder / f"run-{index}", deadline_s=600)(1, *CONSTANT, *commands[index])
            lines = run.metrics() if run.ends[0].get("state") == "finished" else []
            (folder / f"{index}.json").write_text(json.dumps([lines, time.perf_counter() - began]))
        code = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)


def spread(values: Sequence[float]) -> str:
    """Format the mean ± standard deviation over seeds."""
    if not all(value < float("inf") for value in values):
        return "diverged"
    return f"{statistics.fmean(values):.4g} ± {statistics.stdev(values) if len(values) > 1 else 0:.2g}"
