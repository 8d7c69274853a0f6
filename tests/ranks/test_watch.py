"""How a worker's end is noticed and what is kept of it, without a run around it."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import HashStore

from isobatch.conf.rundir.directory import Fatal
from isobatch.scaling.errors import UserError
from isobatch.trainers.ranks.notes import Hangs, await_words, error_note, first_error, leave_word, others_word
from isobatch.trainers.ranks.watch import Watch

HERE = Path(__file__).name
NOWHERE = {"step": 5, "samples": 320}


def word(rank: int, at: float, step: int = 0, **more: Any) -> dict[str, Any]:
    return others_word(rank, f"what became of {rank}", {"step": step, "samples": 64 * step}, at, **more)


def store_of(*words: dict[str, Any]) -> HashStore:
    store = HashStore()
    for one in words:
        leave_word(store, one["rank"], one)
    return store


# ---- the heartbeat


def _beats(watch: Watch) -> None:
    watch.beat()
    watch.beat(5, 320)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_worker_shares_how_far_it_came(method: str) -> None:
    context: Any = multiprocessing.get_context(method)
    watch = Watch(context)
    assert not watch.started
    worker = context.Process(target=_beats, args=(watch,))
    worker.start()
    worker.join()
    assert watch.started
    assert watch.training
    assert watch.reached == {"step": 5, "samples": 320}


def test_looks_without_a_beat_are_counted() -> None:
    watch = Watch()
    watch.beat()
    assert [watch.look() for _ in range(3)] == [0, 1, 2]
    watch.beat()
    assert [watch.look() for _ in range(2)] == [0, 1]
    watch.forgive()
    assert watch.look() == 1


def test_nothing_is_missed_of_one_that_is_excused() -> None:
    watch = Watch()
    watch.beat()
    with watch.excused():
        assert [watch.look() for _ in range(3)] == [0, 0, 0]
    assert [watch.look() for _ in range(2)] == [1, 2]


@pytest.mark.parametrize("training", [True, False])
def test_only_one_that_trains_is_said_to_hang(tmp_path: Path, training: bool) -> None:
    watch, found, begun = Watch(), list[Hangs](), list[bool]()
    watch.beat()
    if training:
        watch.beat()
    began = time.monotonic()
    with open(tmp_path / "log", "w") as log:
        watch.guard(0.5, lambda: begun.append(True), found.append, log)
        while not found and time.monotonic() - began < 1.5:
            time.sleep(0.01)
        watch.unguard()
    assert bool(found) == training
    assert begun == [True] * training
    if training:
        assert time.monotonic() - began < 1
        assert not found[0].waiting
        assert f"({HERE}:" in str(found[0])
        assert "in test_only_one_that_trains_is_said_to_hang" in (tmp_path / "log").read_text()


# ---- what ended a start


def test_the_first_error_is_the_cause_unless_it_only_lost_another() -> None:
    lost = word(0, 1.0, step=7, lost=True)
    crash, later = word(1, 2.0, step=6), word(2, 3.0, kind="oom")
    first = first_error(store_of(lost, crash, later), 3)
    assert first is not None
    assert (first["rank"], first["silent"]) == (1, [])
    assert (first["step"], first["samples"]) == (7, 448)
    first = first_error(store_of(lost, later), 3)
    assert first is not None
    assert first["kind"] == "oom"


def test_ranks_without_a_word_are_named() -> None:
    first = first_error(store_of(word(0, 1.0, lost=True), word(2, 1.0, silent=True)), 3)
    assert first is not None
    assert first["cause"].startswith("no word from rank 1, 2 ")
    assert first["cause"].endswith("rank 0: what became of 0")
    assert first["silent"] == [1, 2]
    assert first["rank"] == 1


def test_the_first_word_of_a_rank_holds() -> None:
    store = store_of(word(0, 2.0, kind="oom"), word(0, 1.0))
    first = first_error(store, 1)
    assert first is not None
    assert first["kind"] == "oom"


def test_only_words_that_may_change_the_cause_are_waited_for() -> None:
    began = time.monotonic()
    await_words(store_of(word(1, 1.0)), 2)
    await_words(store_of(word(1, 1.0, lost=True)), 2, own={0})
    assert await_words(HashStore(), 2) is None
    assert time.monotonic() - began < 0.5
    await_words(store_of(word(1, 1.0, lost=True)), 2)
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
        (Fatal("step 3 isn't finite: out of memory"), "crashed", False),
        (UserError("out of memory"), "refused", False),
        (RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer"), "crashed", True),
        (Hangs("it waited", waiting=True), "crashed", True),
        (Hangs("it hung", waiting=False), "crashed", False),
    ],
)
def test_kinds_of_errors(error: Exception, kind: str, lost: bool) -> None:
    note = error_note(error, 0, "attempt", None, NOWHERE)
    assert (note["kind"], note["lost"]) == (kind, lost)
    assert note["again"] == (not isinstance(error, Fatal | UserError))
    assert (note["step"], note["samples"], note["per_gpu"]) == (5, 320, 0)


def test_a_data_loader_that_died_is_the_cause_wherever_it_is_noticed() -> None:
    killed = RuntimeError("DataLoader worker (pid 42) is killed by signal: Killed. ")
    for error in (killed, _raised("DataLoader worker (pid(s) 42) exited unexpectedly", killed)):
        cause = error_note(error, 0, "attempt", None, NOWHERE)["cause"]
        assert cause.startswith("DataLoader worker (pid 42) is killed by signal: Killed (Linux")
        assert HERE not in cause


def _raised(text: str, cause: Exception) -> Exception:
    try:
        raise RuntimeError(text) from cause
    except RuntimeError as error:
        return error


def test_an_errors_own_word_of_how_far_it_came_holds() -> None:
    error = MemoryError()
    error.step, error.samples, error.per_gpu = 7, 448, 32  # type: ignore[attr-defined]
    note = error_note(error, 0, "attempt", None, NOWHERE)
    assert (note["step"], note["samples"], note["per_gpu"]) == (7, 448, 32)
