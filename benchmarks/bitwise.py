"""Time a step with ``numerics=bitwise`` against a fast one, in the same ranks, taking turns."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import torch

from benchmarks.step import Loop, compare_turns
from isobatch.trainers.ranks.world import World

TURNS = 9
WORK = {  # name -> (overrides, steps per turn, samples per micro-batch)
    "MLP 784-128-10": (("task._target_=benchmarks.plain.Yardstick", "lr.peak=0.05"), 200, 32),
    "GPT, 0.8 million weights": (
        (
            "task._target_=isobatch.trainers.tasks.text.Text", "task.args.data=null", "task.args.length=64",
            "task.args.width=128", "task.args.depth=4", "task.args.heads=4", "task.args.dropout=0", "optimizer=adamw",
            "lr.peak=0.001",
        ), 12, 4,
    ),
}  # fmt: skip


def turns(overrides: tuple[str, ...], steps: int, per_gpu: int, passes: int, world: World) -> list[tuple[float, float]]:
    """Return seconds per step, (bitwise, fast), of each turn."""
    sizes = f"batch.global_size={per_gpu * passes * world.size}", f"batch.per_gpu={per_gpu}", f"duration={steps}st"
    fit = {numerics: Loop(world, *overrides, *sizes, f"numerics={numerics}") for numerics in ("bitwise", "fast")}

    def seconds(numerics: str) -> float:
        torch.use_deterministic_algorithms(numerics == "bitwise")
        return fit[numerics](None) / steps

    seconds("bitwise"), seconds("fast")
    return [(seconds("bitwise"), seconds("fast")) for _ in range(TURNS)]


def rows() -> list[dict[str, Any]]:
    """Return a row per model, number of processes and passes: medians in ms, and the median of the turns' ratios."""
    found = []
    for name, (overrides, steps, per_gpu) in WORK.items():
        for size, passes in ((1, 1), (1, 4), (2, 1), (2, 4)):
            body = partial(turns, overrides, max(4, steps // passes), per_gpu, passes)
            cells = compare_turns(size, body, "bitwise ms", "fast ms", "bitwise / fast")
            found.append({"model": name, "processes": size, "passes": passes, **cells})
    return found


if __name__ == "__main__":
    for row in rows():
        print(json.dumps(row))
