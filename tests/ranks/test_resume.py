"""Test that a run that was stopped and resumed on other hardware ends as if it had never stopped."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from isobatch.conf.rundir.directory import RunDir
from isobatch.trainers.checkpoints.commit import commit
from isobatch.trainers.checkpoints.weights import find
from isobatch.trainers.loop.readback import DelayedReadback
from isobatch.trainers.tensors.manifest import read
from tests.faults.hostile import edit
from tests.support.harness import ROUNDING, Run, Runs, distance
from tests.support.lines import untimed

TASK = (
    "task=custom", "task._target_=tests.support.tasks.Slow", "batch.global_size=20", "duration=3ep", "lr.peak=0.05",
    "evaluate.every=7st", "log.every=1st",
)  # fmt: skip
STEPS = 75  # 3 epochs of 500 samples
FEWER = (*TASK, "task.args.samples=200")  # 10 steps an epoch


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], Run]:
    """Return runs by (world, *overrides), and stopped runs by (world, *overrides, step). Each is trained once."""
    runs, found = Runs(tmp_path_factory.mktemp("whole")), {}

    class Whole(dict):  # type: ignore[type-arg]
        def __missing__(self, key: Any) -> Run:
            *given, stop_at = key if isinstance(key[-1], int) else (*key, None)
            self[key] = runs(*given, stop_at=stop_at)
            return self[key]

    return Whole(found)


def lines(run: Run) -> list[dict[str, Any]]:
    """Return the metrics without times."""
    return untimed(run.metrics())


def bitwise_equal(a: Run, b: Run) -> bool:
    return all(torch.equal(a.weights()[name], b.weights()[name]) for name in a.weights())


@pytest.mark.parametrize(("world", "optimizer"), [(1, "sgd"), (3, "adamw")])
def test_resumed_run_is_bitwise_equal_on_the_same_world(runs: Runs, whole: Any, world: int, optimizer: str) -> None:
    """The run is stopped twice in an epoch. Compare weights, averages and every line of metrics."""
    overrides = (*FEWER, f"optimizer={optimizer}", "ema=100sa", "batch.per_gpu=4")
    run = runs(world, *overrides, stop_at=13)
    assert run.ends[0] == {"state": "stopped", "step": 13, "samples": 260, "cause": "SIGTERM"}
    run = runs(world, *overrides, stop_at=22, by_rank=world - 1, resume=run)
    run = runs(world, *overrides, resume=run)
    assert run.ends[0]["state"] == "finished"
    uninterrupted = whole[(world, *overrides)]
    assert bitwise_equal(run, uninterrupted)
    assert lines(run) == lines(uninterrupted)


CUTS = [(1, ()), (2, ("batch.per_gpu=3",)), (4, ()), (3, ("batch.accumulation=2",)), (2, ("data.workers=1",))]


@pytest.mark.parametrize(("world", "overrides"), CUTS, ids=lambda value: str(value))
def test_resumed_run_is_equal_to_rounding_on_other_worlds(runs: Runs, whole: Any, world: int, overrides: Any) -> None:
    stopped = whole[(3, *FEWER, 13)]
    shutil.copytree(stopped.run.path, runs.folder / "run")
    run = runs(world, *FEWER, *overrides, resume=Run(RunDir(runs.folder / "run"), []))
    uninterrupted = whole[(3, *FEWER)]
    assert distance(run.weights(), uninterrupted.weights()) < ROUNDING
    actual, expected = lines(run), lines(uninterrupted)
    assert [line["step"] for line in actual] == [line["step"] for line in expected]
    for line, other in zip(actual, expected, strict=True):
        assert line == pytest.approx(other, rel=1e-4)


def test_every_sample_is_used_once_per_epoch_over_stops_and_worlds(runs: Runs, tmp_path: Path) -> None:
    """The task records the samples in a file of each rank."""
    seen = tmp_path / "seen"
    seen.mkdir()
    task = (
        *TASK,
        "task._target_=tests.support.tasks.RecordsSamples",
        f"task.args.folder={seen}",
        "data.fingerprint=false",
    )
    run = runs(3, *task, stop_at=17)
    run = runs(2, *task, stop_at=33, resume=run)
    run = runs(1, *task, resume=run)
    rows = [int(row) for file in seen.iterdir() for row in file.read_text().split()]
    assert sorted(rows) == sorted(3 * list(range(500)))


def test_global_batch_that_was_a_product_is_kept(runs: Runs) -> None:
    """The per-GPU batch and the accumulation on 2 ranks gave the global batch, which the run keeps on 3 ranks."""
    product = [part for part in TASK if "global_size" not in part] + ["batch.per_gpu=5", "batch.accumulation=2"]
    run = runs(2, *product, stop_at=10)
    run = runs(3, *product, resume=run)
    assert {line["global_size"] for line in run.metrics() if "loss" in line} == {20}
    assert run.ends[0]["step"] == STEPS


# ---- saves


def steps_kept(run: Run) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in run.run.checkpoints.glob("step-*"))


def test_the_newest_and_the_best_checkpoints_are_kept(runs: Runs) -> None:
    run = runs(2, *TASK, "checkpoint.every=10st", "checkpoint.keep=3", "checkpoint.best=val/loss:min")
    values = {line["step"]: line["val/loss"] for line in run.metrics() if "val/loss" in line}
    best = min(values, key=lambda step: values[step])
    assert set(steps_kept(run)) == {60, 70, 75, best}
    assert (run.run.checkpoints / "best").resolve().name == f"step-{best:08d}"


def test_checkpoints_are_saved_by_time(runs: Runs) -> None:
    """Rank 0's clock decides for all ranks."""
    run = runs(
        2, *TASK, "task._target_=tests.support.tasks.Counted", "checkpoint.every=0.001min", "checkpoint.keep=1000"
    )
    assert steps_kept(run)[-1] == STEPS
    assert len(steps_kept(run)) >= 2


@pytest.mark.parametrize("every", ["1ep", "500sa", "25st"])
def test_checkpoints_are_saved_by_epochs_samples_or_steps(runs: Runs, every: str) -> None:
    run = runs(1, *TASK, "task._target_=tests.support.tasks.Counted", f"checkpoint.every={every}", "checkpoint.keep=9")
    assert steps_kept(run) == [25, 50, 75]


def test_checkpoints_along_the_run_are_kept_whatever_stops_it(runs: Runs) -> None:
    """The steps that end at or after a multiple of 330 of the 1,500 samples, and the newest and the best."""
    task = (*TASK, "checkpoint.every=10st", "checkpoint.keep=1", "checkpoint.keep_every=22%")
    run = runs(2, *task, "checkpoint.best=val/loss:min", stop_at=36)
    assert {17, 33} < set(steps_kept(run))
    run = runs(1, *task, resume=run)
    best = int((run.run.checkpoints / "best").resolve().name.removeprefix("step-"))
    assert set(steps_kept(run)) == {17, 33, 50, 66, STEPS, best}
    assert read(run.run.checkpoints / "step-00000033").header.kept


class OneStepLate(DelayedReadback):
    """A readback like an accelerator's, where the result of a step arrives with the next step."""

    before: Any = None

    def read(self, *step: Any) -> Any:
        before, self.before = self.before, super().read(*step)
        return before

    def flush(self) -> Any:
        before, self.before = self.before, None
        return before


def test_late_requests_are_handled_in_steps_that_wait_for_results(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock asks for a save in step 14, which is evaluated. A signal asks for a stop in step 17, which is saved."""
    due = iter([False] * 13 + [True] + [False] * 99)
    monkeypatch.setattr("isobatch.trainers.run.DelayedReadback", OneStepLate)
    monkeypatch.setattr("isobatch.trainers.run.Saver.due", lambda _: next(due))
    run = runs(2, *TASK, "checkpoint.every=17st", stop_at=17)
    assert steps_kept(run) == [14, 17]


def test_only_the_end_is_saved_if_every_is_null(runs: Runs) -> None:
    assert steps_kept(runs(1, *TASK, "checkpoint.every=null")) == [STEPS]


def test_finished_run_is_extended_to_a_longer_duration(runs: Runs, capfd: pytest.CaptureFixture[str]) -> None:
    run = runs(2, *TASK)
    final = run.weights()
    file = run.run.path / "metrics.jsonl"
    file.write_text(marked := file.read_text().replace('{"step": 75, ', '{"step": 75, "mark": 1, '))
    run = runs(1, *TASK, "duration=4ep", resume=run, extends=True)
    assert run.ends[0] == {"state": "finished", "step": 100, "samples": 2000, "cause": ""}
    assert [line["step"] for line in run.metrics() if "loss" in line] == list(range(1, 101))
    assert file.read_text().startswith(marked)  # the last evaluation isn't repeated
    assert distance(run.weights(), final) > 0
    assert "the learning rate changes from" in capfd.readouterr().out
    stopped = runs(1, *TASK, "duration=5ep", stop_at=110, resume=run, extends=True)
    assert find(str(stopped.run.path)).name == "step-00000110"  # final/ belongs to the shorter run


# ---- damaged and missing checkpoints


def test_damaged_checkpoint_is_skipped_for_the_previous_one(runs: Runs, capfd: pytest.CaptureFixture[str]) -> None:
    run = runs(2, *TASK, "checkpoint.every=10st", "checkpoint.keep=3", stop_at=25)
    uninterrupted = runs(2, *TASK)
    part = run.run.checkpoints / "step-00000025" / "rank-00001.safetensors"
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    # The manifest gets a new checksum, so that only its values are wrong.
    edit(run.run.checkpoints / "step-00000020", lambda saved: saved["values"]["optim/groups"][0].update(momentum="x"))
    run = runs(2, *TASK, resume=run)
    out = capfd.readouterr().out
    assert "checkpoint step-00000025 is skipped: rank-00001.safetensors" in out
    assert "checkpoint step-00000020 is skipped: optim/groups has momentum='x' in group 0" in out
    assert "resuming from step 10 of 75" in out
    assert bitwise_equal(run, uninterrupted)
    assert lines(run) == lines(uninterrupted)


def test_skipped_checkpoint_is_not_used_later(runs: Runs) -> None:
    """A file of the newest checkpoint is missing at one start, and is back at the next."""
    run = runs(2, *TASK, "checkpoint.every=10st", stop_at=25)
    file = run.run.checkpoints / "step-00000025" / "rank-00001.safetensors"
    content = file.read_bytes()
    file.unlink()
    run = runs(2, *TASK, stop_at=23, resume=run)
    assert steps_kept(run) == [20, 23]
    (kept,) = (path.parent for path in run.run.checkpoints.rglob("step-00000025/manifest.json"))
    (kept / file.name).write_bytes(content)
    run = runs(2, *TASK, resume=run)
    assert [line["step"] for line in run.metrics() if "loss" in line] == list(range(1, STEPS + 1))
    assert [event["checkpoint"] for event in run.events() if event["event"] == "passed_over"] == [kept.name]


def test_earlier_checkpoint_replaces_a_skipped_best_one(runs: Runs) -> None:
    """It is the best until the step of the skipped checkpoint is trained again."""
    task = (*TASK, "evaluate.every=5st", "checkpoint.every=null", "checkpoint.keep=3", "checkpoint.best=val/loss:min")
    run = runs(1, *task, stop_at=12)
    best = run.run.checkpoints / "best"
    assert (best.resolve().name, steps_kept(run)) == ("step-00000010", [5, 10, 12])
    for step in (10, 12):
        (run.run.checkpoints / f"step-{step:08d}/rank-00000.safetensors").write_bytes(b"")
    run = runs(1, *task, stop_at=7, resume=run)
    assert (best.resolve().name, steps_kept(run)) == ("step-00000005", [5, 7])
    run = runs(1, *task, stop_at=12, resume=run)
    assert best.resolve().name == "step-00000010"
    assert find(str(best)) == best.resolve()


def test_failed_last_save_can_be_repeated(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """With on_error=stop the run crashes, and the same command finishes it."""
    task = (*TASK, "checkpoint.every=60st", "checkpoint.on_error=stop")

    def full(run: RunDir, step: int, *_: Any, **options: Any) -> list[str]:
        if step == STEPS:
            raise OSError(errno.ENOSPC, "No space left on device")
        return commit(run, step, *_, **options)

    with monkeypatch.context() as patched:
        patched.setattr("isobatch.trainers.checkpoints.saver.commit", full)
        run = runs(2, *task)
        assert [end["raised"] for end in run.ends] == ["RunFailed"] * 2
        assert f"step {STEPS}, at which to end, can't be saved: " in run.ends[0]["message"]
        assert not run.run.final.exists()
        other = runs(2, *TASK)
        assert other.ends[0]["state"] == "finished"
    run = runs(2, *task, resume=run)
    assert run.ends[0]["state"] == "finished"
    assert bitwise_equal(run, other)


def test_run_without_a_valid_checkpoint_is_rejected_and_not_overwritten(runs: Runs) -> None:
    run = runs(2, *TASK, "checkpoint.every=10st", stop_at=25)
    for manifest in run.run.checkpoints.glob("*/manifest.json"):
        manifest.write_text(manifest.read_text()[:-100])
    before = {path: path.read_bytes() for path in run.run.path.rglob("*") if path.is_file()}
    again = runs(1, *TASK, resume=run)
    assert again.ends[0]["raised"] == "UserError"
    assert "step-00000025" in again.ends[0]["message"]
    advice = "repair one, restore the model that they were saved from, or start another run with run.new=true"
    assert advice in again.ends[0]["message"]
    changed = {path.name for path, content in before.items() if path.read_bytes() != content}
    assert changed <= {"outcome.json", "events.jsonl", "lock", ".owner"}


def test_missing_checkpoints_are_reported(runs: Runs) -> None:
    """A run that has saved never silently restarts from step 0."""
    run = runs(1, *TASK, stop_at=5)
    shutil.rmtree(run.run.checkpoints)
    metrics = run.metrics()
    refused = runs(1, *TASK, resume=run).ends[0]
    assert refused["raised"] == "UserError"
    assert "no checkpoint, but step 5 was saved there" in refused["message"]
    assert run.metrics() == metrics


def test_changed_data_is_rejected_with_both_values(runs: Runs, tmp_path: Path) -> None:
    """Test another length, and the same length with other values. data.fingerprint=false allows the second."""
    file = tmp_path / "data.npy"
    data = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    np.save(file, data)
    task = (*TASK, "task._target_=tests.support.tasks.FromFile", f"task.args={{file: '{file}'}}", "evaluate.every=null")
    run = runs(1, *task, stop_at=5)
    fingerprint = json.loads((run.run.checkpoints / "step-00000005/manifest.json").read_text())["fingerprint"]
    np.save(file, data[:-1])
    refused = runs(2, *task, resume=run).ends[0]
    assert refused["raised"] == "UserError"
    assert "has 39 samples, but had 40" in refused["message"]
    np.save(file, data + 1)
    refused = runs(2, *task, resume=run).ends[0]
    assert refused["raised"] == "UserError"
    assert fingerprint in refused["message"]
    assert runs(2, *task, "data.fingerprint=false", resume=run).ends[0]["state"] == "finished"


def test_metrics_beyond_the_checkpoint_are_dropped(runs: Runs) -> None:
    """This includes half a line of a process that was killed while it wrote."""
    run = runs(1, *TASK, stop_at=5)
    file = run.run.path / "metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 6, "loss": 1}\n{"step": 7, "lo')
    run = runs(1, *TASK, resume=run)
    assert [line["step"] for line in run.metrics() if "loss" in line] == list(range(1, STEPS + 1))


# ---- steps that aren't finite


def test_nonfinite_step_is_skipped_on_all_ranks(runs: Runs) -> None:
    """A NaN on one rank leaves all weights unchanged. The skip is counted and reported."""
    task = (
        *TASK,
        "task._target_=tests.support.tasks.BecomesNaN",
        "on_nonfinite=skip",
        "checkpoint.every=1st",
        "checkpoint.keep=9",
    )
    run = runs(2, *task, stop_at=4)
    assert run.ends[0]["state"] == "stopped"
    three, two = (reader_of(run, step) for step in (3, 2))
    for name in three:
        assert torch.equal(three[name], two[name]), name
    (skip,) = [event for event in run.events() if event["event"] == "skip"]
    assert (skip["step"], skip["skipped"]) == (3, 1)
    assert [line.get("skipped") for line in run.metrics() if "loss" in line] == [None, None, 1, 1]


def test_run_with_only_skipped_steps_fails(runs: Runs) -> None:
    run = runs(1, *TASK, "task._target_=tests.support.tasks.AlwaysNaN", "on_nonfinite=skip")
    assert run.ends[0]["raised"] == "RunFailed"
    assert "none of the last 20 steps was finite" in run.ends[0]["message"]
    run = runs(1, *TASK, "task._target_=tests.support.tasks.AlwaysNaN", "on_nonfinite=skip", "duration=3st")
    assert "none of the last 3 steps was finite" in run.ends[0]["message"]


def reader_of(run: Run, step: int) -> dict[str, torch.Tensor]:
    from isobatch.trainers.tensors.manifest import read
    from isobatch.trainers.tensors.slices import Reader

    reader = Reader(read(run.run.checkpoints / f"step-{step:08d}"))
    return {name: reader.whole(name) for name in reader.tensors if name.startswith("model/")}


@pytest.mark.parametrize(("limit", "count"), [(0, 1), (1000, 0)])
def test_save_too_slow_for_the_scheduler_is_reported_once(runs: Runs, limit: float, count: int) -> None:
    run = runs(2, *TASK, "duration=10st", "checkpoint.every=4st", kill_wait_s=limit)
    warnings = [event for event in run.events() if "KillWait" in event.get("text", "")]
    assert len(warnings) == count
