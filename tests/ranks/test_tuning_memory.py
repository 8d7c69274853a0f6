"""Test batch.per_gpu=auto and the memory part of action=tune on real steps, and the estimate against real peaks."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from isobatch.scaling.planning.automatic import configured
from isobatch.scaling.planning.resolve import resolve
from isobatch.scaling.tuning.memory import Probe
from isobatch.trainers.tasks.task import Task
from isobatch.trainers.tuning.estimate import Subject, trace
from isobatch.trainers.tuning.journal import Journal
from isobatch.trainers.tuning.meter import cgroup_limits, groups, oom_kills
from isobatch.trainers.tuning.samples import LargeBatches
from tests.support.harness import Run, Runs

NAME = "tests.ranks.test_tuning_memory"
QUICK = ("task=custom", "duration=4st", "lr.peak=0.01", "evaluate.every=null", "log.every=1st", "optimizer=adamw")
LEAST = 24  # samples for which Fragile's memory suffices


class Normed:
    """A net with BatchNorm and dropout, and a task with a counter, all of which a probe moves."""

    def __init__(self) -> None:
        self.calls = 0

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))

    def train_data(self) -> TensorDataset:
        drawn = torch.Generator().manual_seed(1)
        return TensorDataset(torch.randn(90, 6, generator=drawn), torch.randint(0, 3, (90,), generator=drawn))

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        self.calls += 1
        inputs, labels = batch
        scale = 1 + 1e-4 * self.calls
        return scale * nn.functional.cross_entropy(model(inputs), labels, reduction="sum"), len(labels)


class Fragile(Normed):
    """A task for which memory runs out on rank 1 only."""

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        if len(batch[0]) > LEAST and os.environ["RANK"] == "1":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: a test")
        return super().loss(model, batch)


class Broken(Normed):
    """A task with an error on rank 1 that has nothing to do with memory."""

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        if len(batch[0]) > 2 and os.environ["RANK"] == "1":
            raise ValueError("a test")
        return super().loss(model, batch)


class Spoiling(Normed):
    """A task that puts a folder in the place of ``file`` while a size is probed."""

    file = Path()

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        self.file.mkdir(parents=True, exist_ok=True)
        return super().loss(model, batch)


def task(name: str) -> str:
    return f"task._target_={NAME}.{name}"


def checkpoint_of(run: Run) -> dict[str, str]:
    """Return the hashes of the tensors in the last checkpoint: weights, buffers and the optimizer's state."""
    (folder,) = (run.run.path / "checkpoints").iterdir()
    files = sorted(folder.glob("*.safetensors"))
    assert files
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize("engine", ["engine=ddp", "engine=fsdp"])
def test_a_measured_run_is_the_run_with_that_number_given(runs: Runs, engine: str) -> None:
    options = (*QUICK, task("Normed"), engine, "batch.global_size=30", "device=cpu")
    measured, given = (runs(2, *options, f"batch.per_gpu={size}") for size in ("auto", 15))
    stored = json.loads((measured.run.path / "tune" / "tune.json").read_text())["memory"]
    assert (stored["per_gpu"], stored["outcome"]) == (15, "cap")
    assert stored["per_gpu"] in [probe["per_gpu"] for probe in stored["probes"]]
    assert checkpoint_of(measured) == checkpoint_of(given)
    assert measured.losses() == given.losses()
    assert measured.ends == given.ends
    assert not (measured.run.path / "tune" / "probing.json").exists()


def test_memory_that_runs_out_on_one_rank_doesnt_stop_the_others(runs: Runs) -> None:
    run = runs(2, *QUICK, task("Fragile"), "batch.global_size=80", "batch.per_gpu=auto", "device=cpu")
    assert [end["state"] for end in run.ends] == ["finished"] * 2
    stored = json.loads((run.run.path / "tune" / "tune.json").read_text())["memory"]
    peaks = {probe["per_gpu"]: probe["peak_gb"] for probe in stored["probes"]}
    assert peaks[40] is None
    assert 2 <= stored["per_gpu"] <= LEAST
    assert peaks[stored["per_gpu"]] is not None


@pytest.mark.parametrize("name", ["tune/tune.json", "tune"])
def test_a_result_that_cant_be_written_is_an_error_of_all_ranks(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    tuned = runs.folder / "run-1" / "tune"
    monkeypatch.setattr(Spoiling, "file", tuned / "tune.json" if "/" in name else runs.folder / "elsewhere")
    if "/" not in name:
        tuned.parent.mkdir()
        tuned.write_text("")  # a file in the place of the folder
    run = runs(2, *QUICK, task("Spoiling"), "batch.global_size=30", "batch.per_gpu=auto", "device=cpu")
    assert [(end["raised"], name in end["message"]) for end in run.ends] == [("UserError", True)] * 2


def test_an_error_of_the_task_says_nothing_about_memory(runs: Runs) -> None:
    run = runs(2, *QUICK, task("Broken"), "batch.global_size=80", "batch.per_gpu=auto", "device=cpu")
    assert [end["raised"] for end in run.ends] == ["RuntimeError", "ValueError"]
    noted = json.loads((run.run.path / "tune" / "probing.json").read_text())
    assert noted["begun"] is None
    assert [size for size, *_ in noted["probes"]] == [2]


KILLS = {"here": 3}


def begin_and_end(folder: Path, end: Callable[[], None], enter: Callable[[], None] = lambda: None) -> int:
    """Note 64 samples in a process that then ends by ``end``; return the signal that ended it."""
    if not (pid := os.fork()):
        try:
            enter()
            journal = Journal(folder, {"world": 1})
            journal.read(oom_kills())
            journal.begin(64, oom_kills())
            end()
        finally:
            os._exit(1)
    return os.WTERMSIG(os.waitpid(pid, 0)[1])


def known(folder: Path, kills: dict[str, int] | None = None, world: int = 1) -> list[Probe]:
    journal = Journal(folder, {"world": world})
    journal.read(oom_kills() if kills is None else kills)
    return journal.probes


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_size_whose_process_ended_for_another_reason_is_run_once_more(tmp_path: Path, number: int) -> None:
    def end() -> None:
        os.kill(os.getpid(), number)

    assert begin_and_end(tmp_path, end) == number
    assert known(tmp_path) == []
    assert begin_and_end(tmp_path, end) == number
    (probe,) = known(tmp_path)
    assert (probe.per_gpu, probe.peak) == (64, None)
    assert "ended twice" in probe.why
    assert known(tmp_path, world=2) == []  # a search under other conditions
    assert known(tmp_path) == [probe]  # it stays known


def test_a_size_in_which_the_kernel_killed_the_process_for_its_memory_doesnt_fit(tmp_path: Path) -> None:
    with limited_group(300_000_000) as enter:
        if enter is None:
            pytest.skip("control groups for memory can't be made here")

        def take_memory() -> None:
            held = [b"x" * 50_000_000 for _ in range(20)]
            assert not held

        assert begin_and_end(tmp_path, take_memory, enter) == signal.SIGKILL

        def read() -> None:
            (probe,) = known(tmp_path)
            assert (probe.per_gpu, probe.peak) == (64, None)
            assert "the kernel" in probe.why
            os.kill(os.getpid(), signal.SIGUSR1)

        assert begin_and_end(tmp_path / "unused", read, enter) == signal.SIGUSR1


@contextmanager
def limited_group(most: int) -> Iterator[Callable[[], None] | None]:
    """Make a control group with a limit in bytes; yield what moves this process into it, None if it can't be made."""
    (own, _), *_ = [*groups(), (Path("/nowhere"), "")]
    group = own / "isobatch-test"
    try:
        group.mkdir()
        limit = group / "memory.max"
        (limit if limit.exists() else group / "memory.limit_in_bytes").write_text(str(most))
        made = True
    except OSError:
        made = False

    def enter() -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))

    try:
        yield enter if made else None
    finally:
        with suppress(OSError):
            group.rmdir()


def test_only_a_kill_in_the_same_group_of_the_same_machine_counts(tmp_path: Path) -> None:
    for now, expected in (({"here": 3}, 0), ({"here": 4}, 1), ({"elsewhere": 9}, 0)):
        Journal(tmp_path, {"world": 1}).begin(64, {"here": 3})
        assert len(known(tmp_path, now)) == expected
        (tmp_path / "probing.json").unlink()


def test_a_smaller_size_starts_to_count_again(tmp_path: Path) -> None:
    for size, count in ((64, 0), (20, 0), (10, 1)):
        journal = Journal(tmp_path, {"world": 1})
        journal.read(KILLS)
        journal.begin(size, KILLS)
        assert len(known(tmp_path, KILLS)) == count, size


def test_a_rank_whose_memory_ran_out_notes_it(tmp_path: Path) -> None:
    leading, other = (Journal(tmp_path, {"world": 1}, writes=writes) for writes in (True, False))
    for journal in (leading, other):
        journal.begin(2, KILLS)
        journal.end(Probe(2, 100))
        journal.begin(64, KILLS)
    other.ran_out()
    assert known(tmp_path, KILLS) == [Probe(2, 100), Probe(64, None)]
    leading.close()
    assert not list(tmp_path.iterdir())


def test_a_trace_counts_every_byte_of_a_small_net() -> None:
    """Weights, gradients and Adam's moments are known; a pass keeps the inputs, and the outputs of each layer."""
    config = configured([*QUICK, task("Normed"), "batch.global_size=16"])
    own = Task(Normed())
    own.own.model = lambda: nn.Sequential(nn.Linear(100, 50, bias=False), nn.ReLU(), nn.Linear(50, 3, bias=False))
    own.own.train_data = lambda: TensorDataset(torch.randn(8, 100), torch.zeros(8, dtype=torch.int64))
    plan = resolve(config, 1, 8)
    batches = LargeBatches(own.train_data(), own, 0)
    found = trace(Subject(config, own, plan.peak, batches, 64, on_gpu=False))
    weights = 4 * (100 * 50 + 50 * 3)
    assert (found.parameters, found.gradients) == (weights, weights)
    assert found.optimizer == 2 * weights + 2 * 4  # and the step of each parameter
    slope = (found.passes[-1].held - found.passes[-2].held) / (found.passes[-1].per_gpu - found.passes[-2].per_gpu)
    kept = 4 * 100 + 8 + 4 * (50 + 50 + 3)  # inputs, label, both layers' outputs and the ReLU's
    assert kept <= slope <= kept + 4 * (3 + 3 + 50 + 1)  # log-softmax and gradients of activations
    assert not found.why_not


def test_a_loss_that_reads_numbers_is_traced() -> None:
    config = configured([*QUICK, task("Normed"), "batch.global_size=16"])
    own = Task(Normed())
    own.own.loss = lambda model, batch: (model(batch[0]).sum() * batch[1].float().mean().item(), len(batch[1]))
    found = trace(
        Subject(config, own, resolve(config, 1, 90).peak, LargeBatches(own.train_data(), own, 0), 4, on_gpu=False)
    )
    assert found.passes


def test_a_forward_that_needs_values_is_said() -> None:
    config = configured([*QUICK, task("Normed"), "batch.global_size=16"])
    own = Task(Normed())
    own.own.loss = lambda model, batch: (model(batch[0].numpy()).sum(), 1)
    found = trace(
        Subject(config, own, resolve(config, 1, 90).peak, LargeBatches(own.train_data(), own, 0), 4, on_gpu=False)
    )
    assert not found.passes
    assert found.why_not
    assert found.parameters


@pytest.mark.parametrize("version", [1, 2])
def test_limits_of_control_groups(tmp_path: Path, version: int) -> None:
    own, root = tmp_path / "cgroup", tmp_path / "fs"
    top = root / "memory" if version == 1 else root
    inner = top / "job" / "step"
    inner.mkdir(parents=True)
    limit, used = "memory.max", "memory.current"
    if version == 1:
        limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
    own.write_text("5:cpu,memory:/job/step\n" if version == 1 else "0::/job/step\n")
    (inner / limit).write_text("9223372036854771712\n" if version == 1 else "max\n")
    (inner / used).write_text("70\n")
    (inner.parent / limit).write_text("1000\n")
    (inner.parent / used).write_text("300\n")
    (inner.parent / "memory.stat").write_text("file 120\ncache 120\nshmem 20\n")
    assert list(cgroup_limits(root, own)) == [(1000, 200)]


@pytest.mark.parametrize(("version", "file"), [(1, "memory.oom_control"), (2, "memory.events")])
def test_kills_are_counted_in_the_control_group_or_else_on_the_machine(tmp_path: Path, version: int, file: str) -> None:
    own, whole = tmp_path / "cgroup", tmp_path / "vmstat"
    own.write_text("5:cpu,memory:/job\n" if version == 1 else "0::/job\n")
    whole.write_text("nr_free_pages 9\noom_kill 7\n")
    assert list(oom_kills(tmp_path, own, whole).values()) == [7]
    group = tmp_path / ("memory/job" if version == 1 else "job")
    group.mkdir(parents=True)
    (group / file).write_text("low 0\noom 5\noom_kill 2\n")
    ((name, count),) = oom_kills(tmp_path, own, whole).items()
    assert (name.split()[-1], count) == ("/job", 2)
