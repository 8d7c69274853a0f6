"""Time whole steps against the hand-written loop, and the cost of features: dropout, noise, checkpoints, workers."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from benchmarks.gpu.models import Images, Text
from benchmarks.gpu.turns import SKIP, Bench, Turn, Work, mfu, table, take_turns, traced
from benchmarks.step import Loop, NoSaver
from benchmarks.tables import Rows

OURS, DDP, BARE = "ours", "plain DDP", "plain, no DDP"
WORKERS, WITH_WORKERS = 4, ", 4 workers"
TINY_TEXT: dict[str, Any] = {"tokens": 64, "length": 16, "width": 32, "depth": 2, "heads": 2}
TINY_IMAGES = {"size": 32, "width": 4, "blocks": (1, 1)}


def text(bench: Bench, **more: Any) -> Work:
    """Return the GPT-2 of 124 million parameters; tiny in a dry run."""
    args = {**(TINY_TEXT if bench.dry else {}), **more}
    return Work(Text, args, 16 if bench.large else 4, bench.steps(20), compiled=not bench.dry)


def compare(
    bench: Bench, work: Work, ours: Callable[[], Loop], more: dict[str, Callable[[], Turn]] | None = None
) -> Iterator[Rows]:
    """Yield a row for our loop, the plain loop without DDP, and ``more`` loops; by default with workers, and DDP."""
    task, plain = work.task(**work.args), cache(partial(work.plain, bench, False))
    unit, per_sample = task.unit
    variants: dict[str, Callable[[], Turn]] = {
        OURS + WITH_WORKERS: lambda: partial(ours(), workers=WORKERS),
        BARE + WITH_WORKERS: lambda: partial(plain(), workers=WORKERS),
        DDP: partial(work.plain, bench, True),
    }
    makers: dict[str, Callable[[], Turn]] = {OURS: ours, **(more or {}), BARE: plain}
    makers |= variants if more is None else {}
    units = work.per_gpu * per_sample
    share = mfu(bench, task.flops_per_unit(task.model()) * units)
    baselines = [name for name in makers if name not in (OURS, OURS + WITH_WORKERS)]
    for measured in take_turns(bench, makers):
        rows = table(measured, work.steps, baselines, (unit, units), share)
        yield [row | ({"peak GB": ""} if WITH_WORKERS in row[""] else {}) for row in rows]  # one loop has two rows


def gpt2(bench: Bench) -> Iterator[Rows]:
    """Yield the rows of a GPT-2 without dropout."""
    work = text(bench)
    ours = cache(partial(work.ours, bench))
    for rows in compare(bench, work, ours):
        yield rows
    flash = traced(bench, ours())["flash attention kernels"]
    yield [{**row, "flash attention kernels": flash if row[""] == OURS else ""} for row in rows]


def dropout(bench: Bench) -> Iterator[Rows]:
    """Yield the rows of a GPT-2 with dropout: keyed in ours, and torch's in all others."""
    work = text(bench, dropout=0.1)
    torchs = work._replace(args={**work.args, "keyed": False})
    return compare(bench, work, partial(work.ours, bench), {"ours, torch's dropout": partial(torchs.ours, bench)})


def resnet(bench: Bench) -> Iterator[Rows]:
    """Yield the rows of a ResNet-50."""
    per_gpu = 4 if bench.dry else 256 if bench.large else 64
    args: dict[str, Any] = TINY_IMAGES if bench.dry else {}
    work = Work(Images, args, per_gpu, bench.steps(12), "sgd", compiled=not bench.dry)
    return compare(bench, work, cache(partial(work.ours, bench)))


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


def features(bench: Bench) -> Iterator[Rows]:
    """Yield a row per feature of our loop, and of the plain loop: two passes per step of the GPT-2."""
    work = text(bench)._replace(passes=2)
    loop, plain = work.ours(bench), work.plain(bench, False)
    with tempfile.TemporaryDirectory() as folder:
        save, saver = saving(loop, Path(folder))
        makers: dict[str, Callable[[], Turn]] = {
            OURS: lambda: loop,
            BARE: lambda: plain,
            "ours, noise.every=1st": lambda: partial(loop, 2 * work.per_gpu),
            "ours, noise.every=10st": lambda: partial(loop, 20 * work.per_gpu),
            "ours, a checkpoint written meanwhile": lambda: save,
            "plain, torch.save": lambda: partial(plain, save=Path(folder) / "plain.pt"),
            OURS + WITH_WORKERS: lambda: partial(loop, workers=WORKERS),
            BARE + WITH_WORKERS: lambda: partial(plain, workers=WORKERS),
        }
        for measured in take_turns(bench, makers):
            rows = table(measured, work.steps, (OURS, BARE))
            yield [{name: cell for name, cell in row.items() if name != "peak GB"} for row in rows]  # of all together
        saver.close()


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
