"""Steps and samples to a target by batch: SGD on mnist1d, its LR tuned at each batch, and the noise scale beside it."""

from __future__ import annotations

import json
import math
import statistics
from typing import Any

from benchmarks.trained import Trained, train_all

TARGET = 0.30  # validation loss
SEEDS = (0, 1)
# Batch: the LRs tried, and how many samples a run gets for them.
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
    """The first evaluation at which the target is reached; None: it isn't."""
    return next((line for line in run.lines if line.get("val/loss", math.inf) <= TARGET), None)


def noise_at(run: Trained, step: int) -> float | None:
    """The noise scale that was last measured until ``step``, in samples."""
    known = [line["noise/scale"] for line in run.lines if line.get("noise/scale") and line["step"] <= step]
    return float(known[-1]) if known else None


def rows() -> list[dict[str, Any]]:
    """A row for each batch: of the LR that came to the target soonest, means over seeds."""
    cells = [(batch, lr) for batch, (rates, _) in TRIED.items() for lr in rates]
    runs = train_all([command(*cell, seed) for cell in cells for seed in SEEDS])
    best: dict[int, tuple[float, float, list[Trained]]] = {}
    for number, (batch, lr) in enumerate(cells):
        mine = runs[len(SEEDS) * number :][: len(SEEDS)]
        ends = [reached(run) for run in mine]
        steps = statistics.fmean(end["step"] if end else math.inf for end in ends)
        if batch not in best or steps < best[batch][0]:
            best[batch] = (steps, lr, mine)
    smallest = min(best)
    found = []
    for batch, (steps, lr, mine) in best.items():
        linear = best[smallest][1] * batch / smallest
        scales = [scale for run in mine if (end := reached(run)) and (scale := noise_at(run, end["step"]))]
        found.append(
            {
                "batch": batch,
                "best LR": f"{lr:g}" + " (an end of those tried)" * (lr in (TRIED[batch][0][0], TRIED[batch][0][-1])),
                "by the linear rule": f"{linear:g}",
                "steps to the target": f"{steps:,.0f}",
                "samples": f"{steps * batch:,.0f}",
                "speed-up in steps": best[smallest][0] / steps,
                "of a perfect one": best[smallest][0] * smallest / (steps * batch),
                "noise scale there": statistics.fmean(scales) if scales else "not known",
            }
        )
    return found


if __name__ == "__main__":
    for row in rows():
        print(json.dumps(row))
