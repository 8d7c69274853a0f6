"""Train the classic comparison of batch sizes, with and without a scaled LR, and keep its report."""

from __future__ import annotations

import json
import os
import shutil
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
    "batch.accumulation=2", "noise.every=2%", "log.every=2%", "lr.warmup=20%", "cluster.gpus_per_node=1", "device=cpu",
    "checkpoint.every=null",
)  # fmt: skip
TARGETS = {"images": "val/accuracy>=0.9", "mnist1d": "val/accuracy>=0.9"}
WAYS = {"scaled": "lr.rule=linear", "not scaled": "lr.rule=none"}
KEPT = (".md", ".csv", ".svg")  # the page holds its own copy of plotly, and is 5 MB


def rows() -> list[dict[str, Any]]:
    """Return time per epoch, accuracy and gradient variance by task, LR and batch; means over seeds."""
    found: list[dict[str, Any]] = []
    for task, keys in TASKS.items():
        with tempfile.TemporaryDirectory() as folder:
            for way, rule in WAYS.items():
                sweep = (f"batch.global_size={','.join(map(str, BATCHES))}", f"seed={','.join(map(str, SEEDS))}")
                _launch(folder, "-m", f"task={task}", *keys, *SAME, *sweep, rule, f"run.dir={way.replace(' ', '-')}")
            found += _rows_of(_keep(folder, TARGETS[task], HERE / "reports" / task))
    return found


def _rows_of(report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a row for each group of a report; a value that no run has is a dash."""
    for group in report["groups"]:
        last = group["last"] or {"mean": None, "deviation": None}
        percent = [f"{100 * value:.1f}" for value in (last["mean"], last["deviation"]) if value is not None]
        way = [*group["runs"], *group["left_out"]][0].partition("/")[0]
        yield {
            "task": group["task"],
            "learning rate": way.replace("-", " "),
            "batch": group["global_size"],
            "peak LR": group["lr_peak"],
            "s per epoch": _mean(group["epoch_s"]),
            "accuracy %": " ± ".join(percent) or "—",
            "gradient variance": _mean(group["gradient_variance"]),
        }


def _mean(spread: dict[str, Any] | None) -> Any:
    return spread["mean"] if spread else "—"


def _keep(folder: str, target: str, kept: Path) -> dict[str, Any]:
    """Compare the sweeps in ``folder``, copy the report's small files to ``kept``, and return its values."""
    directories = ",".join(way.replace(" ", "-") for way in WAYS)
    _launch(folder, "action=report", f"run.dir=[{directories}]", "report.dir=report", f"report.target={target}")
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    made = Path(folder) / "report"
    report: dict[str, Any] = json.loads((made / "report.json").read_text())
    report["files"] = [name for name in report["files"] if name.endswith((*KEPT, ".json"))]
    for name in report["files"]:
        shutil.copy(made / name, kept)
    (kept / "report.json").write_text(f"{json.dumps(report, indent=1)}\n")
    return report


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
