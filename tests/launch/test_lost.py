"""Test run directories that are moved or deleted during a run, and launches that flock doesn't exclude."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import pytest

from benchmarks.soak import LAUNCH
from isobatch.conf.rundir.lock import BEAT_S, LOOKS
from tests.launch.test_workers import BASE, LONG, Run, folder, launch, launch_cold, torchrun, wait_until
from tests.support.noflock import without_flock

__all__ = ["folder"]  # a fixture
PROMPTLY_S = 20.0  # for a busy machine; an idle one takes 4 s


def expect_lost(run: Run, cause: str) -> None:
    """Check that the run ends promptly, and prints its cause once."""
    began = time.monotonic()
    code = run.end()
    assert time.monotonic() - began < PROMPTLY_S
    assert code == 1, run.err
    messages = run.messages
    assert len(messages) == 1, run.err
    assert cause in messages[0]
    assert "Traceback" not in run.err.partition(messages[0])[0]  # torchrun's own report follows
    assert "finished" not in run.out


def test_without_flock_only_one_launch_trains(folder: Path) -> None:
    """Two launches start at the same time. A third starts after the lock is removed."""
    env = without_flock(folder)
    both = [launch_cold(folder, *LONG, **env) for _ in range(2)]
    wait_until(lambda: any(run.process.poll() is not None for run in both))
    second, first = sorted(both, key=lambda run: run.process.poll() is None)
    assert second.end() == 2
    assert "another launch works in" in second.messages[0]
    assert f"pid {first.process.pid}" in second.messages[0]
    first.await_training()
    (first.dir / "lock").unlink()
    third = launch_cold(folder, *LONG, **env)
    assert third.end() == 2
    assert f"pid {first.process.pid}" in third.messages[0]
    assert len(first.events("start")) == 1
    first.process.terminate()
    assert first.end() == 75
    assert not (first.dir / ".owner").exists()


def test_a_removed_lock_still_excludes_launches_and_a_moved_directory_ends_the_run(folder: Path) -> None:
    run = launch(folder, *LONG)
    run.await_training()
    (run.dir / "lock").unlink()
    second = launch(folder, *LONG)
    assert second.end() == 2
    assert "another launch works in" in second.messages[0]
    moved = run.dir.rename(folder / "moved")
    expect_lost(run, f"run directory {run.dir} was moved to {moved} during the run")
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
    """One rank hangs and the other waits for it, so no rank finishes a step."""
    run = launch(folder, *LONG, "task.args.fault=hangs", "cluster.max_restarts=3")
    run.await_training()
    shutil.rmtree(run.dir)
    expect_lost(run, f"run directory {run.dir} was deleted during the run")
    assert not run.dir.exists()


@pytest.mark.parametrize("way", ["torchrun", "debug"])
def test_a_run_never_writes_into_a_directory_that_replaced_its_own(folder: Path, way: str) -> None:
    if way == "torchrun":
        run = torchrun(folder, *LONG, workers=1)
    else:
        run = Run(folder, [sys.executable, str(LAUNCH), *BASE, *LONG, "cluster.gpus_per_node=1", "debug=true"])
    run.await_training()
    moved = run.dir.rename(folder / "moved")
    run.dir.mkdir()
    (run.dir / "outcome.json").write_text("mine")
    expect_lost(run, f"run directory {run.dir} was moved to {moved} during the run")
    assert [path.name for path in run.dir.iterdir()] == ["outcome.json"]
    assert (run.dir / "outcome.json").read_text() == "mine"
    assert json.loads((moved / "outcome.json").read_text())["state"] == "crashed"


def test_a_debugger_stays_open_when_the_directory_is_deleted(folder: Path) -> None:
    options = ["debug=true", "task.args.fault=breaks", "task.args.rank=0", "log.every=1st"]
    run = launch_cold(folder, *options, ranks=1, stdin="p 6 * 7\nc\n")
    run.await_training()
    time.sleep(1)  # until it is at the breakpoint
    shutil.rmtree(run.dir)
    time.sleep((LOOKS + 1) * BEAT_S)
    assert run.process.poll() is None
    expect_lost(run, f"run directory {run.dir} was deleted during the run")
    assert "(Pdb) 42" in run.out
