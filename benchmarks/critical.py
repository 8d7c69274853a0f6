"""Measure steps and samples to a target by batch, the LR tuned at each: SGD on mnist1d, AdamW on a small GPT."""

from __future__ import annotations

import json
import math
import statistics
from typing import Any, NamedTuple

from benchmarks.trained import Trained, train_all


class Setting(NamedTuple):
    """What is trained until the validation loss is ``target``.

    Attributes:
        tried: LRs to try and the most samples of a run, by batch.
        power: the LR's rule is η ∝ B^power.
        every: the fewest samples between evaluations.
        passes: micro-batches per step; the noise needs several.
    """

    task: tuple[str, ...]
    target: float
    tried: dict[int, tuple[tuple[float, ...], int]]
    seeds: tuple[int, ...]
    power: float
    every: int
    passes: int


MNIST1D = Setting(
    ("task=mnist1d", "lr.decay=constant", "optimizer.weight_decay=0", "noise.every=4st"),
    0.30,
    {
        16: ((0.02, 0.04, 0.08), 30_000),
        32: ((0.04, 0.08, 0.16), 40_000),
        64: ((0.04, 0.08, 0.16), 50_000),
        128: ((0.04, 0.08, 0.16), 60_000),
        256: ((0.08, 0.16, 0.32), 110_000),
        512: ((0.08, 0.16, 0.32), 220_000),
    },
    seeds=(0, 1),
    power=1.0,
    every=512,
    passes=4,
)
TEXT = Setting(
    ("task=text", "task.args.length=32", "task.args.width=32", "task.args.dropout=0.0", "task.train_samples=null",
     "optimizer=adamw", "optimizer.weight_decay=0", "clip_norm=1.0", "lr.decay=constant", "lr.warmup=200sa",
     "evaluate.samples=1000"),
    2.30,
    {
        4: ((0.002, 0.004, 0.008), 8_000),
        16: ((0.004, 0.008, 0.016), 10_000),
        32: ((0.004, 0.008, 0.016), 14_000),
        64: ((0.004, 0.008, 0.016), 20_000),
        128: ((0.004, 0.008, 0.016), 30_000),
        256: ((0.008, 0.016, 0.032), 45_000),
    },
    seeds=(0,),
    power=0.5,
    every=256,
    passes=1,
)  # fmt: skip


def command(setting: Setting, batch: int, lr: float, seed: int) -> tuple[str, ...]:
    return (
        *setting.task, f"batch.global_size={batch}", f"batch.per_gpu={batch // setting.passes}", f"lr.peak={lr}",
        f"seed={seed}", f"duration={setting.tried[batch][1]}sa", f"evaluate.every={max(batch, setting.every)}sa",
        f"stop.at='val/loss<={setting.target}'",
    )  # fmt: skip


def reached(setting: Setting, run: Trained) -> dict[str, Any] | None:
    """Return the first evaluation that reaches the target, or None."""
    return next((line for line in run.lines if line.get("val/loss", math.inf) <= setting.target), None)


def noise_at(run: Trained, step: int) -> float | None:
    """Return the noise scale last measured up to ``step``, in samples."""
    known = [line["noise/scale"] for line in run.lines if line.get("noise/scale") and line["step"] <= step]
    return float(known[-1]) if known else None


def rows(setting: Setting = MNIST1D) -> list[dict[str, Any]]:
    """Return a row per batch, for the LR that reached the target first: means over seeds."""
    cells = [(batch, lr) for batch, (rates, _) in setting.tried.items() for lr in rates]
    count = len(setting.seeds)
    runs = train_all([command(setting, *cell, seed) for cell in cells for seed in setting.seeds])
    best: dict[int, tuple[float, float, list[Trained]]] = {}
    for number, (batch, lr) in enumerate(cells):
        seeds = runs[count * number :][:count]
        ends = [reached(setting, run) for run in seeds]
        steps = statistics.fmean(end["step"] if end else math.inf for end in ends)
        if batch not in best or steps < best[batch][0]:
            best[batch] = (steps, lr, seeds)
    smallest = min(best)
    found = []
    for batch, (steps, lr, seeds) in best.items():
        by_rule = best[smallest][1] * (batch / smallest) ** setting.power
        scales = [scale for run in seeds if (end := reached(setting, run)) and (scale := noise_at(run, end["step"]))]
        rates = setting.tried[batch][0]
        row = {
            "batch": batch,
            "best LR": f"{lr:g}" + " (end of the tried range)" * (lr in (rates[0], rates[-1])),
            "LR by the linear rule" if setting.power == 1 else "LR by the rule sqrt": f"{by_rule:.3g}",
            "steps to the target": f"{steps:,.0f}",
            "samples": f"{steps * batch:,.0f}",
            "speed-up in steps": best[smallest][0] / steps,
            "of a perfect speed-up": best[smallest][0] * smallest / (steps * batch),
        }
        if "noise.every=4st" in setting.task:
            row["noise scale at the target"] = statistics.fmean(scales) if scales else "not known"
        found.append(row)
    return found


def rows_of_text() -> list[dict[str, Any]]:
    return rows(TEXT)


if __name__ == "__main__":
    for row in rows_of_text():
        print(json.dumps(row))
