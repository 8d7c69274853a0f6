"""Train the classic comparison of batch sizes, with and without a scaled LR, and keep its report."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BATCHES, SEEDS = (16, 64, 256, 1024), (0, 1, 2)
TASKS = {
    "images": ("task.args.width=8", "batchnorm.mode=ghost", "batchnorm.ghost_size=8", "duration=5ep"),
    "mnist1d": ("duration=10ep",),
}
# Two micro-batches per step, so that the gradient noise can be measured.
SAME = (
    "batch.accumulation=2", "noise.every=2%", "lr.warmup=20%", "cluster.gpus_per_node=1", "device=cpu",
    "checkpoint.every=null",
)  # fmt: skip
TARGETS = {"images": "val/accuracy>=0.9", "mnist1d": "val/accuracy>=0.9"}
WAYS = {"scaled": "lr.rule=linear", "not scaled": "lr.rule=none"}
KEPT = (".md", ".json", ".svg")  # the page holds its own copy of plotly, and is 5 MB


def rows() -> list[dict[str, Any]]:
    """Return time per epoch, accuracy and gradient variance by task, LR and batch; means over seeds."""
    found = []
    for task, keys in TASKS.items():
        with tempfile.TemporaryDirectory() as folder:
            for way, rule in WAYS.items():
                sweep = (f"batch.global_size={','.join(map(str, BATCHES))}", f"seed={','.join(map(str, SEEDS))}")
                _launch(folder, "-m", f"task={task}", *keys, *SAME, *sweep, rule, f"run.dir={way.replace(' ', '-')}")
                found += list(_rows_of(task, way, Path(folder) / way.replace(" ", "-")))
            _keep(folder, TARGETS[task], HERE / "reports" / task)
    return found


def _rows_of(task: str, way: str, sweep: Path) -> Iterator[dict[str, Any]]:
    for batch in BATCHES:
        seeds = [_lines(sweep / f"batch.global_size={batch},seed={seed}") for seed in SEEDS]
        last = [lines[-1] for lines in seeds]  # the last evaluation
        noise = [[line["noise/trace"] for line in lines if line.get("noise/trace") is not None] for lines in seeds]
        accuracy = [100 * line.get("val/accuracy", 0.0) for line in last]
        yield {
            "task": task,
            "learning rate": way,
            "batch": batch,
            "peak LR": json.loads((sweep / f"batch.global_size={batch},seed=0/plan.json").read_text())["lr"]["peak"],
            "s per epoch": statistics.fmean(line["time_s"] / line["epoch"] for line in last),
            "accuracy %": f"{statistics.fmean(accuracy):.1f} ± {statistics.stdev(accuracy):.1f}",
            "gradient variance": statistics.fmean(traces[-1] for traces in noise if traces) / batch,
        }


def _lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _keep(folder: str, target: str, kept: Path) -> None:
    """Compare the sweeps in ``folder``, and copy the report to ``kept``."""
    directories = ",".join(way.replace(" ", "-") for way in WAYS)
    _launch(folder, "action=report", f"run.dir=[{directories}]", "report.dir=report", f"report.target={target}")
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    for file in sorted((Path(folder) / "report").iterdir()):
        if file.suffix in KEPT:
            shutil.copy(file, kept)


def _launch(folder: str, *overrides: str) -> None:
    cores = os.cpu_count() or 1
    parallel = [f"search.parallel={cores}"] if "-m" in overrides else []
    command = [sys.executable, str(HERE.parent / "launch.py"), *overrides, *parallel]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):  # 1: a run diverged
        raise RuntimeError(done.stdout + done.stderr)


if __name__ == "__main__":
    for row in rows():
        print(json.dumps(row))
