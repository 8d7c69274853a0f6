"""Time saving and resuming, by size and ranks, and by engine.

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

TURNS = {1: 9, 10: 5, 100: 3}  # MiB of weights -> turns
RANKS = (1, 2, 4)
BY_ENGINE = ((10, 2), (100, 2), (100, 4))  # MiB of weights, ranks
SAVED_BY = ("ddp", "fsdp", "deepspeed 1", "deepspeed 3")
WIDTH = 512  # a layer of this width has 1 MiB of weights


class Layers:
    """A task whose model has ``layers`` layers of 1 MiB."""

    def __init__(self, layers: int) -> None:
        self.layers = layers

    def model(self) -> nn.Module:
        return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(self.layers)))

    def train_data(self) -> TensorDataset:
        return TensorDataset(torch.randn(4096, WIDTH, generator=torch.Generator().manual_seed(0)))

    def loss(self, model: nn.Module, batch: tuple[Tensor]) -> tuple[Tensor, int]:
        return model(batch[0]).square().sum(), len(batch[0])


class Saving:
    """A run of ``Layers`` that can train, save and resume. It writes only checkpoints."""

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
                    loss, units, _ = engine.loss(micro.batch, micro.samples)
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
    """Return median seconds on this rank, taking turns with plain torch."""
    run = Saving(layers, (), folder, world)
    model, optimizer, torch_file = run.engine.model, run.engine._tuned.optimizer, folder / "torch.pt"
    keeper, timed, train = run.keeper, run.timed, run.train

    def save_by_torch() -> None:
        if world.rank == 0:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, torch_file)
        world.gather("")

    def load_by_torch() -> None:
        loaded = torch.load(torch_file, weights_only=True)
        model.load_state_dict(loaded["model"])
        optimizer.load_state_dict(loaded["optimizer"])

    def save_and_train(steps: int) -> None:
        run.save()
        train(steps)

    share = [piece.data for piece in _slices(train, run.engine)]
    copies = [torch.zeros_like(tensor) for tensor in share]

    def copy_share() -> None:
        for copy, tensor in zip(copies, share, strict=True):
            copy.copy_(tensor)

    seconds: dict[str, list[float]] = {}
    first = timed(run.save)
    keeper.wait()
    step_s, steps = timed(lambda: train(3)) / 3, 0
    for turn in range(TURNS[layers] + 1):
        train(1)
        once = {
            "copy": timed(run.save),
            "write": timed(keeper.wait),
            "torch.save": timed(save_by_torch),
            "memcpy": timed(copy_share),
            "resume": timed(run.resume),
            "torch.load": timed(load_by_torch),
        }
        if turn == 0:  # a warm-up, which finds how many steps the write overlaps
            steps = int(world.agree(str(max(4, math.ceil(1.5 * once["write"] / step_s)))))
            continue
        train(1)
        once["with a save"] = timed(partial(save_and_train, steps))
        keeper.wait()
        once["without"] = timed(partial(train, steps))
        once["taken"] = once["with a save"] - once["without"]
        for name, value in once.items():
            seconds.setdefault(name, []).append(value)
    keeper.close()
    return {"first copy": first, **{name: statistics.median(values) for name, values in seconds.items()}}


def _slices(train: Callable[[int], None], engine: Any) -> list[Any]:
    """Return this rank's shard of the state, after steps that create the optimizer's state."""
    train(2)
    return list(engine.slices())


def rows() -> list[dict[str, Any]]:
    """Return a row per size and number of ranks, with the times of the slowest rank."""
    found = []
    for size in TURNS:
        for ranks in RANKS:
            with tempfile.TemporaryDirectory() as name:
                body = partial(measure, size, Path(name) / "run")
                measured = in_ranks(ranks, body, Path(name), deadline_s=600)
            slowest = {key: max(times[key] for times in measured) for key in measured[0]}
            found.append(
                {
                    "weights, ranks": f"{size} MiB, {ranks}",
                    "copy ms (first)": f"{1e3 * slowest['copy']:.3g} ({1e3 * slowest['first copy']:.3g})",
                    "/ memcpy": slowest["copy"] / slowest["memcpy"],
                    "/ torch.save": slowest["copy"] / slowest["torch.save"],
                    "write ms": 1e3 * slowest["write"],
                    "total cost ms": 1e3 * slowest["taken"],
                    "total / torch.save": slowest["taken"] / slowest["torch.save"],
                    "resume ms": 1e3 * slowest["resume"],
                    "resume / torch.load": slowest["resume"] / slowest["torch.load"],
                }
            )
    return found


def by_engine(name: str, layers: int, folder: Path, world: World) -> dict[str, float]:
    """Return median seconds on this rank."""
    run, seconds = Saving(layers, ENGINES[name], folder, world), dict[str, list[float]]()
    for _ in range(TURNS[layers] + 1):
        run.train(2)
        for part, work in {"copy": run.save, "write": run.keeper.wait, "resume": run.resume}.items():
            seconds.setdefault(part, []).append(run.timed(work))
    run.keeper.close()
    return {part: statistics.median(values[1:]) for part, values in seconds.items()}


def engine_rows() -> list[dict[str, Any]]:
    """Return a row per size, number of ranks and engine, with the times of the slowest rank."""
    found = []
    for (size, ranks), name in itertools.product(BY_ENGINE, SAVED_BY):
        with tempfile.TemporaryDirectory() as folder:
            body = partial(by_engine, name, size, Path(folder) / "run")
            measured = in_ranks(ranks, body, Path(folder), deadline_s=600)
        slowest = {f"{part} ms": 1e3 * max(times[part] for times in measured) for part in measured[0]}
        found.append({"weights, ranks, engine": f"{size} MiB, {ranks}, {name}", **slowest})
    return found


if __name__ == "__main__":
    for row in (*rows(), *engine_rows()):
        print(row)
