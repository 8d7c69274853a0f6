"""Test how a worker's end is noticed and recorded, without a whole run."""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import re
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import HashStore

from isobatch.conf.rundir.directory import RunDir
from isobatch.scaling.errors import UserError
from isobatch.trainers.launch.process import WorkerProcess
from isobatch.trainers.ranks.failure import Failure, Hangs, Reached, RunFailed, describe_failure, keep_failure
from isobatch.trainers.ranks.notes import await_failure, first_failure, from_json, note_failure, to_json
from isobatch.trainers.ranks.session import Start
from isobatch.trainers.ranks.signals import Stop, die_with_parent
from isobatch.trainers.ranks.watch import Watch

HERE = Path(__file__).name
REACHED = Reached(5, 320)


def failure(rank: int, at: float, step: int = 0, **more: Any) -> Failure:
    return Failure(rank, f"failure of {rank}", reached=Reached(step, 64 * step), time=at, **more)


def store_of(*failures: Failure) -> HashStore:
    store = HashStore()
    for each in failures:
        note_failure(store, each)
    return store


# ---- the heartbeat


def _beats(watch: Watch) -> None:
    watch.beat()
    watch.expect_beats()
    watch.beat(5, 320)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_shares_its_position(method: str) -> None:
    context: Any = multiprocessing.get_context(method)
    watch = Watch(context)
    assert not watch.started
    worker = context.Process(target=_beats, args=(watch,))
    worker.start()
    worker.join()
    assert watch.started
    assert watch.training
    assert watch.reached == REACHED


def test_looks_without_a_beat_are_counted() -> None:
    watch = Watch()
    watch.beat()
    assert [watch.look() for _ in range(3)] == [0, 1, 2]
    watch.beat()
    assert [watch.look() for _ in range(2)] == [0, 1]
    watch.reset()
    assert watch.look() == 1


def test_excused_worker_is_not_expected_to_beat() -> None:
    watch = Watch()
    watch.beat()
    with watch.excused():
        assert [watch.look() for _ in range(3)] == [0, 0, 0]
    assert [watch.look() for _ in range(2)] == [1, 2]


@pytest.mark.parametrize("training", [True, False])
def test_only_a_training_worker_can_hang(tmp_path: Path, training: bool) -> None:
    watch, found, started = Watch(), list[Hangs](), list[bool]()
    watch.beat()
    if training:
        watch.expect_beats()
    began = time.monotonic()
    with open(tmp_path / "log", "w") as log:
        watch.guard(0.5, lambda: started.append(True), found.append, log)
        while not found and time.monotonic() - began < 1.5:
            time.sleep(0.01)
        watch.unguard()
    assert bool(found) == training
    assert started == [True] * training
    if training:
        assert time.monotonic() - began < 1
        assert not found[0].waiting
        assert f"({HERE}:" in str(found[0])
        assert "in test_only_a_training_worker_can_hang" in (tmp_path / "log").read_text()


# ---- the cause of a failure


def test_first_failure_is_the_cause_unless_it_only_lost_another_rank() -> None:
    lost = failure(0, 1.0, step=7, lost=True)
    crash, later = failure(1, 2.0, step=6), failure(2, 3.0, kind="oom")
    first = first_failure(store_of(lost, crash, later), 3)
    assert first is not None
    assert (first.rank, first.silent_ranks) == (1, ())
    assert (first.reached.step, first.reached.samples) == (7, 448)
    first = first_failure(store_of(lost, later), 3)
    assert first is not None
    assert first.kind == "oom"


def test_ranks_without_a_report_are_named() -> None:
    first = first_failure(store_of(failure(0, 1.0, lost=True), failure(2, 1.0, silent=True)), 3)
    assert first is not None
    assert first.cause.startswith("no word from rank 1, 2 ")
    assert first.cause.endswith("rank 0: failure of 0")
    assert first.silent_ranks == (1, 2)
    assert first.rank == 1


def test_first_report_of_a_rank_counts() -> None:
    store = store_of(failure(0, 2.0, kind="oom"), failure(0, 1.0))
    first = first_failure(store, 1)
    assert first is not None
    assert first.kind == "oom"


def test_only_reports_that_may_change_the_cause_are_awaited() -> None:
    began = time.monotonic()
    await_failure(store_of(failure(1, 1.0)), 2)
    await_failure(store_of(failure(1, 1.0, lost=True)), 2, own={0})
    assert await_failure(HashStore(), 2) is None
    assert time.monotonic() - began < 0.5
    await_failure(store_of(failure(1, 1.0, lost=True)), 2)
    assert time.monotonic() - began > 2


@pytest.mark.parametrize(
    ("error", "kind", "lost"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "oom", False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "oom", False),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), "oom", False),
        (OSError(12, "Cannot allocate memory"), "oom", False),
        (MemoryError(), "oom", False),
        (ValueError("out of memory"), "crashed", False),
        (RunFailed("step 3 isn't finite: out of memory"), "crashed", False),
        (UserError("out of memory"), "refused", False),
        (RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer"), "crashed", True),
        (Hangs("it waited", waiting=True), "crashed", True),
        (Hangs("it hung", waiting=False), "crashed", False),
    ],
)
def test_errors_are_classified(error: Exception, kind: str, lost: bool) -> None:
    found = describe_failure(error, 0, "attempt", REACHED)
    assert (found.kind, found.lost) == (kind, lost)
    assert found.again == (not isinstance(error, RunFailed | UserError))
    assert found.reached == REACHED


def test_dead_data_loader_is_the_cause_wherever_it_is_noticed() -> None:
    killed = RuntimeError("DataLoader worker (pid 42) is killed by signal: Killed. ")
    for error in (killed, _raised("DataLoader worker (pid(s) 42) exited unexpectedly", killed)):
        cause = describe_failure(error, 0, "attempt", REACHED).cause
        assert cause.startswith("DataLoader worker (pid 42) is killed by signal: Killed (Linux")
        assert HERE not in cause


def _raised(text: str, cause: Exception) -> Exception:
    try:
        raise RuntimeError(text) from cause
    except RuntimeError as error:
        return error


def test_position_is_that_of_the_error() -> None:
    """A failed evaluation has its own batch size, not that of training."""
    watch, training = Watch(), Reached(7, 448, 32)
    watch.beat(5, 320)
    assert watch.reached == REACHED
    with watch.tracking(lambda: training):
        with watch.tracking(lambda: Reached(7, 448, 64)):
            assert watch.reached.per_gpu == 64
        assert watch.reached == training
    assert watch.reached == REACHED
    with suppress(MemoryError), watch.tracking(lambda: training), watch.tracking(lambda: Reached(7, 448, 16)):
        raise MemoryError
    assert watch.reached == Reached(7, 448, 16)


def test_failure_is_sent_and_recorded_whole(tmp_path: Path) -> None:
    """Other programs read the file's keys."""
    found = describe_failure(_raised("boom", ValueError()), 1, "attempt", Reached(7, 448, 32))
    assert from_json(to_json(found), Failure) == found
    run = RunDir(tmp_path)
    run.logs.mkdir()
    found = keep_failure(found, run)
    kept = json.loads((run.logs / "error-rank-1.json").read_text())
    assert kept.keys() == {
        "time", "rank", "attempt", "restart", "kind", "again", "lost", "silent", "cause", "traceback", "step",
        "samples", "per_gpu", "granule", "fixed", "probe", "log",
    }  # fmt: skip
    assert (kept["step"], kept["per_gpu"], kept["log"]) == (7, 32, str(run.logs / "rank-1.log"))
    assert "boom" in (run.logs / "rank-1.log").read_text()


@pytest.mark.parametrize("text", ['{"attempt": 1}', '{"attempt": "a", "hosts": "one two"}', "[]"])
def test_record_of_another_form_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="validation error"):
        from_json(text, Start)


# ---- stacks


def _loads() -> None:
    time.sleep(1000)


def _serves() -> None:
    os.setsid()
    time.sleep(1000)


def _shows_stacks(log: Path) -> None:
    faulthandler.register(signal.SIGQUIT, open(log, "a"))  # noqa: SIM115  open until this process ends


def _is_suspended() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _train_with_many_threads(folder: Path, _: Watch) -> None:
    for work in (_loads, _serves):
        _shows_stacks(folder / work.__name__)
        if (child := os.fork()) == 0:
            die_with_parent()
            work()
    while os.getpgid(child) != child:
        time.sleep(0.01)
    _shows_stacks(folder / "worker")
    for _ in range(20):
        threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
    while True:
        _is_suspended()
        time.sleep(0.001)


def _await_suspension(worker: WorkerProcess) -> None:
    while not worker.suspended:
        assert worker.code is None
        time.sleep(0.01)


def test_suspended_worker_shows_where_its_main_thread_stopped(tmp_path: Path) -> None:
    """Any of its threads may handle a signal to the process. Its data loaders show their stacks, too."""
    fork, rounds = multiprocessing.get_context("fork"), 10
    worker = WorkerProcess(fork, 0, {}, Stop(), _train_with_many_threads, (tmp_path,))
    try:
        for _ in range(rounds):
            _await_suspension(worker)
            worker.show_stacks()
        _await_suspension(worker)
    finally:
        worker.kill(5)
    first = re.compile(r"Current thread .*\n  File .* in (\w+)")
    assert first.findall((tmp_path / "worker").read_text()) == ["_is_suspended"] * rounds
    assert "in _loads" in (tmp_path / "_loads").read_text()
    assert (tmp_path / "_serves").read_text() == ""  # it left the process group
