"""Test ``task.prepare()``, which one process of each machine runs in turn, and other methods that may be slow."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from isobatch.conf import terminal
from isobatch.conf.compose import compose
from isobatch.scaling.errors import UserError
from isobatch.trainers.loop.opening import open_task
from isobatch.trainers.ranks.signals import Stop
from isobatch.trainers.ranks.watch import Watch
from isobatch.trainers.tasks.prepare import prepare_data
from isobatch.trainers.tasks.task import Task, make_task
from tests.support import harness
from tests.support.harness import Runs, World, in_ranks, session_of

RANKS_PER_MACHINE = 2


def on_machines(world: World, ranks: int = RANKS_PER_MACHINE) -> World:
    """Return the world as on machines with a few ranks each."""
    return replace(world, local_rank=world.rank % ranks, local_size=ranks)


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 20
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.01)


class Downloads:
    """A task that records when each prepare() starts and ends, and draws random numbers in it."""

    def __init__(self, folder: Path, rank: int = 0, fails_on: int = -1, sleeps_s: float = 0.0) -> None:
        self.folder, self.rank, self.fails_on, self.sleeps_s = folder, rank, fails_on, sleeps_s

    def prepare(self) -> None:
        self.note("begins")
        (self.folder / "began").touch()
        torch.rand(3)
        if self.rank == self.fails_on:
            raise ValueError("the mirror is down")
        time.sleep(self.sleeps_s)
        self.note("ends")

    def note(self, event: str) -> None:
        with open(self.folder / "turns", "a") as file:
            file.write(f"{self.rank} {event}\n")


def test_one_process_of_each_machine_prepares_in_turn(tmp_path: Path) -> None:
    def body(world: World) -> Any:
        torch.manual_seed(7)
        stopped = prepare_data(Task(Downloads(tmp_path, world.rank, sleeps_s=0.1)), on_machines(world), Stop(), 5.0)
        return stopped, (tmp_path / "turns").read_text().split("\n"), torch.rand(1).item()

    (first, *others) = in_ranks(4, body, tmp_path / "ranks")
    assert first[:2] == ["", ["0 begins", "0 ends", "2 begins", "2 ends", ""]]
    assert others == [first] * 3  # the generators of all ranks are unchanged


def test_exception_ends_all_ranks(tmp_path: Path) -> None:
    """The rank's own exception is the cause. The other ranks report that the rank failed."""

    def body(world: World) -> Any:
        try:
            prepare_data(Task(Downloads(tmp_path, world.rank, fails_on=2)), on_machines(world), Stop(), 5.0)
        finally:
            (tmp_path / f"out-{world.rank}").touch()
            for rank in range(4) if world.rank == 0 else ():  # rank 0 holds the store
                wait_for(tmp_path / f"out-{rank}")

    ends = in_ranks(4, body, tmp_path / "ranks")
    assert ends[2] == {"raised": "ValueError", "message": "the mirror is down"}
    assert ends[:2] + ends[3:] == [{"raised": "Hangs", "message": "rank 2 failed in prepare()"}] * 3


@pytest.mark.parametrize("signalled", [0, 1, 2])
def test_signal_to_any_rank_stops_all(tmp_path: Path, signalled: int) -> None:
    """Rank 0's prepare() is interrupted by a signal to itself, to its machine, or to another machine."""

    def body(world: World) -> Any:
        stop = Stop().install()

        def ask() -> None:
            wait_for(tmp_path / "began")
            os.kill(os.getpid(), 15)

        if world.rank == signalled or (signalled == 1 and world.rank == 0):  # a launcher signals all its ranks
            threading.Thread(target=ask, daemon=True).start()
        return prepare_data(Task(Downloads(tmp_path, world.rank, sleeps_s=1000)), on_machines(world), stop, 30.0)

    assert in_ranks(3, body, tmp_path / "ranks") == ["SIGTERM"] * 3
    assert (tmp_path / "turns").read_text() == "0 begins\n"


def test_lost_machine_is_noticed(tmp_path: Path) -> None:
    def body(world: World) -> Any:
        if world.rank == 1:  # joins, and then disappears
            world.gather("0")
            wait_for(tmp_path / "noticed")
            return None
        try:
            return prepare_data(Task(Downloads(tmp_path)), on_machines(world, 1), Stop(), 0.5)
        finally:
            (tmp_path / "noticed").touch()

    end = in_ranks(2, body, tmp_path / "ranks")[0]
    assert end["message"] == "no heartbeat from rank 1, which prepares the data, for 0.5 s"


def test_prepare_with_arguments_is_rejected() -> None:
    class Wants:
        def prepare(self, folder: str) -> None: ...

    with pytest.raises(UserError, match=r"Wants.prepare\(\) can't be called without arguments.*'folder'"):
        prepare_data(Task(Wants()), World.alone(), Stop(), 5.0)


class Unhurried:
    """A task whose methods check that being slow doesn't count as a hang."""

    watch: Watch

    def check(self, method: str) -> None:
        self.watch.look()
        assert self.watch.look() == 0, f"{method} would count as a hang"

    def prepare(self) -> None:
        self.check("prepare()")

    def model(self) -> nn.Module:
        return nn.Linear(2, 1)

    def train_data(self) -> Any:
        self.check("train_data()")
        return TensorDataset(torch.ones(20, 2))

    def val_data(self) -> Any:
        self.check("val_data()")
        return TensorDataset(torch.ones(3, 2))

    def loss(self, model: nn.Module, batch: Any) -> Any:
        return model(batch[0]).square().sum(), len(batch[0])

    def summarise(self, totals: Any) -> dict[str, float]:
        self.check("summarise()")
        return {"seen": 1.0}


class WatchForTask(harness.StopAfter):
    """A watch that the task can see."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        Unhurried.watch = self


def test_slow_methods_are_not_a_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "StopAfter", WatchForTask)
    own = ("task=custom", "task._target_=tests.ranks.test_prepare.Unhurried", "lr.peak=0.01")
    run = Runs(tmp_path)(2, *own, "batch.global_size=4", "duration=2st")
    assert [end.get("message") for end in run.ends] == [None, None]
    assert run.metrics()[-1]["val/seen"] == 1.0


class Sleeps(Unhurried):
    slow = ""

    def check(self, method: str) -> None:
        time.sleep(0.3 * (method == self.slow))


@pytest.mark.parametrize("slow", ["prepare()", "train_data()"])
def test_only_data_that_is_slow_to_open_is_said_to_be_opened(
    slow: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "SLOW_S", 0.1)
    monkeypatch.setattr(Sleeps, "slow", slow)
    config = compose(["task=custom", f"task._target_={__name__}.Sleeps", "lr.peak=0.01"])
    open_task(session_of(config, World.alone()), make_task(config))
    expected = ["preparing the data …", *["opening the data …"] * (slow == "train_data()")]
    assert capsys.readouterr().out.splitlines() == expected


def test_stop_in_prepare_does_not_change_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command resumes it, with and without a checkpoint."""
    own = ("task=custom", "task._target_=tests.ranks.test_prepare.Interrupted", "lr.peak=0.01", "duration=4st")
    runs = Runs(tmp_path)
    monkeypatch.setattr(harness, "StopAfter", WatchForTask)
    monkeypatch.setenv("INTERRUPTED", "yes")
    first = runs(2, *own)
    assert [(end["state"], end["step"], end["cause"]) for end in first.ends] == [("stopped", 0, "SIGTERM")] * 2
    monkeypatch.setenv("INTERRUPTED", "")
    second = runs(2, *own, resume=first, stop_at=3)
    monkeypatch.setenv("INTERRUPTED", "yes")
    third = runs(2, *own, resume=second)
    assert second.ends[0]["step"] > 0
    assert third.ends == second.ends
    monkeypatch.setenv("INTERRUPTED", "")
    assert [end["state"] for end in runs(2, *own, resume=third).ends] == ["finished"] * 2


class Interrupted(Unhurried):
    def check(self, method: str) -> None: ...

    def prepare(self) -> None:
        if os.environ["INTERRUPTED"]:
            self.watch._stop.wanted = "SIGTERM"  # type: ignore[attr-defined]

    def loss(self, model: nn.Module, batch: Any) -> Any:
        return model(batch[0]).square().sum(), len(batch[0])
