"""Measure the accuracy that a large batch loses on images, and how much a rule and a warmup recover: AdamW and LAMB."""

from __future__ import annotations

import json
import statistics
from typing import Any

from benchmarks.trained import spread, train_all

TUNED, SMALL, LARGE, SEEDS = 32, 64, 1024, (0, 1, 2)
OPTIMIZERS = ("adamw", "lamb")
TASK = (
    "task=images", "task.args.width=8", "duration=15ep", "batchnorm.mode=ghost", "batchnorm.ghost_size=32",
)  # fmt: skip
UNSCALED, SCALED = ("lr.rule=none", "lr.warmup=0"), ("lr.rule=sqrt", "lr.warmup=20%")
WAYS = {
    f"{SMALL}, by the rule sqrt, with a warmup": (SMALL, SCALED),
    f"{LARGE}, the LR of {TUNED}, no warmup": (LARGE, UNSCALED),
    f"{LARGE}, by the rule sqrt, with a warmup": (LARGE, SCALED),
}


def rows() -> list[dict[str, Any]]:
    """Return the accuracy (mean ± standard deviation over seeds), the closed part of the gap, and the time."""
    cells = [(optimizer, way) for optimizer in OPTIMIZERS for way in WAYS]
    commands = [
        (*TASK, f"optimizer={optimizer}", f"batch.global_size={WAYS[way][0]}", *WAYS[way][1], f"seed={seed}")
        for optimizer, way in cells
        for seed in SEEDS
    ]
    runs = train_all(commands)
    found, mean = [], dict[str, float]()
    for number, (optimizer, way) in enumerate(cells):
        seeds = runs[len(SEEDS) * number :][: len(SEEDS)]
        accuracies = [100 * run.last("val/accuracy") for run in seeds]
        mean[way] = statistics.fmean(accuracies)
        small, plain, scaled = (mean.get(name) for name in WAYS)
        closed = None if small is None or plain is None or scaled is None or plain >= small else scaled - plain
        found.append(
            {
                "optimizer": optimizer,
                "global batch": way,
                "accuracy %": spread(accuracies),
                "gap to 64": ""
                if small is None or way == f"{SMALL}, by the rule sqrt, with a warmup"
                else f"{small - mean[way]:.3g}",
                "of the gap closed": "" if closed is None else f"{closed / (small - plain):.0%}",  # type: ignore[operator]
                "s per run": statistics.fmean(run.seconds for run in seeds),
            }
        )
        if scaled is not None:
            mean.clear()
    return found


if __name__ == "__main__":
    for row in rows():
        print(json.dumps(row))
