"""Test that branches continue a run exactly, and what is said where none can start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from isobatch.scaling.errors import UserError
from isobatch.scaling.planning.automatic import configured
from isobatch.scaling.planning.resolve import resolve
from isobatch.trainers.ranks.world import World
from isobatch.trainers.tensors.manifest import read
from isobatch.trainers.tensors.slices import Reader
from isobatch.trainers.tuning import branch
from isobatch.trainers.tuning.bench import Bench
from isobatch.trainers.tuning.starts import plan_here
from isobatch.trainers.tuning.tune import open_bench
from tests.support.harness import Run, Runs, in_ranks, session_of

# BatchNorm, momentum and a decaying LR: a branch that lost one of them would differ
TASK = (
    "task=custom", "task._target_=tests.support.tasks.Odd", "batch.global_size=8", "batch.per_gpu=4", "duration=120st",
    "lr.peak=0.02", "evaluate.every=null", "data.workers=0", "check.contract=false",
)  # fmt: skip
STEPS = (24, 48, 72, 96, 120)


def bench_of(world: World, *overrides: str) -> Bench:
    bench = open_bench(session_of(configured([*TASK, "action=tune", *overrides]), world))
    assert bench
    return bench


def files(folder: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime for path in folder.rglob("*")}


def test_a_branch_of_the_same_batch_is_the_run_and_leaves_it_alone(runs: Runs, tmp_path: Path) -> None:
    """From a kept checkpoint on two ranks, the weights at the next one are the run's bit by bit."""
    run = runs(2, *TASK, "checkpoint.keep_every=20%")
    before = files(run.run.path)
    start, end = (run.run.checkpoints / f"step-{step:08d}" for step in STEPS[1:3])

    def body(world: World) -> Any:
        bench = bench_of(world, f"init_from={start}")
        plan = branch.branch_plan(plan_here(bench, read(start)), read(start).header.samples, 8)
        with bench.trial(plan, read(start)) as trial:
            while trial.state.samples < read(end).header.samples:
                trial.step()
            list(trial.engine.slices())  # shares rank 0's buffers, as a checkpoint does
            saved, reader = read(end), Reader(read(end))
            names = [name for name in saved.tensors if name.startswith("model/")]
            same = [torch.equal(trial.engine.whole(name), reader.whole(name)) for name in names]
        return same, branch.measure(bench)

    (same, found), other = in_ranks(2, body, tmp_path / "ranks")
    assert len(same) > 3
    assert all(same)
    assert other == [same, found]  # the same on all ranks
    assert files(run.run.path) == before
    (course,) = found["course"]
    assert (course["samples"], course["batch"]) == (8 * 48, 8)
    ran = [(one["batch"], [samples for samples, _ in one["curve"]][-1]) for one in course["branches"]]
    assert ran == [(4, course["length"]), (8, course["length"]), (16, course["length"])]
    assert [(one["batch"], one["why"]) for one in course["left_out"]] == [
        (32, "144 samples are 4 steps of it, and a branch needs 8: give tune.samples=256sa or more"),
        (64, "144 samples are 2 steps of it, and a branch needs 8: give tune.samples=512sa or more"),
    ]
    assert "which are 512 samples, and the checkpoint leaves 511" in branch._too_short(64, 144, 511)
    assert "no branch at a batch of 64: 144 samples are 2 steps" in branch.tell(found)
    starts = {one["curve"][0][1] for one in course["branches"]}
    assert len(starts) == 1
    assert json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["init_from={run}/checkpoints/step-00000120"], "it leaves 0 samples of the run, and a branch takes 144"),
        (["init_from={run}", "tune.samples=100%"], "train with checkpoint.keep_every=10%"),
        (
            ["init_from={run}", "tune.samples=40sa"],
            "too little data for branches: one needs 8 steps, which are 128 samples at a batch of 16, and takes "
            "40 samples; give tune.samples=128sa or more",
        ),
        (
            ["init_from={run}/checkpoints/step-00000048", "task.name=other"],
            "it is of task custom, and this run has other; give init_from a checkpoint of this run",
        ),
        (["init_from={run}/checkpoints/step-00000048", "task.args.width=9"], "can't be restored: model/"),
        (
            ["init_from={run}/checkpoints/step-00000048", "optimizer=adamw"],
            "it was trained with optimizer=sgd, not adamw; give optimizer=sgd, or",
        ),
        (["init_from={run}/final"], "/final has no checkpoint to branch off"),
        ([], "has no checkpoint to branch off; train with checkpoint.keep_every=10%"),
        (
            ["task._target_=tests.ranks.test_evaluate_action.Unvalidated"],
            "but Unvalidated has no val_data(); add val_data(self) to it in tests.ranks.test_evaluate_action",
        ),
    ],
)
def test_what_cannot_start_a_branch_is_said(finished: Run, overrides: list[str], expected: str, tmp_path: Path) -> None:
    bench = bench_of(World.alone(), *(text.format(run=finished.run.path) for text in overrides), f"run.dir={tmp_path}")
    with pytest.raises(UserError) as caught:
        branch.measure(bench)
    assert expected in str(caught.value)


def test_a_run_too_short_for_branches_is_said() -> None:
    plan = resolve(configured(["task=digits", "duration=1000sa"]), 1)
    assert "give tune.samples=800sa" in str(branch._too_little_data(plan, 200, 100, 10))
    assert "branch off a longer run, or an earlier" in str(branch._too_little_data(plan, 201, 100, 10))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Runs(tmp_path_factory.mktemp("runs"))(1, *TASK, "checkpoint.keep_every=20%")


def test_checkpoints_of_a_run_are_branched_off_in_turn(finished: Run) -> None:
    """The last two leave no room for a branch of a fifth of the run, or are at its end."""
    bench = bench_of(World.alone(), f"init_from={finished.run.path}", "tune.samples=25%")
    starts = branch._starts(bench)
    assert [start.header.step for start in starts] == [24, 48, 72]


@pytest.mark.parametrize(
    ("schedule", "position", "rejected"),
    [
        ("0sa:32 10ep:64", 20_000, False),
        ("0sa:32 10ep:64 lr:hold", 20_000, True),
        ("0sa:32 10ep:64 lr:hold", 5_000, False),
    ],
)
def test_only_a_run_whose_lr_follows_its_batch_by_the_rule_has_branches(
    schedule: str, position: int, rejected: bool
) -> None:
    plan = resolve(configured(["task=digits", f"batch.schedule='{schedule}'"]), 1)
    if not rejected:
        assert branch.rule_of_branches(plan, position).name == "linear"
        return
    with pytest.raises(UserError, match="without its LR following"):
        branch.rule_of_branches(plan, position)
