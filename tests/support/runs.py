"""Write run directories as training leaves them, without training."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from isobatch.conf.identity import digest

TASKS = {"digits": "isobatch.trainers.tasks.digits.Digits", "images": "isobatch.trainers.tasks.images.Images"}


def write_run(
    directory: Path, lines: Iterable[dict[str, Any]], *, task: str = "digits", batch: int = 64, lr: float = 0.1,
    seed: int = 0, state: str = "finished", **settings: Any,
) -> Path:  # fmt: skip
    """Write a run of these metrics; ``settings`` are more keys of its config, as ``lr__rule="sqrt"``."""
    directory.mkdir(parents=True)
    lines = list(lines)
    last = next((line for line in reversed(lines) if "step" in line), {"step": 0, "samples": 0})
    plan = {
        "global_size": batch, "per_gpu": batch, "world_size": 1, "steps": last["step"], "samples": last["samples"],
        "lr": {"peak": lr}, "task": task, "optimizer": {"name": "sgd"}, "seed": seed,
        "identity": digest({"name": directory.name}),
    }  # fmt: skip
    config: dict[str, Any] = {
        "format": 1, "seed": seed, "batch": {"global_size": batch, "per_gpu": None, "accumulation": None},
        "lr": {"peak": lr, "base": None, "rule": "auto"}, "task": {"name": task, "_target_": TASKS.get(task, "my.T")},
        "optimizer": {"name": "sgd"}, "given": ["batch.global_size", "lr.peak", "seed"],
    }  # fmt: skip
    for name, value in settings.items():
        section, _, key = name.partition("__")
        config.setdefault(section, {})[key] = value
        config["given"].append(f"{section}.{key}")
    outcome = {"state": state, "cause": "", "step": last["step"], "samples": last["samples"], "attempt": "a1"}
    (directory / "plan.json").write_text(json.dumps(plan))
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    (directory / "outcome.json").write_text(json.dumps(outcome))
    (directory / "events.jsonl").write_text('{"event": "start"}\n')
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def learned(
    batch: int, seed: int, *, quality: float = 1.0, steps: int = 100, critical: float = 256.0, every: int = 1
) -> list[dict[str, Any]]:
    """Return the lines of a run that learns: a step is worth B·E_min/(1 + B/B_crit) samples of a small batch.

    Args:
        quality: the speed of learning; 1 reaches an accuracy of about 0.97.
        every: steps between two lines; ten evaluations are spread over the run.
    """
    noise, lines = random.Random(seed * 1000 + batch), list[dict[str, Any]]()
    for step in range(1, steps + 1):
        gain = quality * step * batch / (1 + batch / critical) / 1000
        place = {
            "step": step,
            "samples": step * batch,
            "epoch": step * batch / 1000,
            "time_s": step * (0.01 + batch / 1e5),
        }
        if step % every == 0:
            loss = 0.05 + 2.2 * math.exp(-gain) + noise.gauss(0, 0.02)
            speed = 1 / (0.01 / batch + 1e-5)
            lines.append(
                {**place, "loss": loss, "lr": 0.1, "global_size": batch, "samples_per_s": speed, "noise/scale": 40.0}
            )
        if step % max(1, steps // 20) == 0:
            accuracy = 0.98 - 0.9 * math.exp(-gain) + noise.gauss(0, 0.002)
            lines.append(
                {**place, "evaluation_s": 0.1, "val/loss": 2 * math.exp(-gain) + 0.1, "val/accuracy": accuracy}
            )
    return lines


def write_sweep(folder: Path, batches: Sequence[int] = (16, 64, 256), seeds: int = 3, **settings: Any) -> Path:
    """Write a sweep over batches and seeds, in which every run sees as many samples."""
    for batch in batches:
        for seed in range(seeds):
            lines = learned(batch, seed, steps=25_600 // batch)
            write_run(folder / f"batch={batch},seed={seed}", lines, batch=batch, seed=seed, **settings)
    return folder
