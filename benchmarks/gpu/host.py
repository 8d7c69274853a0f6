"""Measure our loop's host time per step at small models, and count what waits for the device inside a step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch.profiler import ProfilerActivity, profile, schedule

from benchmarks.gpu.models import Text
from benchmarks.gpu.step import BARE, DDP, OURS, TINY_TEXT
from benchmarks.gpu.turns import SKIP, Bench, Turn, Work, table, take_turns
from benchmarks.plain import PER_GPU, Yardstick
from benchmarks.tables import Rows

SMALL = {"tokens": 256, "length": 64, "width": 128, "depth": 4, "heads": 4}
TRACED = 4  # steps


def host(bench: Bench) -> Rows:
    """Return rows of small models, whose steps take as long as the host needs to launch them."""
    args = TINY_TEXT if bench.dry else SMALL
    works = {
        "MLP, SGD, fp32": Work(Yardstick, {}, PER_GPU, bench.steps(200), "sgd", bf16=False, compiled=False),
        "GPT, AdamW, bf16": Work(Text, args, 8, bench.steps(60), compiled=False),
        "GPT with dropout": Work(Text, {**args, "dropout": 0.1}, 8, bench.steps(60), compiled=False),
    }
    rows: Rows = []
    for name, work in works.items():
        ways: dict[str, Callable[[], Turn]] = {OURS: partial(work.ours, bench)}
        ways |= {DDP: partial(work.plain, bench, True), BARE: partial(work.plain, bench, False)}
        rows += [{"model": name, **row} for row in table(take_turns(bench, ways), work.steps, (DDP, BARE))]
    return rows


def trace(bench: Bench) -> Rows:
    """Return rows of calls per step that wait for the device, and of copies from or to memory that isn't pinned."""
    rows: Rows = []
    args = {**(TINY_TEXT if bench.dry else SMALL), "dropout": 0.1}
    for name, compiled in (("eager", False), ("compiled", True)):
        if not (compiled and bench.dry):
            work = Work(Text, args, 8, SKIP + TRACED, compiled=compiled)
            rows.append({"model": f"GPT with dropout, {name}", **traced(bench, work)})
    return rows


def traced(bench: Bench, work: Work) -> dict[str, Any]:
    """Trace some steps in the middle of our loop, and return what happened per step."""
    loop = work.ours(bench)
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
