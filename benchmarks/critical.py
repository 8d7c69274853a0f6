"""Measure steps and samples to a target by batch, and the noise scale: SGD on mnist1d, its LR tuned at each batch."""

from __future__ import annotations

import json
import math
import statistics
from typing import Any

from benchmarks.trained import Trained, train_all

TARGET = 0.30  # validation loss
SEEDS = (0, 1)
# Batch -> (LRs to try, samples of a run)
TRIED = {
    16: ((0.02, 0.04, 0.08), 30_000),
    32: ((0.04, 0.08, 0.16), 40_000),
    64: ((0.04, 0.08, 0.16), 50_000),
    128: ((0.04, 0.08, 0.16), 60_000),
    256: ((0.08, 0.16, 0.32), 110_000),
    512: ((0.08, 0.16, 0.32), 220_000),
}
TASK = ("task=mnist1d", "lr.decay=constant", "optimizer.weight_decay=0", "noise.every=4st")


def command(batch: int, lr: float, seed: int) -> tuple[str, ...]:
    return (
        *TASK, f"batch.global_size={batch}", f"batch.per_gpu={batch // 4}", f"lr.peak={lr}", f"seed={seed}",
        f"duration={TRIED[batch][1]}sa", f"evaluate.every={max(batch, 512)}sa",
    )  # fmt: skip


def reached(run: Trained) -> dict[str, Any] | None:
    """Return the first evaluation that reaches the target, or None."""
    return next((line for line in run.lines if line.get("val/loss", math.inf) <= TARGET), None)


def noise_at(run: Trained, step: int) -> float | None:
    """Return the noise scale last measured up to ``step``, in samples."""
    known = [line["noise/scale"] for line in run.lines if line.get("noise/scale") and line["step"] <= step]
    return float(known[-1]) if known else None


def rows() -> list[dict[str, Any]]:
    """Return a row per batch, for the LR that reached the target first: means over seeds."""
    cells = [(batch, lr) for batch, (rates, _) in TRIED.items() for lr in rates]
    runs = train_all([command(*cell, seed) for cell in cells for seed in SEEDS])
    best: dict[int, tuple[float, float, list[Trained]]] = {}
    for number, (batch, lr) in enumerate(cells):
        seeds = runs[len(SEEDS) * number :][: len(SEEDS)]
        ends = [reached(run) for run in seeds]
        steps = statistics.fmean(end["step"] if end else math.inf for end in ends)
        if batch not in best or steps < best[batch][0]:
            best[batch] = (steps, lr, seeds)
    smallest = min(best)
    found = []
    for batch, (steps, lr, seeds) in best.items():
        linear = best[smallest][1] * batch / smallest
        scales = [scale for run in seeds if (end := reached(run)) and (scale := noise_at(run, end["step"]))]
        found.append(
            {
                "batch": batch,
                "best LR": f"{lr:g}" + " (end of the tried range)" * (lr in (TRIED[batch][0][0], TRIED[batch][0][-1])),
                "LR by the linear rule": f"{linear:g}",
                "steps to the target": f"{steps:,.0f}",
                "samples": f"{steps * batch:,.0f}",
                "speed-up in steps": best[smallest][0] / steps,
                "of a perfect speed-up": best[smallest][0] * smallest / (steps * batch),
                "noise scale at the target": statistics.fmean(scales) if scales else "not known",
            }
        )
    return found


if __name__ == "__main__":
    for row in rows():
        print(json.dumps(row))
