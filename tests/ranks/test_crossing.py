"""Test that each engine resumes from the checkpoints of the others, on any number of ranks."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from isobatch.conf.compose import compose
from isobatch.conf.rundir.directory import RunDir
from isobatch.scaling.order import indices
from isobatch.scaling.planning.resolve import resolve
from isobatch.trainers.checkpoints.best import Best
from isobatch.trainers.checkpoints.resume import header_of, resume
from isobatch.trainers.checkpoints.saver import Policy, Saver
from isobatch.trainers.engines.make import make_engine
from isobatch.trainers.model.build import prepare
from isobatch.trainers.model.randomness import Stream
from isobatch.trainers.ranks.world import World
from isobatch.trainers.tasks.task import make_model, make_task
from isobatch.trainers.tensors.manifest import read
from isobatch.trainers.tensors.names import checkpoints
from isobatch.trainers.tensors.slices import Reader
from tests.ranks.test_deepspeed import deepspeed  # noqa: F401  a fixture
from tests.support.harness import ADAM_ROUNDING, ROUNDING, Run, Runs, distance, in_ranks
from tests.support.same import ENGINES, Blocks
from tests.support.tasks import RecordsSamples

ROOT = Path(__file__).parents[2]
SAMPLES, GLOBAL, STEPS = 500, 48, 12
# Dropout, augmentation, unequal units, BatchNorm, active clipping, an average. On four ranks, some have no samples.
TASK = (
    "task=custom", "task._target_=tests.ranks.test_crossing.Recorded", "task.args.norm=true", "batchnorm.mode=ghost",
    "batchnorm.ghost_size=8", "batch.per_gpu=8", "log.every=1st",
    f"batch.global_size={GLOBAL}", f"duration={STEPS}st", "evaluate.every=null",
    "clip_norm=0.5", "ema=60sa", "data.fingerprint=false",
)  # fmt: skip
ADAMW = ("optimizer=adamw", "lr.peak=0.01")
SMALL = (
    "task=custom", "task._target_=tests.support.tasks.Counted", "batch.global_size=40", "duration=4st", *ADAMW,
    "evaluate.every=null", "log.every=1st", "clip_norm=0.5", "ema=60sa",
)  # fmt: skip


class Recorded(Blocks, RecordsSamples):
    """A task that records which samples are fetched."""


class Stage(NamedTuple):
    """A part of a run: the engine, the number of ranks, and the last step."""

    engine: str
    ranks: int
    until: int


CHAIN = (
    Stage("DDP", 4, 3),
    Stage("FSDP", 2, 6),
    Stage("ZeRO-3", 3, 8),
    Stage("Accelerate", 2, 10),
    Stage("DDP", 1, 12),
)


def test_one_run_on_all_engines(runs: Runs, tmp_path: Path) -> None:
    """The next engine restores every checkpoint bit by bit, and fetches the samples that are due."""
    fetched = tmp_path / "fetched"
    fetched.mkdir()
    options, run = (*TASK, *ADAMW, f"task.args.folder={fetched}"), None
    for before, stage in pairwise((Stage("", 0, 0), *CHAIN)):
        own = (*options, *ENGINES[stage.engine])
        if run:
            assert saved_again(run.run, stage.ranks, own, tmp_path / f"again-{stage.until}") == stored(run.run)
        run = runs(stage.ranks, *own, stop_at=stage.until if stage.until < STEPS else None, resume=run)
        assert run.ends[0]["step"] == stage.until, run.ends[0]
        due = indices(0, SAMPLES, before.until * GLOBAL, stage.until * GLOBAL).tolist()
        assert sorted(taken(fetched)) == sorted(due)
    assert run
    whole = runs(1, *options)
    for name in ("model.safetensors", "ema.safetensors"):
        assert distance(run.weights(name), whole.weights(name)) < ADAM_ROUNDING


def taken(folder: Path) -> list[int]:
    """Return and remove the recorded rows."""
    rows = [int(row) for file in folder.iterdir() for row in file.read_text().split()]
    for file in folder.iterdir():
        file.unlink()
    return rows


def saved_again(run: RunDir, ranks: int, options: tuple[str, ...], folder: Path) -> dict[str, Any]:
    """Return the checkpoint that ranks save right after they resume from a run's last checkpoint."""
    config, other = compose(["data.workers=0", *options]), RunDir(folder)

    def body(world: World) -> str | None:
        task = make_task(config)
        plan = resolve(config, world.size, SAMPLES)
        stream = Stream(config.seed, world.device, tell=lambda _: None)
        engine = make_engine(
            config, task, prepare(make_model(config, task), config, stream, world.size), plan.peak, world
        )
        state, _ = resume(run, config, world, engine, plan, None, print, lambda: None)
        keeper = Saver(other, world, engine, partial(header_of, config, None), Policy(every_s=None, keep=1), Best(None))
        keeper.save(state)
        return keeper.wait()

    assert in_ranks(ranks, body, folder) == [None] * ranks
    return stored(other)


def stored(run: RunDir) -> dict[str, Any]:
    """Return dtype, shape and bytes of each tensor of a run's last checkpoint, and its other values."""
    reader = Reader(read(checkpoints(run)[0]))
    tensors = {
        name: (stored.dtype, stored.shape, reader(name).view(torch.uint8).numpy().tobytes())
        for name, stored in reader.tensors.items()
    }
    return {**tensors, **reader.values}


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """Return a function that gives the stopped run of an engine on two ranks."""
    runs = Runs(tmp_path_factory.mktemp("stopped_run"))
    return cache(lambda engine: runs(2, *SMALL, *ENGINES[engine], stop_at=2))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Runs(tmp_path_factory.mktemp("uninterrupted"))(1, *SMALL)


KINDS = ("DDP", "FSDP", "ZeRO-1", "ZeRO-3")  # one engine for each layout of a rank's tensors


@pytest.mark.parametrize(("first", "then"), [*permutations(KINDS, 2), ("ZeRO-0", "ZeRO-2"), ("ZeRO-2", "ZeRO-0")])
def test_each_engine_resumes_from_each(
    runs: Runs, stopped_run: Callable[[str], Run], uninterrupted: Run, first: str, then: str
) -> None:
    shutil.copytree(stopped_run(first).run.path, runs.folder / "run")
    run = runs(3, *SMALL, *ENGINES[then], resume=Run(RunDir(runs.folder / "run"), []))
    assert (run.ends[0]["state"], run.events()[-2]["event"]) == ("finished", "going_on")
    assert distance(run.weights(), uninterrupted.weights()) < ADAM_ROUNDING


def test_additional_state_of_an_optimizer_is_restored(runs: Runs) -> None:
    """Its state_dict has state beyond the parameters'. The engines are those that leave parameters unflattened."""
    options = (*SMALL, "optimizer=custom", "optimizer._target_=tests.support.tasks.Counting", "duration=5st")
    whole, run = runs(1, *options), None
    for number, engine in enumerate(("DDP", "FSDP", "ZeRO-0", "Accelerate", "DDP"), 1):
        run = runs(1 + number % 3, *options, *ENGINES[engine], stop_at=number if number < 5 else None, resume=run)
        assert run.ends[0].get("step") == number, run.ends[0]
        assert stored(run.run)["optim/more"] == {"count": number}
    assert run
    assert distance(run.weights(), whole.weights()) < ROUNDING


def test_optimizer_that_the_next_engine_does_not_support_is_rejected(runs: Runs) -> None:
    run = runs(2, "duration=2ep", "optimizer=lamb", "lr.peak=0.01", stop_at=2).run.path
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    command = [sys.executable, "launch.py", f"run.dir={run}", "engine=deepspeed", "engine.stage=2", "device=cpu"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert "engine=deepspeed engine.stage=2 doesn't support optimizer=lamb" in ended.stderr
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
