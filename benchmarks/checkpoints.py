"""What a save takes from training, and what going on takes: by size and ranks, and by engine.

python -m benchmarks.checkpoints
"""

from __future__ import annotations

import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks.start import ENGINES
from isobatch.trainers.ranks.watch import Watch
from isobatch.trainers.ranks.world import World
from tests.support.harness import in_ranks

TURNS = {1: 9, 10: 5, 100: 3}  # by MiB of weights
RANKS = (1, 2, 4)
BY_ENGINE = ((10, 2), (100, 2), (100, 4))  # MiB of weights, ranks
SAVED_BY = ("ddp", "fsdp", "deepspeed 1", "deepspeed 3")
WIDTH = 512  # of a layer, whose weights are then 1 MiB


class Layers:
    """So many layers of 1 MiB."""

    def __init__(self, layers: int) -> None:
        self.layers = layers

    def model(self) -> nn.Module:
        return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(self.layers)))

    def train_data(self) -> TensorDataset:
        return TensorDataset(torch.randn(4096, WIDTH, generator=torch.Generator().manual_seed(0)))

    def loss(self, model: nn.Module, batch: tuple[Tensor]) -> tuple[Tensor, int]:
        return model(batch[0]).square().sum(), len(batch[0])


class Saving:
    """A run of ``layers`` that can train, save and go on; without its files but for checkpoints."""

    def __init__(self, layers: int, options: Sequence[str], folder: Path, world: World) -> None:
        from isobatch.conf.compose import compose
        from isobatch.conf.rundir.directory import RunDir
        from isobatch.scaling.planning.resolve import resolve
        from isobatch.trainers.checkpoints.best import Best
        from isobatch.trainers.checkpoints.resume import header_of
        from isobatch.trainers.checkpoints.saver import Policy, Saver
        from isobatch.trainers.data.loader import Loader
        from isobatch.trainers.data.state import TrainState
        from isobatch.trainers.engines.make import make_engine
        from isobatch.trainers.tasks.task import make_task

        self.config = compose(
            [
                "task=custom", "task._target_=benchmarks.checkpoints.Layers", f"task.args.layers={layers}",
                "optimizer=adamw", "lr.peak=0.0001", f"batch.global_size={8 * world.size}", "duration=1000000st",
                *options,
            ]
        )  # fmt: skip
        task = make_task(self.config)
        data = task.train_data()
        self.world, self.plan = world, resolve(self.config, world.size, len(data))
        self.state = TrainState(self.plan)
        self.engine: Any = make_engine(self.config, task, task.model(), self.plan.peak, world)
        self._loader = Loader(data, task, self.state, world, 0, stand_ins=self.engine.lockstep)
        self._run = RunDir(folder)
        folder.mkdir(exist_ok=True)
        self.keeper = Saver(
            self._run,
            world,
            self.engine,
            partial(header_of, self.config, None),
            Policy(every_s=None, keep=1),
            Best(None),
        )

    def train(self, steps: int) -> None:
        from isobatch.trainers.engines.step_report import Note

        engine = self.engine
        for _ in range(steps):
            step = self.plan.step_at(self.state.samples)
            assert step
            for micro in self._loader(step):
                with engine.micro(step.cut, last=micro.last):
                    loss, units = engine.loss(micro.batch, micro.samples)
                    engine.backward(loss / step.expected_units, Note(loss, units, micro.expected_units))
            scale = engine.total(step.expected_units).scale(step.expected_units)
            engine.update(scale, 1.0, step.recipe)
            self.state.samples, self.state.steps = step.stop, step.index + 1

    def save(self) -> None:
        self.keeper.save(self.state)

    def resume(self) -> None:
        from isobatch.trainers.checkpoints.resume import resume

        resume(self._run, self.config, self.world, self.engine, self.plan, None, print, Watch().beat)

    def timed(self, work: Callable[[], object]) -> float:
        self.world.gather("")
        began = time.perf_counter()
        work()
        return time.perf_counter() - began


def measure(layers: int, folder: Path, world: World) -> dict[str, float]:
    """Medians of seconds on this rank, turn by turn with plain torch."""
    one = Saving(layers, (), folder, world)
    model, optimizer, torchs = one.engine.model, one.engine._tuned.optimizer, folder / "torch.pt"
    keeper, timed, train = one.keeper, one.timed, one.train

    def saved_by_torch() -> None:
        if world.rank == 0:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, torchs)
        world.gather("")

    def loaded_by_torch() -> None:
        found = torch.load(torchs, weights_only=True)
        model.load_state_dict(found["model"])
        optimizer.load_state_dict(found["optimizer"])

    def saved(steps: int) -> None:
        one.save()
        train(steps)

    share = [piece.data for piece in _slices(train, one.engine)]
    copies = [torch.zeros_like(tensor) for tensor in share]

    def copied() -> None:
        for copy, tensor in zip(copies, share, strict=True):
            copy.copy_(tensor)

    found: dict[str, list[float]] = {}
    first = timed(one.save)
    keeper.wait()
    step_s, steps = timed(lambda: train(3)) / 3, 0
    for turn in range(TURNS[layers] + 1):
        train(1)
        once = {
            "copy": timed(one.save),
            "write": timed(keeper.wait),
            "torch.save": timed(saved_by_torch),
            "memcpy": timed(copied),
            "resume": timed(one.resume),
            "torch.load": timed(loaded_by_torch),
        }
        if turn == 0:  # a warm-up, by which it is known how many steps the writing takes
            steps = int(world.agree(str(max(4, math.ceil(1.5 * once["write"] / step_s)))))
            continue
        train(1)
        once["with a save"] = timed(partial(saved, steps))
        keeper.wait()
        once["without"] = timed(partial(train, steps))
        once["taken"] = once["with a save"] - once["without"]
        for name, value in once.items():
            found.setdefault(name, []).append(value)
    keeper.close()
    return {"first copy": first, **{name: statistics.median(values) for name, values in found.items()}}


def _slices(train: Callable[[int], None], engine: Any) -> list[Any]:
    """This rank's part of the state, once there is all of it."""
    train(2)
    return list(engine.slices())


def rows() -> list[dict[str, Any]]:
    """One row for each size and number of ranks; of each time that of the slowest rank."""
    found = []
    for size in TURNS:
        for ranks in RANKS:
            with tempfile.TemporaryDirectory() as name:
                body = partial(measure, size, Path(name) / "run")
                measured = in_ranks(ranks, body, Path(name), deadline_s=600)
            slowest = {key: max(one[key] for one in measured) for key in measured[0]}
            found.append(
                {
                    "weights, ranks": f"{size} MiB, {ranks}",
                    "copy ms (the first)": f"{1e3 * slowest['copy']:.3g} ({1e3 * slowest['first copy']:.3g})",
                    "/ memcpy": slowest["copy"] / slowest["memcpy"],
                    "/ torch.save": slowest["copy"] / slowest["torch.save"],
                    "write ms": 1e3 * slowest["write"],
                    "taken in all ms": 1e3 * slowest["taken"],
                    "in all / torch.save": slowest["taken"] / slowest["torch.save"],
                    "resume ms": 1e3 * slowest["resume"],
                    "resume / torch.load": slowest["resume"] / slowest["torch.load"],
                }
            )
    return found


def by_engine(name: str, layers: int, folder: Path, world: World) -> dict[str, float]:
    """Medians of seconds on this rank."""
    one, found = Saving(layers, ENGINES[name], folder, world), dict[str, list[float]]()
    for _ in range(TURNS[layers] + 1):
        one.train(2)
        for what, work in {"copy": one.save, "write": one.keeper.wait, "resume": one.resume}.items():
            found.setdefault(what, []).append(one.timed(work))
    one.keeper.close()
    return {what: statistics.median(values[1:]) for what, values in found.items()}


def engine_rows() -> list[dict[str, Any]]:
    """One row for each size, number of ranks and engine; of each time that of the slowest rank."""
    found = []
    for (size, ranks), name in itertools.product(BY_ENGINE, SAVED_BY):
        with tempfile.TemporaryDirectory() as folder:
            body = partial(by_engine, name, size, Path(folder) / "run")
            measured = in_ranks(ranks, body, Path(folder), deadline_s=600)
        slowest = {f"{what} ms": 1e3 * max(one[what] for one in measured) for what in measured[0]}
        found.append({"weights, ranks, engine": f"{size} MiB, {ranks}, {name}", **slowest})
    return found


if __name__ == "__main__":
    for row in (*rows(), *engine_rows()):
        print(row)
