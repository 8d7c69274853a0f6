"""Time a training step against the hand-written DDP loop, in the same ranks, taking turns."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks.plain import PER_GPU, loop
from isobatch.trainers.checkpoints.best import Best
from isobatch.trainers.ranks.world import World
from tests.support.harness import in_ranks

STEPS, WARM, TURNS = 300, 30, 9


def make_loop(world: World, *overrides: str) -> Callable[[int | None], float]:
    """Return a function that runs our loop over a task's whole plan and returns the seconds.

    Its argument is the interval of noise measurements in samples, or None. The loop writes no files and prints nothing.
    """
    from isobatch.conf.compose import compose
    from isobatch.scaling.noise import Smoothed
    from isobatch.scaling.plan import Intervals
    from isobatch.scaling.planning.resolve import resolve
    from isobatch.trainers.data.loader import Loader
    from isobatch.trainers.data.state import TrainState
    from isobatch.trainers.engines.make import make_engine
    from isobatch.trainers.loop.early_stop import EarlyStop
    from isobatch.trainers.loop.fit import Stepper, fit
    from isobatch.trainers.loop.hardware import Hardware
    from isobatch.trainers.loop.metrics import Metrics
    from isobatch.trainers.loop.monitor import Monitor
    from isobatch.trainers.loop.readback import DelayedReadback
    from isobatch.trainers.model.randomness import Stream
    from isobatch.trainers.ranks.signals import Stop
    from isobatch.trainers.ranks.watch import Watch
    from isobatch.trainers.tasks.task import make_task

    config = compose(["task=custom", *overrides])
    task = make_task(config)
    data = task.train_data()
    plan = resolve(config, world.size, len(data))
    model = task.model()
    engine = make_engine(config, task, model, plan.peak, world)
    kept.append(engine)
    saver: Any = NoSaver()

    def seconds(noise_every: int | None) -> float:
        intervals = Intervals(10 * plan.cut.global_size, evaluate=None, save=None, noise=noise_every)
        state = TrainState(replace(plan, intervals=intervals), noise=Smoothed() if noise_every else None)
        loader = Loader(data, task, state, world, 0, stand_ins=engine.lockstep)
        stepper = Stepper(engine, loader, Stream(0, world.device), Watch(), clip_norm=1.0)
        readback, stop = DelayedReadback(world.device), Stop()
        hardware = Hardware(world.device, None, None)
        monitor = Monitor(config, state, Metrics(None, state, live=False), readback, hardware, stop)
        world.gather("")  # all ranks start together
        began = time.perf_counter()
        fit(state, stepper, monitor, saver, None, EarlyStop(config, world))
        return time.perf_counter() - began

    return seconds


def compare_turns(
    ranks: int, turns: Callable[[World], list[tuple[float, float]]], ours: str, other: str, ratio: str
) -> dict[str, float]:
    """Return the cells of a row by column: both medians in ms, and the median of the turns' ratios.

    Args:
        turns: function called on each rank, which returns the seconds of (ours, other) for each turn.
    """
    with tempfile.TemporaryDirectory() as folder:
        measured = in_ranks(ranks, turns, Path(folder), deadline_s=600)[0]
    return {
        ours: 1e3 * statistics.median(ours_s for ours_s, _ in measured),
        other: 1e3 * statistics.median(other_s for _, other_s in measured),
        ratio: statistics.median(ours_s / other_s for ours_s, other_s in measured),
    }


def ours(world: World, steps: int) -> float:
    """Return the seconds of ``steps`` steps of our loop."""
    return make_loop(
        world, "task._target_=benchmarks.plain.Yardstick", f"batch.global_size={PER_GPU * world.size}",
        f"duration={steps}st", "lr.peak=0.05", "lr.decay=linear", "optimizer.weight_decay=0",
    )(None)  # fmt: skip


kept: list[Any] = []


class NoSaver:
    """A Saver that never saves, since checkpoints.py measures saving."""

    best = Best(None)

    def due(self) -> bool:
        return False

    def save(self, state: Any, evaluation: Any = None) -> None: ...

    def failure(self) -> None: ...

    def wait(self) -> None: ...


def plain(world: World, steps: int) -> float:
    """Return the seconds of ``steps`` steps of the hand-written loop, without its set-up."""
    losses = loop(steps + 1)
    next(losses)
    began = time.perf_counter()
    for _ in losses:
        pass
    return time.perf_counter() - began


def turns(world: World) -> list[tuple[float, float]]:
    """Return seconds per step, (ours, plain), of each turn."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", init_method="env://")
    ours(world, WARM), plain(world, WARM)
    return [(ours(world, STEPS) / STEPS, plain(world, STEPS) / STEPS) for _ in range(TURNS)]


def rows() -> list[dict[str, Any]]:
    """Return a row per number of processes: medians in ms, and the median of the turns' ratios."""
    return [
        {"processes": size, **compare_turns(size, turns, "ours ms", "plain DDP ms", "ours / plain")} for size in (1, 2)
    ]


if __name__ == "__main__":
    for row in rows():
        print(json.dumps(row))
