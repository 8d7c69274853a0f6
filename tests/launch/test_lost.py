"""Run directories that are moved or deleted during a run, and launches that flock doesn't exclude."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import pytest

from benchmarks.soak import LAUNCH
from tests.launch.test_workers import BASE, LONG, Run, folder, launch, launch_cold, torchrun, wait_until
from tests.support.noflock import without_flock

__all__ = ["folder"]  # a fixture
PROMPTLY_S = 20.0  # on a busy machine; alone it takes 4 s


def lost(run: Run, cause: str) -> None:
    """It ends with this cause, said once, and makes nothing again."""
    began = time.monotonic()
    code = run.end()
    assert time.monotonic() - began < PROMPTLY_S
    assert code == 1, run.err
    said = run.said
    assert len(said) == 1, run.err
    assert cause in said[0]
    assert "Traceback" not in run.err.partition(said[0])[0]  # behind that torchrun has its say
    assert "finished" not in run.out


def test_without_flock_one_of_two_trains(folder: Path) -> None:
    """Started at once; then the lock is removed, and another one comes."""
    env = without_flock(folder)
    both = [launch_cold(folder, *LONG, **env) for _ in range(2)]
    wait_until(lambda: any(run.process.poll() is not None for run in both))
    second, first = sorted(both, key=lambda run: run.process.poll() is None)
    assert second.end() == 2
    assert "another launch works in" in second.said[0]
    assert f"pid {first.process.pid}" in second.said[0]
    first.await_training()
    (first.dir / "lock").unlink()
    third = launch_cold(folder, *LONG, **env)
    assert third.end() == 2
    assert f"pid {first.process.pid}" in third.said[0]
    assert len(first.events("start")) == 1
    first.process.terminate()
    assert first.end() == 75
    assert not (first.dir / ".owner").exists()


def test_a_removed_lock_keeps_others_out_and_a_moved_directory_ends_the_run(folder: Path) -> None:
    run = launch(folder, *LONG)
    run.await_training()
    (run.dir / "lock").unlink()
    second = launch(folder, *LONG)
    assert second.end() == 2
    assert "another launch works in" in second.said[0]
    moved = run.dir.rename(folder / "moved")
    lost(run, f"run directory {run.dir} was moved to {moved} during the run")
    assert not run.dir.exists()
    run.dir = moved
    assert run.outcome["state"] == "crashed"
    assert run.outcome["step"] > 0
    assert "was moved to" in run.outcome["cause"]
    assert run.events("crashed")[0]["again"] is False
    moved.rename(folder / "run")
    again = launch(folder, *LONG)
    again.await_training(starts=2)
    again.process.terminate()
    assert again.end() == 75


def test_a_deleted_directory_ends_a_run_that_writes_nothing(folder: Path) -> None:
    """A rank hangs, the others wait for it, and nobody comes to the end of a step."""
    run = launch(folder, *LONG, "task.args.fault=hangs", "cluster.max_restarts=3")
    run.await_training()
    shutil.rmtree(run.dir)
    lost(run, f"run directory {run.dir} was deleted during the run")
    assert not run.dir.exists()


@pytest.mark.parametrize("way", ["torchrun", "debug"])
def test_another_directory_in_its_place_is_left_alone(folder: Path, way: str) -> None:
    if way == "torchrun":
        run = torchrun(folder, *LONG, workers=1)
    else:
        run = Run(folder, [sys.executable, str(LAUNCH), *BASE, *LONG, "cluster.gpus_per_node=1", "debug=true"])
    run.await_training()
    moved = run.dir.rename(folder / "moved")
    run.dir.mkdir()
    (run.dir / "outcome.json").write_text("mine")
    lost(run, f"run directory {run.dir} was moved to {moved} during the run")
    assert [path.name for path in run.dir.iterdir()] == ["outcome.json"]
    assert (run.dir / "outcome.json").read_text() == "mine"
    assert json.loads((moved / "outcome.json").read_text())["state"] == "crashed"
