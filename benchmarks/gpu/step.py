"""Time whole steps against the hand-written loop, and the cost of features: dropout, noise, checkpoints, workers."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu.models import Images, Text
from benchmarks.gpu.turns import SKIP, Bench, Turn, Work, mfu, table, take_turns
from benchmarks.step import Loop, NoSaver
from benchmarks.tables import Rows

OURS, DDP, BARE = "ours", "plain DDP", "plain, no DDP"
TINY_TEXT: dict[str, Any] = {"tokens": 64, "length": 16, "width": 32, "depth": 2, "heads": 2}
TINY_IMAGES = {"size": 32, "width": 4, "blocks": (1, 1)}


def text(bench: Bench, **more: Any) -> Work:
    """Return the GPT-2 of 124 million parameters; tiny in a dry run."""
    args = {**(TINY_TEXT if bench.dry else {}), **more}
    return Work(Text, args, 16 if bench.large else 4, bench.steps(20), compiled=not bench.dry)


def compare(bench: Bench, work: Work, unit: str, units: int, more: dict[str, Callable[[], Turn]] | None = None) -> Rows:
    """Return a row for our loop, for the plain loop with and without DDP, and for ``more`` loops."""
    task = work.task(**work.args)
    makers: dict[str, Callable[[], Turn]] = {OURS: partial(work.ours, bench), **(more or {})}
    makers |= {DDP: partial(work.plain, bench, True), BARE: partial(work.plain, bench, False)}
    flops = task.flops_per_unit(task.model()) * units
    measured = take_turns(bench, makers)
    return table(measured, work.steps, (DDP, BARE, *(more or {})), (unit, units), mfu(bench, flops))


def gpt2(bench: Bench) -> Rows:
    """Return the rows of a GPT-2 without dropout."""
    work = text(bench)
    return compare(bench, work, "tokens", work.per_gpu * Text(**work.args).length)


def dropout(bench: Bench) -> Rows:
    """Return the rows of a GPT-2 with dropout: keyed in ours, and torch's in all others."""
    work = text(bench, dropout=0.1)
    torchs = work._replace(args={**work.args, "keyed": False})
    more: dict[str, Callable[[], Turn]] = {"ours, torch's dropout": partial(torchs.ours, bench)}
    return compare(bench, work, "tokens", work.per_gpu * Text(**work.args).length, more)


def resnet(bench: Bench) -> Rows:
    """Return the rows of a ResNet-50."""
    per_gpu = 4 if bench.dry else 256 if bench.large else 64
    args: dict[str, Any] = TINY_IMAGES if bench.dry else {}
    return compare(
        bench, Work(Images, args, per_gpu, bench.steps(12), "sgd", compiled=not bench.dry), "images", per_gpu
    )


class SaveOnce(NoSaver):
    """Save one checkpoint, in the background, after about ``at`` steps; the end of the loop doesn't wait for it."""

    def __init__(self, saver: Any, at: int) -> None:
        self._saver, self._left, self._saved = saver, at, False

    def due(self) -> bool:
        self._left -= 1
        return not self._left

    def save(self, state: Any, evaluation: Any = None) -> None:
        if not self._saved:
            self._saver.save(state)
        self._saved = True


def features(bench: Bench) -> Rows:
    """Return a row per feature of our loop: two passes per step of the GPT-2, by one engine."""
    work = text(bench)._replace(passes=2, steps=bench.steps(30))
    loop = work.ours(bench)
    with tempfile.TemporaryDirectory() as folder:
        save, saver = saving(loop, Path(folder))
        makers: dict[str, Callable[[], Turn]] = {
            OURS: lambda: loop,
            "noise.every=1st": lambda: partial(loop, 2 * work.per_gpu),
            "noise.every=10st": lambda: partial(loop, 20 * work.per_gpu),
            "data.workers=4": lambda: partial(loop, workers=1 if bench.dry else 4),
            "a checkpoint written meanwhile": lambda: save,
        }
        rows = table(take_turns(bench, makers), work.steps, (OURS,))
        saver.close()
    for row in rows:
        row.pop("peak GB")  # of all together
    return rows


def saving(loop: Loop, folder: Path) -> tuple[Turn, Any]:
    """Return a function that trains a turn with a save under way, and the saver."""
    from isobatch.conf.rundir.directory import RunDir
    from isobatch.trainers.checkpoints.best import Best
    from isobatch.trainers.checkpoints.resume import header_of
    from isobatch.trainers.checkpoints.saver import Policy, Saver

    header = partial(header_of, loop.config, None)
    saver = Saver(RunDir(folder), loop.world, loop.engine, header, Policy(every_s=None, keep=1), Best(None))
    turns = itertools.count(SKIP + 1)

    def save() -> float:
        seconds = loop(saver=SaveOnce(saver, next(turns)))  # a saver saves no step twice
        if failure := saver.wait():
            raise RuntimeError(f"a checkpoint couldn't be saved: {failure}")
        return seconds

    return save, saver
