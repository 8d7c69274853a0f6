"""Let loops take turns on one device, make the rows of a table from their times and peak memory, and trace a loop."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from benchmarks.gpu.by_hand import Plain
from benchmarks.step import Loop
from benchmarks.tables import Rows
from isobatch.trainers.loop.hardware import peak_tflops
from isobatch.trainers.ranks.world import World

TRACED = 4  # steps
LARGE = 30e9  # bytes of a device that holds the larger batches
SKIP = 3  # steps of a turn before its clock starts
MEASURE_S = 90.0  # from the start of a part until no more loops or rounds begin

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

    @property
    def late(self) -> bool:
        return time.perf_counter() - self.began > MEASURE_S

    def steps(self, number: int) -> int:
        """Return the number of timed steps of a turn."""
        return 5 if self.dry else number


class Work(NamedTuple):
    """A training for both loops: the task with its arguments, and the sizes.

    Attributes:
        task: the class of the task.
        args: its arguments.
        passes: passes per step.
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
            bf16=self.bf16, compiled=self.compiled, passes=self.passes, skip=SKIP, ddp=ddp,
        )  # fmt: skip


class Measured(NamedTuple):
    """The seconds of each turn, and the bytes that a loop takes at its peak (None: not known).

    Attributes:
        missing: why there are no turns.
    """

    seconds: list[float]
    memory: int | None = None
    missing: str = "no time left"


def take_turns(
    bench: Bench, makers: Mapping[str, Callable[[], Turn]], rounds: int = 9
) -> Iterator[dict[str, Measured]]:
    """Make loops by name, warm them up, and let them take turns. The order alternates.

    The first two loops have a round before the others are made, which may take too long to compile.

    Yields:
        What is measured so far, after each round.
    """
    found = {name: Measured([]) for name in makers}
    ways: dict[str, tuple[Turn, int]] = {}
    for number, (name, make) in enumerate(makers.items()):
        if number == 2:
            yield _round(bench, ways, found)
        if number > 1 and bench.late:
            continue
        before = _allocated(bench.device)
        way = make()
        if not bench.dry:
            way()  # compiles
        ways[name] = way, _allocated(bench.device) - before
    for number in range(1 if bench.dry else rounds):
        if number and bench.late:
            break
        yield _round(bench, ways, found)


def _round(bench: Bench, ways: Mapping[str, tuple[Turn, int]], found: dict[str, Measured]) -> dict[str, Measured]:
    """Let each loop, with the bytes that it holds, take a turn; add it to ``found``, and return that."""
    done = len(next(iter(found.values())).seconds)
    for name in list(ways)[:: 1 if done % 2 else -1]:
        way, held = ways[name]
        others, memory = _allocated(bench.device) - held, None
        if bench.device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats(bench.device)
        seconds = [*found[name].seconds, way()]
        if bench.device.type != "cpu":
            memory = torch.accelerator.max_memory_allocated(bench.device) - others
        found[name] = Measured(seconds, memory)
    return found


def _allocated(device: torch.device) -> int:
    return 0 if device.type == "cpu" else torch.accelerator.memory_allocated(device)


def table(
    measured: Mapping[str, Measured],
    steps: int,
    baselines: Sequence[str],
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
    for name, (seconds, memory, missing) in measured.items():
        if not seconds:
            rows.append({**dict.fromkeys(rows[0], ""), "": name, "ms per step": f"not measured: {missing}"})
            continue
        step_s = statistics.median(seconds) / steps
        row: dict[str, Any] = {"": name, "ms per step": 1e3 * step_s}
        for baseline in (baseline for baseline in baselines if measured[baseline].seconds):
            pairs = zip(seconds[::-1], measured[baseline].seconds[::-1], strict=False)  # the last turn is of all
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


def traced(bench: Bench, loop: Loop) -> dict[str, Any]:
    """Trace some steps in the middle of our loop, and return what happened per step."""
    loop()  # compiles
    kinds = [ProfilerActivity.CPU, *([] if bench.device.type == "cpu" else [ProfilerActivity.CUDA])]
    with profile(activities=kinds, schedule=schedule(wait=SKIP, warmup=1, active=TRACED)) as profiler:
        loop(after_step=profiler.step)
    events: Any = list(profiler.events() or ())
    on_host = [event for event in events if event.device_type.name == "CPU"]
    steps = [event.time_range for event in on_host if event.name.startswith("ProfilerStep")]
    assert len(steps) == TRACED, f"the profiler recorded {len(steps)} steps, not {TRACED}"
    first, last = min(step.start for step in steps), max(step.end for step in steps)
    inside = [event for event in on_host if first <= event.time_range.start <= last]
    kernels = [event.name for event in events if event.device_type.name != "CPU"]

    def per_step(names: Callable[[str], bool]) -> str:
        found: dict[str, list[float]] = {}
        for event in inside:
            if names(event.name):
                found.setdefault(event.name, []).append(event.time_range.elapsed_us() / 1e3)
        counted = [f"{len(ms) / TRACED:g} {name}, {sum(ms) / TRACED:.2g} ms" for name, ms in found.items()]
        return "; ".join(counted) or "none"

    return {
        "waits per step": per_step(lambda name: "Synchronize" in name or name in ("cudaMemcpy", "cudaMemset")),
        "copies per step": per_step(lambda name: name.startswith("cudaMemcpy")),
        "of these unpinned": sum("Pageable" in name for name in kernels) / TRACED,
        "flash attention kernels": sum("flash" in name for name in kernels) / TRACED,
    }
