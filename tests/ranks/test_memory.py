"""Test by peaks of memory that no rank needs the whole sharded model to save it or to resume."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from isobatch.conf.compose import compose
from isobatch.conf.rundir.directory import RunDir
from isobatch.scaling.planning.resolve import resolve
from isobatch.trainers.checkpoints.best import Best
from isobatch.trainers.checkpoints.resume import header_of, resume
from isobatch.trainers.checkpoints.saver import Policy, Saver
from isobatch.trainers.checkpoints.weights import save_final
from isobatch.trainers.data.state import TrainState
from isobatch.trainers.engines.engine import Engine
from isobatch.trainers.engines.make import make_engine
from isobatch.trainers.engines.step_report import Note
from isobatch.trainers.ranks.world import World
from isobatch.trainers.tasks.task import make_task
from isobatch.trainers.tensors.sharding import gathered, slices_of
from isobatch.trainers.tensors.slices import Reader, Slice
from tests.ranks.test_deepspeed import deepspeed  # noqa: F401  a fixture
from tests.support.harness import in_ranks
from tests.support.same import ENGINES

RANKS, WIDTH, LAYERS = 4, 1024, 16
WEIGHTS_MB = LAYERS * WIDTH**2 * 4 >> 20  # 64
STATE_MB = 3 * WEIGHTS_MB  # with AdamW's state
SOME_MB = 20  # a few layers, and messages in flight
MOST_MB = {"save": STATE_MB / RANKS + SOME_MB, "final": SOME_MB, "restore": STATE_MB / RANKS + SOME_MB}
MMAP_THRESHOLD = -3  # for mallopt
TASK = (
    "task=custom", "task._target_=tests.ranks.test_memory.Deep", "batch.global_size=8", "duration=10st",
    "optimizer=adamw", "lr.peak=1e-4", "evaluate.every=null",
)  # fmt: skip


class Deep:
    """A task whose model has many layers of one size."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.ModuleList(Layer() for _ in range(LAYERS)))

    def train_data(self) -> Any:
        return TensorDataset(torch.zeros(80, 1))

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        hidden = torch.ones(len(batch[0]), WIDTH)
        for layer in model[0]:  # type: ignore[index]
            hidden = hidden + layer(hidden)
        return (hidden**2).mean(1).sum(), len(hidden)


class Layer(nn.Linear):
    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH, bias=False)

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 1e-4)


def peak_mb(work: Callable[[], object]) -> float:
    """Return the peak growth of this process's memory in ``work``."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_mb("VmRSS")
    work()
    return _status_mb("VmHWM") - before


def _status_mb(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def phases(world: World, engine: str, folder: Path, naive: bool) -> dict[str, float]:
    """Return the peaks of a save after a step, of writing ``final/``, and of resuming in a new engine.

    Args:
        naive: gather all shards in each phase.
    """
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 1 << 18)  # so that freed memory returns to the system
    config = compose(["data.workers=0", *TASK, *ENGINES[engine]])
    task, run = make_task(config), RunDir(folder / "run")
    run.path.mkdir(parents=True, exist_ok=True)
    plan = resolve(config, world.size, 80)
    run.path.mkdir(exist_ok=True)

    def made() -> Engine:
        found = make_engine(config, task, task.model(), plan.peak, world)
        if naive:
            gather_everything(found, world)
        return found

    trained, state = made(), TrainState(plan)
    step(trained, state)
    keeper = Saver(run, world, trained, partial(header_of, config, None), Policy(every_s=None, keep=1), Best(None))
    found = {"save": peak_mb(lambda: (keeper.save(state), keeper.wait()))}
    assert keeper.wait() is None
    found["final"] = peak_mb(lambda: save_final(run, trained, writes=world.rank == 0))
    fresh = made()
    found["restore"] = peak_mb(lambda: resume(run, config, world, fresh, plan, None, print, lambda: None))
    step(fresh, state)
    return found


def step(engine: Engine, state: TrainState) -> None:
    step = state.plan.step_at(state.samples)
    assert step
    with engine.micro(step.cut, last=True):
        loss, units, _ = engine.loss((torch.zeros(2, 1),), 2)
        engine.backward(loss / step.expected_units, Note(loss, units, 2))
    engine.update(engine.total(step.expected_units).scale(step.expected_units), None, step.recipe)
    state.samples, state.steps = step.stop, step.index + 1


def gather_everything(engine: Any, world: World) -> None:
    """Make an engine save, restore and return whole tensors, so that each rank holds all of them at once."""
    kept, whole, restore = list[Tensor](), engine.whole, engine.restore

    def slices() -> Iterator[Slice]:
        tensors = {**engine._state._always(), **engine._state._optimizer_state()[0]}
        together = {name: gathered(tensor) for name, tensor in tensors.items()}
        return slices_of(together, world.rank, world.size)

    def keeping(name: str) -> Tensor:
        kept.append(whole(name).clone())
        return kept[-1]

    def reading(reader: Reader) -> None:
        together = {name: reader.whole(name) for name in reader.tensors}
        restore(reader)
        together.clear()

    engine.slices, engine.whole, engine.restore = slices, keeping, reading


def largest(engine: str, folder: Path, naive: bool = False) -> dict[str, float]:
    """Return the largest peak over ranks of each phase, in MB."""
    ranks = in_ranks(RANKS, partial(phases, engine=engine, folder=folder, naive=naive), folder)
    assert all("raised" not in rank for rank in ranks), ranks
    return {phase: max(rank[phase] for rank in ranks) for phase in ranks[0]}


@pytest.fixture(scope="module", autouse=True)
def measurable() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("this kernel can't reset the peak of memory")


@pytest.mark.parametrize("engine", ["FSDP", "ZeRO-3"])
def test_rank_needs_memory_only_for_its_shard(engine: str, tmp_path: Path) -> None:
    found = largest(engine, tmp_path)
    assert all(found[phase] < most for phase, most in MOST_MB.items()), found


def test_gathering_everything_raises_the_peaks(tmp_path: Path) -> None:
    found = largest("FSDP", tmp_path, naive=True)
    assert all(found[phase] > 2 * most for phase, most in MOST_MB.items()), found
