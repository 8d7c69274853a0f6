"""Test runs that are rejected by a worker, aren't finite, or are stopped, and the files that they leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from isobatch.conf.compose import compose
from isobatch.conf.rundir.directory import RunDir
from isobatch.conf.rundir.outcome import Outcome
from isobatch.scaling.errors import UserError
from isobatch.trainers.launch.failures import Starts, record_end
from isobatch.trainers.ranks.failure import Failure, Reached
from isobatch.trainers.ranks.session import raise_on_all
from isobatch.trainers.ranks.world import World
from isobatch.trainers.run import train
from tests.support.harness import Runs, in_ranks, session_of

TASK = (
    "task=custom",
    "task._target_=tests.support.tasks.Counted",
    "batch.global_size=20",
    "duration=10st",
    "lr.peak=0.01",
)

REFUSALS = {
    "task._target_=tests.support.tasks.Nothing": "tests.support.tasks has no Nothing",
    "task._target_=tests.taks.Counted": "No module named 'tests.taks'",
    "task._target_=tests.support.tasks.torch": "is a module, not a class",
    "task._target_=tests.support.tasks.WithoutTrainData": "lacks train_data() -> Dataset",
    "task._target_=tests.support.tasks.Streamed": "IterableDataset",
    "task._target_=tests.support.tasks.Empty": "0 samples",
    "task._target_=tests.support.tasks.MeanLoss": "it returned a tensor of shape []",
    "task._target_=tests.support.tasks.NoUnits": "step 1 (samples 0 to 19 of the run) has 0 units",
    "task.args.widht=3": "unexpected keyword argument 'widht'",
    "task.train_samples=499": "has 500 samples, but task.train_samples=499",
    "optimizer.args.nonsense=1": "nonsense",
    "model._target_=torch.nn.Lineal": "did you mean torch.nn.Linear",
    "model._target_=builtins.dict": "not a torch.nn.Module",
    "engine.config.bucket_cap=3": "bucket_cap",
    "checkpoint.best=val/loss:min task._target_=tests.ranks.test_evaluate_action.Unvalidated": "has no val_data()",
    "evaluate.first=true task._target_=tests.ranks.test_evaluate_action.Unvalidated": "evaluate.first=true needs",
    "data.workers=1 task._target_=tests.support.tasks.Streamed": "IterableDataset",
}


@pytest.mark.parametrize("override", REFUSALS)
def test_mistakes_are_rejected_on_every_rank_with_one_message(runs: Runs, override: str) -> None:
    """All ranks reject for the same reason, so none waits for another."""
    run = runs(2, *TASK, *override.split())
    assert [end["raised"] for end in run.ends] == ["UserError", "UserError"]
    assert run.ends[0]["message"] == run.ends[1]["message"]
    assert REFUSALS[override] in run.ends[0]["message"]
    assert not run.run.final.exists()


def test_nan_loss_names_step_and_samples(runs: Runs) -> None:
    """NaN on one rank ends all ranks."""
    run = runs(2, *TASK, "task._target_=tests.support.tasks.BecomesNaN")
    assert [end["raised"] for end in run.ends] == ["RunFailed", "RunFailed"]
    assert "step 3 (samples 40 to 59 of the run)" in run.ends[0]["message"]
    assert not run.run.final.exists()


def test_signal_to_one_rank_stops_all_at_the_same_step(runs: Runs) -> None:
    run = runs(3, *TASK, "batch.per_gpu=4", stop_at=4, by_rank=1)
    assert [end["state"] for end in run.ends] == ["stopped"] * 3
    assert {(end["step"], end["samples"], end["cause"]) for end in run.ends} == {(4, 80, "SIGTERM")}
    outcome = run.run.outcome()
    assert outcome
    assert (outcome.state, outcome.step) == ("stopped", 4)


def test_finished_directory_is_not_changed(runs: Runs) -> None:
    run = runs(1, *TASK)
    before = (run.run.path / "metrics.jsonl").read_bytes()
    again = runs(1, *TASK, resume=run)
    assert again.ends[0]["state"] == "finished"
    assert (run.run.path / "metrics.jsonl").read_bytes() == before


def test_second_launch_on_one_directory_is_rejected(runs: Runs) -> None:
    """The message names the first launch, and the second launch writes nothing."""
    directory = RunDir(runs.folder / "run-1")
    directory.path.mkdir()
    with directory.lock():
        run = runs(2, *TASK)
    assert all("another launch works in" in end["message"] and "pid" in end["message"] for end in run.ends)
    assert [file.name for file in directory.path.iterdir()] == ["lock"]


def test_folder_that_is_not_a_run_is_not_changed(runs: Runs) -> None:
    directory = runs.folder / "run-1" / "logs"
    directory.mkdir(parents=True)
    (directory / "precious.txt").write_text("years of work")
    run = runs(1, *TASK)
    assert "holds no run, but logs" in run.ends[0]["message"]
    assert (directory / "precious.txt").read_text() == "years of work"


def test_ranks_with_different_commands_are_rejected(runs: Runs) -> None:
    """All ranks name the keys, and nothing is written."""
    folder = runs.folder / "other"

    def body(world: World) -> Any:
        config = compose([*TASK, *(["seed=1", "evaluate.every=2ep"] if world.rank == 1 else [])])
        return train(session_of(config, world, run_dir=str(folder)), lambda run: None).state

    ends = in_ranks(3, body, runs.folder / "ranks")
    assert [end["raised"] for end in ends] == ["UserError"] * 3
    assert "rank 1 was started with evaluate.every=2ep (rank 0: 1ep), seed=1 (rank 0: 0)" in ends[0]["message"]
    assert not folder.exists()


def test_files_of_a_killed_start_do_not_block_the_next(runs: Runs) -> None:
    """A start that is killed at once may leave the lock, and parts of files under temporary names."""
    directory = runs.folder / "run-1"
    directory.mkdir()
    (directory / "lock").write_text("host x, pid 1")
    for name in (".config.yaml.77.tmp", ".outcome.json.77.tmp"):
        (directory / name).write_text("{")
    assert runs(1, *TASK).ends[0]["state"] == "finished"


def test_run_resumes_after_a_damaged_outcome_is_removed(runs: Runs) -> None:
    """The message for the damaged file advises it."""
    run = runs(1, *TASK, stop_at=5)
    file = run.run.path / "outcome.json"
    file.write_text(file.read_text()[:20])
    refused = runs(1, *TASK, resume=run).ends[0]["message"]
    assert "is damaged" in refused
    assert "move it away" in refused
    file.unlink()
    run = runs(1, *TASK, resume=run)
    assert run.ends[0]["state"] == "finished"
    assert run.events()[-2]["checkpoint"] == "step-00000005"


def test_outcome_is_overwritten_in_place_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call writes it, so that a kill leaves no half. A shorter outcome is padded."""
    run, sizes = RunDir(tmp_path), []
    run.write_outcome(Outcome("running", "", 0, 0, "a"))

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("isobatch.conf.rundir.directory.write_atomic", full)
    for cause in ("a longer cause", ""):
        run.write_outcome(end := Outcome("crashed", cause, 5, 100, "a"))
        assert run.outcome() == end
        sizes.append((tmp_path / "outcome.json").stat().st_size)
    assert sizes[0] == sizes[1]


def test_run_that_never_trained_keeps_its_config(runs: Runs) -> None:
    """Its folder alone resumes it, and a corrected command replaces the config."""
    run = runs(1, *TASK, "task.args.widht=3")
    assert "widht" in run.ends[0]["message"]
    by_folder = [f"run.dir='{run.run.path}'"]
    assert compose(by_folder).task.args == {"widht": 3}
    assert runs(1, *TASK, "task.args.kind=3", resume=run).ends[0]["raised"] == "UserError"
    assert compose(by_folder).task.args == {"kind": 3}
    assert runs(1, *TASK, resume=run).ends[0]["state"] == "finished"
    assert compose(by_folder).task.args == {}


def test_run_without_a_checkpoint_restarts_from_step_0(runs: Runs, capfd: pytest.CaptureFixture[str]) -> None:
    directory = RunDir(runs.folder / "run-1")
    directory.path.mkdir()
    directory.write_outcome(Outcome("crashed", "boom", 3, 60, "before"))
    (directory.path / "metrics.jsonl").write_text('{"step": 3}\n')
    run = runs(2, *TASK)
    assert run.ends[0]["state"] == "finished"
    assert "restarting from step 0: the last attempt ended before its first checkpoint" in capfd.readouterr().out
    assert [line["step"] for line in run.metrics()][:2] == [1, 10]


def test_a_run_directory_has_all_files_and_keys(runs: Runs) -> None:
    run = runs(2, *TASK)
    names = {path.name for path in run.run.path.iterdir()}
    assert names >= {"plan.json", "config.yaml", "metrics.jsonl", "events.jsonl", "outcome.json", "logs", "final"}
    start = json.loads((run.run.path / "events.jsonl").read_text().splitlines()[0])
    assert start.keys() >= {"event", "command", "commit", "versions", "hosts", "world_size"}
    last = run.metrics()[-2]
    assert last.keys() >= {"step", "samples", "epoch", "loss", "lr", "grad_norm", "global_size", "samples_per_s"}
    assert run.metrics()[-1].keys() == {"step", "samples", "epoch", "time_s", "evaluation_s", "val/loss"}


def test_ranks_gather_long_texts(runs: Runs) -> None:
    """Texts may be as long as a traceback, and have any characters."""

    def body(world: World) -> Any:
        text = "é" * 5000 if world.rank == 0 else ""
        return world.agree(text) == "é" * 5000, world.gather(f"rank {world.rank} ü")

    for agreed, gathered in in_ranks(3, body, runs.folder / "texts"):
        assert agreed
        assert gathered == ["rank 0 ü", "rank 1 ü", "rank 2 ü"]


def test_the_error_of_one_rank_is_raised_by_all_ranks_with_its_fields(runs: Runs) -> None:
    error = UserError("lr.peak=0 is no rate", "give another", "lr.peak", 0)

    def body(world: World) -> Any:
        raise_on_all(world, None)
        with pytest.raises(UserError) as raised:
            raise_on_all(world, error if world.rank == 1 else None)
        return list(raised.value.args)

    assert in_ranks(3, body, runs.folder / "errors") == [list(error.args)] * 3


@pytest.mark.parametrize(
    ("per_gpu", "granule", "half"), [(96, 32, 32), (64, 32, 32), (32, 32, 0), (33, 1, 16), (1, 1, 0)]
)
def test_out_of_memory_halves_whole_ghosts(per_gpu: int, granule: int, half: int) -> None:
    failure = Failure(0, "no memory", "oom", reached=Reached(3, 96, per_gpu, granule))
    verdict = Starts().decide(failure)
    assert (verdict.per_gpu_limit, verdict.retry) == (half, half > 0)
    cause = record_end(failure, None, "attempt").cause
    assert cause.endswith(f"; batch.per_gpu={half} needs less") is (half > 0)
    assert ("there is no smaller batch.per_gpu" in cause) is (half == 0)


def test_out_of_memory_in_a_probe_doesnt_bound_the_run() -> None:
    starts = Starts(restarts=0)
    verdict = starts.add(starts.decide(Failure(0, "no memory", "oom", reached=Reached(0, 0, 64, probe=True))))
    assert (verdict.retry, verdict.per_gpu_limit, starts.per_gpu_limit, starts.furthest) == (True, None, None, -1)


def test_out_of_memory_ends_a_bitwise_run() -> None:
    """A smaller micro-batch would change the run."""
    failure = Failure(0, "no memory", "oom", reached=Reached(3, 96, per_gpu=64, fixed=True))
    verdict = Starts().decide(failure)
    assert (verdict.failure.kind, verdict.per_gpu_limit, verdict.retry) == ("oom", 0, False)
    cause = record_end(failure, None, "attempt").cause
    assert "numerics=bitwise can't resume with fewer samples in a pass" in cause
    assert cause.endswith("in another run, batch.per_gpu=32 needs less")
