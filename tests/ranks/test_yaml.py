"""Test that every YAML in conf/ composes and runs for one step."""

from __future__ import annotations

from pathlib import Path

import pytest

from isobatch.conf.compose import compose
from isobatch.conf.keys import HERE
from isobatch.scaling.planning.resolve import resolve
from tests.support.harness import Runs

WITH = {
    "task/custom": ("task._target_=tests.support.tasks.Counted", "lr.peak=0.1"),
    "optimizer/custom": ("optimizer._target_=torch.optim.RMSprop", "lr.peak=0.001"),
}
FILES = sorted(HERE.glob("*/*.yaml"))
EXPERIMENTS = [file.stem for file in FILES if file.parent.name == "experiment"]


def named(file: Path) -> str:
    return f"{file.parent.name}/{file.stem}"


CONTROLLERS = [file for file in FILES if file.parent.name == "control" and file.stem != "none"]
CONTROLLED = [HERE / "experiment" / f"{name}.yaml" for name in ("images_variance", "text_norm_test")]
ONE_STEP = [file for file in FILES if file.parent.name != "cluster" and file not in (*CONTROLLERS, *CONTROLLED)]


@pytest.mark.parametrize("file", [*CONTROLLERS, *CONTROLLED], ids=named)
def test_controller_runs_until_it_decides(runs: Runs, file: Path) -> None:
    """A run that ends before is rejected."""
    sizes = ("batch.global_size=32", "batch.per_gpu=32", "control.every=32sa", "control.most=64", "duration=320sa")
    run = runs(1, f"{file.parent.name}={file.stem}", *sizes, "lr.warmup=0", "evaluate.samples=10")
    assert run.ends[0].get("state") == "finished", run.ends[0]
    assert len([line for line in run.metrics() if "control/size" in line]) > 5


@pytest.mark.parametrize("file", ONE_STEP, ids=named)
def test_file_runs_for_one_step(runs: Runs, file: Path) -> None:
    group, name = file.parent.name, file.stem
    run = runs(1, f"{group}={name}", *WITH.get(named(file), ()), "duration=1st", "lr.warmup=0", "batch.schedule=null")
    assert [run.ends[0].get(key) for key in ("state", "step")] == ["finished", 1], run.ends[0]
    assert run.losses()[0] > 0


@pytest.mark.parametrize("file", [file for file in FILES if file.parent.name == "cluster"], ids=named)
def test_cluster_file_composes(file: Path) -> None:
    assert compose([f"cluster={file.stem}"]).cluster.name == file.stem


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_is_planned(name: str) -> None:
    plan = resolve(compose([f"experiment={name}"]), 2)
    assert plan.steps
    assert plan.base_source == "tuned"


def test_each_task_has_a_small_and_a_large_experiment() -> None:
    """The large experiment has at least eight times the batch that the task was tuned at."""
    sizes: dict[str, list[float]] = {}
    for name in EXPERIMENTS:
        plan = resolve(compose([f"experiment={name}"]), 1)
        sizes.setdefault(plan.task, []).append(max(s.global_size for s in plan.segments) / plan.base_batch)
    tasks = {file.stem for file in FILES if file.parent.name == "task"} - {"custom"}
    assert sizes.keys() == tasks
    assert all(min(kappas) <= 1 and max(kappas) >= 8 for kappas in sizes.values()), sizes
