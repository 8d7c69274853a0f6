"""Let loops take turns on one device, and make the rows of a table from their times and peak memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.by_hand import Plain
from benchmarks.step import Loop
from benchmarks.tables import Rows
from isobatch.trainers.loop.hardware import peak_tflops
from isobatch.trainers.ranks.world import World

LARGE = 30e9  # bytes of a device that holds the larger batches
SKIP = 3  # steps of a turn before its clock starts
MEASURE_S = 75.0  # from the start of a part until no more turns begin

Turn = Callable[[], float]
"""Train the steps of a turn and return the seconds."""


@dataclass(frozen=True)
class Bench:
    """Hold where and how a part is measured.

    Attributes:
        dry: run every line on the CPU, with tiny sizes.
        began: start of the part, by ``time.perf_counter``.
    """

    world: World
    dry: bool
    began: float

    @property
    def device(self) -> torch.device:
        return self.world.device

    @property
    def large(self) -> bool:
        return not self.dry and torch.cuda.get_device_properties(self.device).total_memory > LARGE

    def steps(self, number: int) -> int:
        """Return the number of timed steps of a turn."""
        return 2 if self.dry else number


class Work(NamedTuple):
    """A training for both loops: the task with its arguments, and the sizes.

    Attributes:
        task: the class of the task.
        args: its arguments.
        passes: passes per step, in ours.
    """

    task: type
    args: dict[str, Any]
    per_gpu: int
    steps: int
    optimizer: str = "adamw"
    bf16: bool = True
    compiled: bool = True
    passes: int = 1

    def ours(self, bench: Bench) -> Loop:
        """Return our loop."""
        args = [f"task.args.{name}={value}".replace("(", "[").replace(")", "]") for name, value in self.args.items()]
        return Loop(
            bench.world, f"task._target_={self.task.__module__}.{self.task.__qualname__}", *args, "lr.peak=0.0001",
            f"optimizer={self.optimizer}", f"precision={'bf16' if self.bf16 else 'fp32'}",
            f"compile={str(self.compiled).lower()}", f"batch.per_gpu={self.per_gpu}",
            f"batch.accumulation={self.passes}", f"duration={SKIP + self.steps}st",
            skip=SKIP,
        )  # fmt: skip

    def plain(self, bench: Bench, ddp: bool) -> Plain:
        """Return the hand-written loop."""
        bench.world.connect()
        optimizer = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[self.optimizer]
        return Plain(
            self.task(**self.args), bench.device, per_gpu=self.per_gpu, steps=self.steps, optimizer=optimizer,
            bf16=self.bf16, compiled=self.compiled, workers=1 if bench.dry else 4, skip=SKIP, ddp=ddp,
        )  # fmt: skip


class Measured(NamedTuple):
    """The seconds of each turn, and the bytes that a loop takes at its peak (None: not known)."""

    seconds: list[float]
    memory: int | None


def take_turns(bench: Bench, makers: Mapping[str, Callable[[], Turn]], turns: int = 9) -> dict[str, Measured]:
    """Make loops by name, warm them up, and let them take turns. The order alternates.

    The peak of a loop is that of its second turn, without the bytes that were taken before it was made.
    """
    ways: dict[str, Turn] = {}
    memory: dict[str, int | None] = {}
    for name, make in makers.items():
        before = _allocated(bench.device)
        ways[name] = make()
        if not bench.dry:
            ways[name]()  # compiles
        if bench.device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats(bench.device)
            ways[name]()
            memory[name] = torch.accelerator.max_memory_allocated(bench.device) - before
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(1 if bench.dry else turns):
        if turn > 1 and time.perf_counter() - bench.began > MEASURE_S:
            break
        for name in list(ways)[:: 1 if turn % 2 else -1]:
            taken[name].append(ways[name]())
    return {name: Measured(seconds, memory.get(name)) for name, seconds in taken.items()}


def _allocated(device: torch.device) -> int:
    return 0 if device.type == "cpu" else torch.accelerator.memory_allocated(device)


def table(
    measured: Mapping[str, Measured],
    steps: int,
    baselines: tuple[str, ...],
    units: tuple[str, int] | None = None,
    mfu: Callable[[float], str] | None = None,
) -> Rows:
    """Return a row per loop: the median step, and the medians of the turns' ratios to each baseline.

    Args:
        steps: timed steps of a turn.
        units: name and number of the units of a step.
        mfu: the share of the device's peak, of the seconds of a step.
    """
    rows: Rows = []
    for name, (seconds, memory) in measured.items():
        step_s = statistics.median(seconds) / steps
        row: dict[str, Any] = {"": name, "ms per step": 1e3 * step_s}
        for baseline in baselines:
            pairs = zip(seconds, measured[baseline].seconds, strict=True)
            row[f"/ {baseline}"] = statistics.median(own / other for own, other in pairs)
        if units:
            row[f"{units[0]} per s"] = f"{units[1] / step_s:,.0f}"
        if mfu:
            row["MFU"] = mfu(step_s)
        row["peak GB"] = "" if memory is None else memory / 1e9
        rows.append({**row, "turns": len(seconds)})
    return rows


def mfu(bench: Bench, flops_per_step: float) -> Callable[[float], str]:
    """Return a function of a step's seconds: its operations as a share of the device's peak in 16 bits."""
    known = None if bench.dry else peak_tflops(torch.cuda.get_device_name(bench.device))
    return lambda step_s: f"{flops_per_step / step_s / (known[0] * 1e12):.1%}" if known else "peak not known"
