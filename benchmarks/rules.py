"""Compare how well each rule keeps a language model's loss as its batch grows, with AdamW tuned at a small batch."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.trained import spread, train_all

SMALL, KAPPAS, SEEDS = 4, (4, 8), (0, 1, 2)
RULES = ("none", "sqrt", "linear", "sde")
# Betas -> the best LR at SMALL of 0.002, 0.004, 0.008 and 0.016, on two seeds
TUNED = {(0.9, 0.95): 0.004, (0.98, 0.995): 0.004}
TASK = (
    "task=text", "task.args.length=32", "task.args.width=32", "task.args.dropout=0.0", "task.train_samples=null",
    "optimizer=adamw", "optimizer.weight_decay=0", "clip_norm=1.0", "duration=6000sa", "lr.warmup=10%",
)  # fmt: skip


def command(betas: tuple[float, float], kappa: int, rule: str, seed: int) -> tuple[str, ...]:
    tuned = f"task.tuned.adamw={{lr: {TUNED[betas]}, batch: {SMALL}, betas: [{betas[0]}, {betas[1]}]}}"
    return (*TASK, tuned, f"batch.global_size={SMALL * kappa}", f"lr.rule={rule}", f"seed={seed}")


def rows() -> list[dict[str, Any]]:
    """Return a row per betas and batch: the validation loss at equal samples, mean ± standard deviation over seeds."""
    cells = [(betas, 1, "none") for betas in TUNED]
    cells += [(betas, kappa, rule) for betas in TUNED for kappa in KAPPAS for rule in RULES]
    runs = train_all([command(*cell, seed) for cell in cells for seed in SEEDS])
    losses = {
        cell: [run.last("val/loss") for run in runs[len(SEEDS) * number :][: len(SEEDS)]]
        for number, cell in enumerate(cells)
    }
    found = []
    for betas in TUNED:
        at_small = {"betas": f"{betas[0]}, {betas[1]}", "batch": f"{SMALL}, tuned"}
        found.append({**at_small, **{rule: spread(losses[betas, 1, "none"]) for rule in RULES}})
        for kappa in KAPPAS:
            row = {rule: spread(losses[betas, kappa, rule]) for rule in RULES}
            found.append({**at_small, "batch": f"{kappa} × {SMALL}", **row})
    return found


if __name__ == "__main__":
    for row in rows():
        print(json.dumps(row))
