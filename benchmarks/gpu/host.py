"""Measure our loop's host time per step at small models, and count what waits for the device inside a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from benchmarks.gpu.models import Text
from benchmarks.gpu.step import BARE, DDP, OURS, TINY_TEXT
from benchmarks.gpu.turns import SKIP, TRACED, Bench, Turn, Work, table, take_turns, traced
from benchmarks.plain import PER_GPU, Yardstick
from benchmarks.tables import Rows

SMALL = {"tokens": 256, "length": 64, "width": 128, "depth": 4, "heads": 4}


def host(bench: Bench) -> Iterator[Rows]:
    """Yield rows of small models, whose steps take as long as the host needs to launch them."""
    args = TINY_TEXT if bench.dry else SMALL
    works = {
        "MLP, SGD, fp32": Work(Yardstick, {}, PER_GPU, bench.steps(200), "sgd", bf16=False, compiled=False),
        "GPT, AdamW, bf16": Work(Text, args, 8, bench.steps(60), compiled=False),
        "GPT with dropout": Work(Text, {**args, "dropout": 0.1}, 8, bench.steps(60), compiled=False),
    }
    done: Rows = []
    for name, work in works.items():
        ways: dict[str, Callable[[], Turn]] = {OURS: partial(work.ours, bench)}
        ways |= {BARE: partial(work.plain, bench, False), DDP: partial(work.plain, bench, True)}
        for measured in take_turns(bench, ways):
            rows = [{"model": name, **row} for row in table(measured, work.steps, (BARE, DDP))]
            yield done + rows
        done += rows


def trace(bench: Bench) -> Iterator[Rows]:
    """Yield rows of calls per step that wait for the device, and of copies from or to memory that isn't pinned."""
    rows: Rows = []
    args = {**(TINY_TEXT if bench.dry else SMALL), "dropout": 0.1}
    for name, compiled in (("eager", False), ("compiled", True)):
        if not (compiled and bench.dry):
            work = Work(Text, args, 8, SKIP + TRACED, compiled=compiled)
            rows.append({"model": f"GPT with dropout, {name}", **traced(bench, work.ours(bench))})
            yield rows
