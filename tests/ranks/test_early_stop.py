"""Ending early by stop.when, stop.at and stop.after: on all ranks at the same step, and the same after a resume."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from isobatch.conf.existing import extends
from isobatch.scaling.planning.automatic import configured
from tests.support.harness import Run, Runs, distance
from tests.support.lines import untimed
from tests.support.tasks import Counted

TASK = ("task=custom", "task._target_=tests.support.tasks.Counted", "lr.peak=0.05", "batch.global_size=40")
SAME = (*TASK, "duration=60st", "evaluate.every=5st", "log.every=4st", "batch.per_gpu=8")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Runs(tmp_path_factory.mktemp("whole"))(2, *SAME)


def losses(run: Run) -> dict[int, float]:
    """Return the values of evaluations by step."""
    return {line["step"]: line["val/loss"] for line in run.metrics() if "val/loss" in line}


def ended(run: Run) -> tuple[str, int]:
    assert all(end == run.ends[0] for end in run.ends)
    return run.ends[0]["state"], run.ends[0]["step"]


def reached_at(whole: Run) -> tuple[str, int]:
    """Return a target, and the step in the middle of the run at which it is first reached."""
    values = losses(whole)
    step = min(step for step in values if step >= 10 and all(values[step] < values[s] for s in values if s < step))
    return f"stop.at=val/loss<={values[step] * (1 + 1e-6)}", step


def test_a_target_ends_the_run_on_all_ranks(runs: Runs, whole: Run) -> None:
    target, step = reached_at(whole)
    run = runs(3, *SAME, target)
    assert ended(run) == ("finished", step)
    assert run.ends[0]["cause"].startswith("stop.at=val/loss")
    steps = [at for line in whole.metrics() if (at := line["step"]) <= step]
    assert [line["step"] for line in run.metrics()] == [*steps, step]
    assert (run.run.path / "final" / "model.safetensors").exists()
    assert (run.run.path / "checkpoints" / f"step-{step:08d}").exists()


@pytest.mark.parametrize("stop_at", [7, "at the deciding evaluation"])
def test_a_resume_decides_the_same(runs: Runs, stop_at: int | str) -> None:
    """Stopped before, or after the evaluation that decides but before the end was recorded."""
    patient = ("stop.when=val/loss:max", "stop.patience=4")  # the first value stays the best
    run = runs(2, *SAME, *patient)
    assert ended(run) == ("finished", 25)
    if isinstance(stop_at, int):
        again = runs(2, *SAME, *patient, stop_at=stop_at)
        assert ended(again) == ("stopped", stop_at)
    else:
        again = runs(2, *SAME, stop_at=25)  # without the rule
        assert ended(again) == ("stopped", 25)
    again = runs(1, *SAME, *patient, resume=again)
    assert ended(again) == ("finished", 25)
    assert distance(again.weights(), run.weights()) < 1e-6


def test_continues_when_other_stop_keys_are_given(runs: Runs, whole: Run) -> None:
    """As if it had never ended: the weights, and the lines of a run without stop keys."""
    target, step = reached_at(whole)
    run = runs(2, *SAME, target)
    path = run.run.path
    assert (run.metrics()[-1]["step"], "loss" in run.metrics()[-1]) == (step, True)
    same = configured([*SAME, f"run.dir={path}", target])
    assert not extends(path, same)
    config = configured([*SAME, f"run.dir={path}", "stop.at=null"])
    assert extends(path, config)
    longer = configured([f"run.dir={path}", "duration=100st"])
    assert not extends(path, longer), "its target ends it at once"
    (path / "metrics.jsonl").write_text(f"5\n{(content := (path / 'metrics.jsonl').read_text())}")
    assert not extends(path, longer), "a damaged line doesn't count"
    (path / "metrics.jsonl").write_text(content)
    assert extends(path, configured([f"run.dir={path}", "duration=100st", "stop.at=null"]))
    assert not extends(path, configured([*SAME, f"run.dir={path}", "stop.after=0.0001min"]))
    run = runs(2, *SAME, resume=run, extends=True)
    assert ended(run) == ("finished", 60)
    assert untimed(run.metrics()) == untimed(whole.metrics())
    assert distance(run.weights(), whole.weights()) == 0
    assert not extends(path, config)  # it reached its end
    assert not extends(path, same)


def test_time_ends_the_run_on_all_ranks_at_the_same_step(runs: Runs) -> None:
    """It is evaluated and saved where it ends; time counts over a stop, the pause between doesn't."""
    slow = (*SAME, "task._target_=tests.ranks.test_early_stop.SlowData", "duration=1000st", "stop.after=0.05min")
    run = runs(2, *slow, stop_at=10)
    assert ended(run) == ("stopped", 10)
    before = run.metrics()[-1]["time_s"]
    time.sleep(1)
    began = time.monotonic()
    run = runs(2, *slow, resume=run)
    assert time.monotonic() - began > 0.5 * (3 - before)
    state, step = ended(run)
    assert (state, run.ends[0]["cause"]) == ("finished", "stop.after=0.05min")
    assert 10 < step < 1000
    last = run.metrics()[-2:]
    assert [line["step"] for line in last] == [step, step]
    assert sorted("val/loss" in line for line in last) == [False, True]
    assert all(line["time_s"] >= 3 for line in last)


def test_time_is_the_cause_where_no_value_is(runs: Runs) -> None:
    """The last evaluation, which ``stop.after`` asks for, meets no other rule."""
    run = runs(2, *SAME, "stop.after=0.0001min", "stop.at=val/loss<=0", "stop.when=val/loss:min")
    assert ended(run) == ("finished", run.ends[0]["step"])
    assert run.ends[0]["step"] < 60
    assert run.ends[0]["cause"] == "stop.after=0.0001min"


class SlowData(Counted):
    def augment(self, sample: Any, generator: torch.Generator) -> Any:
        time.sleep(0.002)
        return sample


def test_a_missing_value_is_warned_of_and_never_ends_the_run(runs: Runs) -> None:
    run = runs(1, *SAME, "duration=20st", "stop.when=val/los:min", "stop.patience=1")
    assert ended(run) == ("finished", 20)
    warned = [event["text"] for event in run.events() if event["event"] == "warning"]
    assert len([text for text in warned if "stop.when" in text and "did you mean val/loss?" in text]) == 1


@pytest.mark.parametrize("key", ["stop.when=val/loss:min", "stop.at=val/loss<1"])
def test_needs_validation_data(runs: Runs, key: str) -> None:
    run = runs(1, *TASK, "task._target_=tests.ranks.test_early_stop.WithoutValidation", "duration=2st", key)
    assert run.ends[0]["raised"] == "UserError"
    assert key.partition("=")[0] in run.ends[0]["message"]


class WithoutValidation(Counted):
    val_data = None  # type: ignore[assignment]


def test_an_old_checkpoint_counts_from_there(runs: Runs, tmp_path: Path) -> None:
    """A checkpoint of a version that counted no time resumes, and the run says what is missing."""
    import json

    from isobatch.trainers.tensors.manifest import sealed

    run = runs(1, *SAME, stop_at=10)
    manifest = run.run.path / "checkpoints" / "step-00000010" / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["sha256"], content["tally"]
    manifest.write_bytes(sealed(json.dumps(content).encode()[1:]))
    run = runs(1, *SAME, resume=run)
    assert ended(run) == ("finished", 60)
    assert [event for event in run.events() if event["event"] == "warning" and "time_s" in event["text"]]
