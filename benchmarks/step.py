"""Time a training step against the hand-written DDP loop, in the same ranks, taking turns."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from benchmarks.plain import PER_GPU, loop
from isobatch.trainers.checkpoints.best import Best
from isobatch.trainers.ranks.watch import Watch
from isobatch.trainers.ranks.world import World
from tests.support.harness import in_ranks

STEPS, WARM, TURNS = 300, 30, 9
kept: list[Any] = []


class NoSaver:
    """A Saver that never saves, since checkpoints.py measures saving."""

    best = Best(None)

    def due(self) -> bool:
        return False

    def save(self, state: Any, evaluation: Any = None) -> None: ...

    def failure(self) -> None: ...

    def wait(self) -> None: ...


NOT_SAVED: Any = NoSaver()


class Loop:
    """Our loop over the whole plan of a task, which can run again and again. It writes no files and prints nothing.

    Args:
        skip: number of steps at the start that aren't timed.
    """

    def __init__(self, world: World, *overrides: str, skip: int = 0) -> None:
        from isobatch.conf.compose import compose
        from isobatch.scaling.planning.resolve import resolve
        from isobatch.trainers.engines.make import make_engine
        from isobatch.trainers.model.build import prepare
        from isobatch.trainers.model.randomness import Stream
        from isobatch.trainers.tasks.task import make_task

        self.world, self._skip = world, skip
        self.config = config = compose(["task=custom", *overrides])
        self._task = task = make_task(config)
        self._data = task.train_data()
        self._stream = Stream(0, world.device)
        self._plan = resolve(config, world.size, len(self._data))
        self.model = prepare(task.model(), config, self._stream, world.size)
        self.engine = make_engine(config, task, self.model, self._plan.peak, world)
        kept.append(self.engine)

    def __call__(
        self,
        noise_every: int | None = None,
        *,
        noise_parts: Literal[2] | None = None,
        workers: int = 0,
        saver: Any = NOT_SAVED,
        after_step: Callable[[], object] = lambda: None,
    ) -> float:
        """Run the loop and return the seconds.

        Args:
            noise_every: interval of noise measurements in samples, or None.
            noise_parts: 2 measures the two halves of a step.
            workers: processes that load data.
            saver: a Saver; by default nothing is saved.
        """
        from isobatch.scaling.noise import Smoothed
        from isobatch.scaling.plan import Intervals
        from isobatch.trainers.data.loader import Loader
        from isobatch.trainers.data.state import TrainState
        from isobatch.trainers.loop.control import BatchControl
        from isobatch.trainers.loop.early_stop import EarlyStop
        from isobatch.trainers.loop.fit import Stepper, fit
        from isobatch.trainers.loop.hardware import Hardware
        from isobatch.trainers.loop.metrics import Metrics
        from isobatch.trainers.loop.monitor import Monitor
        from isobatch.trainers.loop.readback import DelayedReadback
        from isobatch.trainers.ranks.signals import Stop

        plan, world = self._plan, self.world
        intervals = Intervals(10 * plan.cut.global_size, None, None, noise_every, noise_parts=noise_parts)
        state = TrainState(replace(plan, intervals=intervals), noise=Smoothed() if noise_every else None)
        loader = Loader(self._data, self._task, state, world, workers, stand_ins=self.engine.lockstep)
        watch = Clock(self._skip, world.device, after_step)
        stepper = Stepper(self.engine, loader, self._stream, watch, clip_norm=1.0)
        hardware, readback = Hardware(world.device, None, None), DelayedReadback(world.device)
        metrics = Metrics(None, state, live=False)
        control = BatchControl(state, World.alone(), metrics, None)
        monitor = Monitor(self.config, state, metrics, readback, hardware, Stop(), control)
        world.gather("")  # all ranks start together
        watch.beat(0, 0)
        fit(state, stepper, monitor, saver, None, EarlyStop(self.config, world))
        seconds = watch.seconds()
        loader.close()
        return seconds


class Clock(Watch):
    """Take the time from the end of step ``skip``; call ``after_step`` after each step."""

    def __init__(self, skip: int, device: torch.device, after_step: Callable[[], object] = lambda: None) -> None:
        super().__init__()
        self._skip, self._device, self._after_step, self._began = skip, device, after_step, 0.0

    def beat(self, steps: int | None = None, samples: int | None = None) -> None:
        super().beat(steps, samples)
        if steps:
            self._after_step()
        if steps == self._skip:
            synchronize(self._device)
            self._began = time.perf_counter()

    def seconds(self) -> float:
        synchronize(self._device)
        return time.perf_counter() - self._began


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


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
    return Loop(
        world, "task._target_=benchmarks.plain.Yardstick", f"batch.global_size={PER_GPU * world.size}",
        f"duration={steps}st", "lr.peak=0.05", "lr.decay=linear", "optimizer.weight_decay=0",
    )()  # fmt: skip


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
