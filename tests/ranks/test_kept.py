"""Test that checkpoints of all kinds of models and optimizers are complete, and test who holds the run's lock."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from isobatch.conf.rundir.directory import RunDir
from isobatch.conf.rundir.lock import DYING_S, LOCK_FD, hold, open_lock
from isobatch.scaling.errors import UserError
from isobatch.trainers.launch.process import WorkerProcess
from isobatch.trainers.ranks.signals import Stop
from isobatch.trainers.ranks.watch import Watch
from tests.support.harness import Run, Runs

TASK = (
    "task=custom", "task._target_=tests.support.tasks.Odd", "batch.global_size=20", "duration=30st",
    "evaluate.every=10st", "checkpoint.every=null",
)  # fmt: skip
OWN = ("optimizer=custom", "optimizer._target_=tests.support.tasks.Counting", "lr.peak=0.01")
OPTIMIZERS = {
    "sgd": ("lr.peak=0.05",),
    "adamw": ("optimizer=adamw", "lr.peak=0.01"),
    "state of its own": OWN,
    "Adafactor": ("optimizer=custom", "optimizer._target_=torch.optim.Adafactor", "lr.peak=0.01"),
    "NAdam": ("optimizer=custom", "optimizer._target_=torch.optim.NAdam", "lr.peak=0.01"),
    "RMSprop": ("optimizer=custom", "optimizer._target_=torch.optim.RMSprop", "lr.peak=0.01"),
}


def same(a: Run, b: Run) -> bool:
    return all(torch.equal(a.weights()[name], b.weights()[name]) for name in a.weights())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_is_restored(runs: Runs, optimizer: str) -> None:
    task = (*TASK, *OPTIMIZERS[optimizer])
    run = runs(2, *task, resume=runs(2, *task, stop_at=13))
    assert same(run, runs(2, *task))


@pytest.mark.parametrize("kind", ["double", "frozen"])
def test_every_model_is_restored(runs: Runs, kind: str) -> None:
    """Test weights in float64, a frozen parameter and a reassigned buffer, with clipping and an average."""
    task = (*TASK, "lr.peak=0.05", f"task.args.kind={kind}", "clip_norm=0.5", "ema=100sa")
    run = runs(2, *task, resume=runs(2, *task, stop_at=13))
    assert same(run, runs(2, *task))


def test_state_that_cannot_be_saved_is_rejected_after_the_first_step(runs: Runs) -> None:
    """A tuple would be restored as a list."""
    end = runs(2, *TASK, *OWN, "optimizer.args.state=tuple").ends[0]
    assert end["raised"] == "UserError"
    assert "the optimizer Counting keeps optim/0.weight/odd=(1, 2), which a checkpoint can't hold" in end["message"]


def test_skipped_step_leaves_no_trace_in_buffers(runs: Runs) -> None:
    """A micro-batch with NaN inputs leaves none, even if the module assigned a new buffer."""
    run = runs(1, *TASK, "lr.peak=0.05", "task.args.call=5", "on_nonfinite=skip")
    assert run.ends[0]["state"] == "finished"
    assert all(torch.isfinite(value).all() for value in run.weights().values())
    assert run.metrics()[-1]["val/loss"] == pytest.approx(1, abs=0.5)
    assert [event["step"] for event in run.events() if event["event"] == "skip"] == [5]


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ("groups", "groups of 2 and 2 parameters, but this run's has groups of 1 and 3"),
        ("dtype", "float32 [32, 8], but"),
    ],
)
def test_edited_task_is_rejected(runs: Runs, monkeypatch: pytest.MonkeyPatch, env: str, expected: str) -> None:
    """The identity doesn't include the source."""
    task = (*TASK, "task._target_=tests.support.tasks.Edited", "lr.peak=0.05")
    run = runs(1, *task, stop_at=3)
    monkeypatch.setenv("EDITED", env)
    refused = runs(1, *task, resume=run).ends[0]
    assert refused["raised"] == "UserError"
    assert expected in refused["message"]
    assert "\n" not in refused["message"]


def test_last_checkpoint_is_saved_before_the_last_evaluation(runs: Runs) -> None:
    """A failed evaluation costs no training."""
    task = (*TASK, "task._target_=tests.support.tasks.FailsToEvaluate", "lr.peak=0.05", "evaluate.every=null")
    run = runs(2, *task)
    assert run.ends[0]["raised"] == "ValueError"
    assert [path.name for path in run.run.checkpoints.glob("step-*")] == ["step-00000030"]
    again = runs(2, *task, resume=run)
    assert again.events()[-1] | {"time": ""} == {"time": "", "event": "going_on", "checkpoint": "step-00000030"} | {
        "step": 30,
        "samples": 600,
    }


def test_lock_outlives_its_process(tmp_path: Path) -> None:
    """The launch still owns the directory between a worker's death and the next start."""
    run = RunDir(tmp_path / "run")

    def in_fork(body: Any) -> int:
        if pid := os.fork():
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        try:
            body()
            os._exit(0)
        except UserError:
            os._exit(2)

    def worker() -> None:
        os.environ[LOCK_FD] = str(passed_on.fileno())
        run.lock()

    passed_on = open_lock(run.path)
    assert in_fork(worker) == 0
    began = time.monotonic()
    assert in_fork(lambda: run.lock()) == 2
    assert time.monotonic() - began < 5
    assert in_fork(worker) == 0  # the next start of the same launch
    passed_on.close()
    assert in_fork(lambda: run.lock()) == 0


def test_forked_process_does_not_hold_the_lock(tmp_path: Path) -> None:
    """The process may outlive the launch."""
    run = RunDir(tmp_path / "run")

    def work(_: Watch) -> None:
        hold(run.lock())
        if os.fork() == 0:
            time.sleep(60)
        os._exit(0)

    passed_on = open_lock(run.path)
    lock = {LOCK_FD: str(passed_on.fileno())}
    worker = WorkerProcess(multiprocessing.get_context("fork"), 0, lock, Stop(), work, ())
    while worker.code is None:
        time.sleep(0.01)
    passed_on.close()
    run.lock().close()
    os.killpg(worker.pid, signal.SIGKILL)  # fails if the forked process has ended


@pytest.mark.parametrize(("job", "code"), [(("7", 1), 0), (("7", 0), 2), (("8", 1), 2), ((), 2)])
def test_requeued_job_waits_for_its_own_lock(tmp_path: Path, job: tuple[Any, ...], code: int) -> None:
    """A network disk may keep the lock of a lost machine for a while."""
    run = RunDir(tmp_path / "run")
    lost = run.lock("7", 0)
    if (pid := os.fork()) == 0:
        lost.close()
        try:
            run.lock(*job)
            os._exit(0)
        except UserError as error:
            os._exit(2 if str(error).count(", job 7 start 0)") else 1)
    time.sleep(DYING_S + 0.5)
    lost.close()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == code
