"""Time ``action=report`` on 100 runs with 10,000 lines each: `python -m benchmarks.report`."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support.runs import write_run

ROOT = Path(__file__).parents[1]
LINES = 10_000
BATCHES, RATES, SEEDS = (16, 64, 256, 1024), (0.05, 0.1, 0.2, 0.4, 0.8), 5
COMMANDS = {"action=report": ("action=report", "report.dir={folder}/report"), "action=runs": ("action=runs",)}


def lines(batch: int, seed: int) -> list[dict[str, Any]]:
    """Return the lines of a run: 10,000 steps with every key that training logs, and 20 evaluations."""
    noise, found = random.Random(seed), list[dict[str, Any]]()
    for number in range(1, LINES + 1):
        step, share = 10 * number, number / LINES
        place = {"step": step, "samples": step * batch, "epoch": step * batch / 50_000, "time_s": 0.1 * number}
        logged = {
            "loss": 2.3 * (1 - share) + 0.1 * noise.random(), "lr": 0.1 * (1 - share), "grad_norm": noise.random(),
            "global_size": batch, "samples_per_s": 100.0 * batch * (0.9 + 0.2 * noise.random()), "units": step * batch,
            "units_per_s": 100.0 * batch, "data_wait": 0.1 * noise.random(), "memory_gb": 1.25,
        }  # fmt: skip
        found.append({**place, **logged})
        if number % (LINES // 20) == 0:
            found.append(
                {**place, "evaluation_s": 0.5, "val/loss": 2.3 - 2.2 * share, "val/accuracy": 0.1 + 0.85 * share}
            )
    return found


def write(folder: Path) -> None:
    """Write the runs."""
    for batch in BATCHES:
        for lr in RATES:
            for seed in range(SEEDS):
                name = f"batch={batch},lr={lr},seed={seed}"
                write_run(folder / name, lines(batch, seed), batch=batch, lr=lr, seed=seed)


def seconds(command: Sequence[str]) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, str(ROOT / "launch.py"), *command], check=True, capture_output=True)
    return time.perf_counter() - began


def rows() -> list[dict[str, Any]]:
    """Return a row for each command: the best of three."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder / "runs")
        bytes_read = sum(file.stat().st_size for file in folder.glob("runs/*/metrics.jsonl"))
        found = []
        for label, command in COMMANDS.items():
            words = [word.format(folder=folder) for word in command]
            best = min(seconds([*words, f"run.dir={folder}/runs"]) for _ in range(3))
            target = "≤ 10" if label == "action=report" else ""
            found.append({"command": label, "seconds": best, "MB/s": bytes_read / 1e6 / best, "target": target})
        return found


if __name__ == "__main__":
    print(json.dumps(rows(), indent=1, ensure_ascii=False))
