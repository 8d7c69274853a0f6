"""What a save takes from training, and what going on takes: by size and ranks, and in the middle of 10^9 samples.

python -m benchmarks.checkpoints
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks.start import LAUNCH, ROOT, seconds
from tests.faults.hostile import edit
from tests.ranks.harness import in_ranks
from trainers.starting.watch import Watch
from trainers.world import World

TURNS = {1: 9, 10: 5, 100: 3}  # by MiB of weights
RANKS = (1, 2, 4)
WIDTH = 512  # of a layer, whose weights are then 1 MiB

SAMPLES, MIDDLE, GLOBAL = 10**9, 500_000_000, 32
COMMANDS = 4  # after the first, which reads from the disk


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


def measure(layers: int, folder: Path, world: World) -> dict[str, float]:
    """Medians of seconds on this rank, turn by turn with plain torch."""
    from conf.compose import compose
    from scaling.resolve import resolve
    from trainers.checkpoints.keeper import Keeper
    from trainers.checkpoints.resume import header_of, resume
    from trainers.engines import Parts
    from trainers.engines.ddp import DDP
    from trainers.loader import Loader
    from trainers.optim import make_optimizer
    from trainers.rundir import RunDir
    from trainers.state import TrainState
    from trainers.tally import Note
    from trainers.tasks import make_task

    config = compose(
        [
            "task=custom", "task._target_=benchmarks.checkpoints.Layers", f"task.args.layers={layers}",
            "optimizer=adamw", "lr.peak=0.0001", f"batch.global_size={8 * world.size}", "duration=1000000st",
        ]
    )  # fmt: skip
    task = make_task(config)
    data = task.train_data()
    plan = resolve(config, world.size, len(data))
    state, model = TrainState(plan), task.model()
    tuned = make_optimizer(config, task, model, plan.peak)
    engine = DDP(Parts(task, model, lambda: tuned, world), {})
    loader = Loader(data, task, state, world, 0)
    run, torchs = RunDir(folder), folder / "torch.pt"
    folder.mkdir(exist_ok=True)
    keeper = Keeper(
        run, world, engine, partial(header_of, config, None), every_s=None, keep=1, best=None, best_before=None,
        beat=lambda: None,
    )  # fmt: skip

    def train(steps: int) -> None:
        for _ in range(steps):
            step = plan.step_at(state.samples)
            assert step
            for micro in loader(step):
                with engine.micro(step.cut, last=micro.last):
                    loss, units = engine.loss(micro.batch, micro.samples)
                    engine.backward(loss / step.expected_units, Note(loss, units, micro.expected_units))
            scale = engine.total(step.expected_units).scale(step.expected_units)
            engine.update(scale, 1.0, step.recipe)
            state.samples, state.steps = step.stop, step.index + 1

    def timed(work: Callable[[], object]) -> float:
        world.gather("")
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    def saved_by_torch() -> None:
        if world.rank == 0:
            torch.save({"model": model.state_dict(), "optimizer": tuned.optimizer.state_dict()}, torchs)
        world.gather("")

    def loaded_by_torch() -> None:
        found = torch.load(torchs, weights_only=True)
        model.load_state_dict(found["model"])
        tuned.optimizer.load_state_dict(found["optimizer"])

    def saved(steps: int) -> None:
        keeper.save(state)
        train(steps)

    share = [piece.data for piece in _slices(train, engine)]
    copies = [torch.zeros_like(tensor) for tensor in share]

    def copied() -> None:
        for copy, tensor in zip(copies, share, strict=True):
            copy.copy_(tensor)

    found: dict[str, list[float]] = {}
    first = timed(lambda: keeper.save(state))
    keeper.wait()
    step_s, steps = timed(lambda: train(3)) / 3, 0
    for turn in range(TURNS[layers] + 1):
        train(1)
        once = {
            "copy": timed(lambda: keeper.save(state)),
            "write": timed(keeper.wait),
            "torch.save": timed(saved_by_torch),
            "memcpy": timed(copied),
            "resume": timed(lambda: resume(run, config, world, engine, plan, None, print, Watch().beat)),
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


class Far:
    """A dataset of 10^9 samples, none of which is stored; a run of it that asks for a stop at its second step."""

    def __init__(self) -> None:
        self.passes = 0

    def model(self) -> nn.Module:
        return nn.Linear(4, 1)

    def train_data(self) -> Any:
        return Computed()

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
        self.passes += 1
        if self.passes == 2 and "STOPS" in os.environ:
            os.kill(os.getpid(), signal.SIGTERM)
        return model(batch).square().sum(), len(batch)


class Computed(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((4,), index / SAMPLES)


def far_rows() -> list[dict[str, Any]]:
    """Two steps in the middle of an epoch of 10^9 samples against two at its beginning, from start to exit."""
    task = ("task=custom", "task._target_=benchmarks.checkpoints.Far", "lr.peak=0.05", f"batch.global_size={GLOBAL}")
    ranks = ("device=cpu", "cluster.gpus_per_node=2")
    measured = []
    with tempfile.TemporaryDirectory() as name:
        run, begun = Path(name) / "run", Path(name) / "begun"
        command = [*LAUNCH, *task, *ranks, f"duration={MIDDLE + 2 * GLOBAL}sa", f"run.dir={begun}"]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "STOPS": "1"}
        stopped = subprocess.run(command, cwd=name, env=env, capture_output=True, text=True)
        if stopped.returncode != 75:
            raise RuntimeError(f"{' '.join(command)} didn't stop: {stopped.stderr}")
        _move_to_the_middle(begun / "checkpoints/step-00000002")
        for _ in range(COMMANDS + 1):
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(begun, run)
            there = seconds([*LAUNCH, *ranks, f"run.dir={run}"], name, [])
            fresh = [*LAUNCH, *task, *ranks, "duration=2st", "run.new=true"]
            measured.append((there, seconds(fresh, name, [])))
    there, anew = (statistics.median(values) for values in zip(*measured[1:], strict=True))
    ratio = statistics.median(a / b for a, b in measured[1:])
    return [{"command": "2 ranks, 2 steps", "in the middle s": there, "from the beginning s": anew, "ratio": ratio}]


def _move_to_the_middle(checkpoint: Path) -> None:
    step = MIDDLE // GLOBAL
    edit(checkpoint, lambda manifest: manifest.update(step=step, samples=step * GLOBAL))
    checkpoint.rename(checkpoint.with_name(f"step-{step:08d}"))


if __name__ == "__main__":
    for row in (*rows(), *far_rows()):
        print(row)
