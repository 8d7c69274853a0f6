"""Compare the batch that action=tune recommends with the best batch of a full sweep, in time and in samples."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.trained import Trained, train_all

HERE = Path(__file__).parent
SEEDS = (0, 1)
BATCHES = (8, 16, 32, 64, 128, 256, 512)
# Task -> (its keys, the target of val/loss, samples of a run, samples between evaluations)
TASKS = {
    "mnist1d": (("optimizer=adamw", "lr.decay=constant", "lr.warmup=2%"), 0.30, 100_000, 256),
    "text": (("optimizer=adamw", "lr.decay=constant", "lr.warmup=2%", "task.args.length=32", "task.args.width=32",
              "task.train_samples=null", "evaluate.samples=512"), 2.30, 60_000, 512),
}  # fmt: skip
PARTS = "tune.parts=[memory,speed,noise]"


def keys(task: str) -> tuple[str, ...]:
    """Return the keys that all commands of a task share."""
    own, target, samples, every = TASKS[task]
    return (
        f"task={task}", *own, f"duration={samples}sa", f"evaluate.every={every}sa", f"stop.at=val/loss<={target}",
        "device=cpu",
    )  # fmt: skip


def tuned(*overrides: str, **env: str) -> tuple[dict[str, Any], float]:
    """Return the results of action=tune, and the seconds that it took."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, str(HERE.parent / "launch.py"), "action=tune", *overrides, "output=json"],
            cwd=folder, capture_output=True, text=True, check=False, env={**os.environ, **env},
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(done.stderr)
        return json.loads(done.stdout), time.perf_counter() - began


def reached(run: Trained, target: float) -> tuple[float, float]:
    """Return the samples and the seconds of training until the target; infinite if it wasn't reached."""
    end = next((line for line in run.lines if line.get("val/loss", math.inf) <= target), None)
    return (end["samples"], end["time_s"]) if end else (math.inf, math.inf)


def rows() -> list[dict[str, Any]]:
    """Return two rows per task: the batch that was recommended for time, and the one for samples."""
    found = []
    for task, (_, target, _, _) in TASKS.items():
        results, seconds = tuned(PARTS, *keys(task), "batch.global_size=32", OMP_NUM_THREADS="1")
        best = results["recommendation"]
        aims = {"time": best, **{one["aim"]: one for one in best["alternatives"]}}  # none where the noise isn't known
        batches = sorted({*BATCHES, *(one["global_size"] for one in aims.values())})
        commands = [(*keys(task), f"batch.global_size={batch}", f"seed={seed}") for batch in batches for seed in SEEDS]
        began = time.perf_counter()
        runs = train_all(commands)
        sweep_s = time.perf_counter() - began
        measured = {}
        for number, batch in enumerate(batches):
            seeds = [reached(run, target) for run in runs[len(SEEDS) * number :][: len(SEEDS)]]
            measured[batch] = [statistics.fmean(values) for values in zip(*seeds, strict=True)]
        for aim, chosen in aims.items():
            costs = {batch: cost[aim == "time"] for batch, cost in measured.items()}
            winner = min(costs, key=costs.__getitem__)
            if math.isinf(costs[winner]):
                raise RuntimeError(f"{task}: no batch of {batches} reached val/loss <= {target} with all seeds")
            found.append(
                {
                    "task": task,
                    "aim": aim,
                    "recommended batch": chosen["global_size"],
                    "best of the sweep": winner,
                    "cost of the recommended / best": costs[chosen["global_size"]] / costs[winner],
                    "largest cost of the sweep / best": max(filter(math.isfinite, costs.values())) / costs[winner],
                    "critical batch": results["noise"]["over_run"] or "not known",
                    "spread of the times": results["speed"]["spread"],
                    "tuning / sweep, in time": seconds / sweep_s,
                }
            )
    return found


def durations() -> list[dict[str, Any]]:
    """Return a row for the command on a small task, with everything at its default."""
    results, seconds = tuned("task=digits")
    return [
        {
            "command": "python launch.py action=tune task=digits",
            "seconds, start to exit": seconds,
            "recommended batch": results["recommendation"]["global_size"],
            "spread of the times": results["speed"]["spread"],
        }
    ]


if __name__ == "__main__":
    for row in rows():
        print(json.dumps(row))
