"""Time a training step by engine against that engine used by hand, in the same ranks, taking turns.

python -m benchmarks.engines fsdp    # one engine
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch.distributed as dist

from benchmarks import by_hand
from benchmarks.plain import PER_GPU, Yardstick
from benchmarks.start import ENGINES
from benchmarks.step import Loop, compare_turns
from isobatch.trainers.ranks.world import World

TURNS = 5
STEPS = {"MLP": 60, "blocks": 20}  # per turn
TASKS: dict[str, tuple[type[Yardstick], str]] = {
    "MLP": (by_hand.OneGroup, "benchmarks.by_hand.OneGroup"),
    "blocks": (by_hand.Blocks, "benchmarks.by_hand.Blocks"),
}
RANKS = (1, 2)


def ways(name: str, model: str, world: World) -> tuple[Callable[[], float], Callable[[], float]]:
    """Return two functions that train a turn's steps and return the seconds: our loop, and the engine by hand."""
    task, target = TASKS[model]
    seconds = Loop(
        world, *ENGINES[name], f"task._target_={target}", f"batch.global_size={PER_GPU * world.size}",
        f"duration={STEPS[model]}st", "lr.peak=0.05", "lr.decay=linear", "optimizer.weight_decay=0",
    )  # fmt: skip
    if not dist.is_initialized():
        dist.init_process_group("gloo", init_method="env://")
    losses = by_hand.LOOPS[name](STEPS[model] * (TURNS + 2), task())

    def other() -> float:
        world.gather("")
        began = time.perf_counter()
        for _ in itertools.islice(losses, STEPS[model]):
            pass
        return time.perf_counter() - began

    return partial(seconds, None), other


def turns(name: str, model: str, world: World) -> list[tuple[float, float]]:
    """Return seconds per step, (ours, by hand), of each turn. The order alternates."""
    ours, other = ways(name, model, world)
    ours(), other()
    found = []
    for turn in range(TURNS):
        order = (ours, other) if turn % 2 else (other, ours)
        took = {way: way() / STEPS[model] for way in order}
        found.append((took[ours], took[other]))
    return found


def rows(names: Sequence[str] = tuple(ENGINES)) -> list[dict[str, Any]]:
    """Return a row per engine and model: medians in ms, and medians of the turns' ratios."""
    found = []
    for name, model in itertools.product(names, TASKS):
        row: dict[str, Any] = {"engine, model": f"{name}, {model}"}
        for size in RANKS:
            columns = (f"on {size}: {column}" for column in ("ours ms", "by hand ms", "ours / by hand"))
            row |= compare_turns(size, partial(turns, name, model), *columns)
        found.append(row)
    return found


if __name__ == "__main__":
    for name in sys.argv[1:] or ENGINES:
        for row in rows([name]):
            print(json.dumps(row), flush=True)
