"""Disturb runs whose batch moves by measurement: with numbers that aren't finite, kills, engines and late results."""

from __future__ import annotations

import math
import os
import signal
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from isobatch.actions import plan_from_checkpoint
from isobatch.conf.rundir.directory import RunDir
from isobatch.scaling.geometry import Cut
from isobatch.scaling.noise import Estimate
from isobatch.scaling.plan import Step
from isobatch.scaling.planning.automatic import configured
from isobatch.scaling.planning.resolve import resolve
from isobatch.trainers.engines.step_report import Update
from isobatch.trainers.loop.readback import DelayedReadback
from tests.ranks.test_control import FAST, decisions, replayed, script
from tests.support.harness import ADAM_ROUNDING, Run, Runs, distance
from tests.support.tasks import Counted

# ---- measurements that can't be used


def test_statistics_that_overflow_are_left_out_with_one_warning(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the loss and the gradient's norm are finite."""
    overflows = {
        4: (1e200, 1.0),
        5: (1.0, 1e200),
        7: (math.inf, math.inf),
        8: (math.nan, math.nan),
        9: (-math.inf, 0.0),
    }
    find, calls = Update.estimate, []

    def estimate(update: Update, cut: Cut) -> Estimate | None:
        calls.append(1)
        return Estimate(*overflows[len(calls)]) if len(calls) in overflows else find(update, cut)

    monkeypatch.setattr(Update, "estimate", estimate)
    run = runs(1, *FAST, "control=noise")
    assert run.ends[0].get("state") == "finished", run.log()
    measured = [line["step"] for line in run.metrics() if "control/size" in line]
    assert measured[:6] == [2, 3, 6, 10, 11, 12]  # Adam has no second moment before its first step
    assert ["overflow" in event["text"] for event in run.events() if event["event"] == "warning"] == [True]
    assert decisions(run) == replayed(run) != []
    assert all(np.isfinite(line["noise/trace"]) for line in run.metrics() if "control/size" in line)


def test_no_decision_comes_from_a_step_that_is_not_finite(runs: Runs) -> None:
    """The 5th of 30 steps has an infinite gradient in its first half, and is skipped."""
    bad = (
        "task._target_=tests.ranks.test_control_faults.Infinite",
        "on_nonfinite=skip",
        "control=noise",
        "control.patience=1",
    )
    clean, run = runs(1, *FAST, *bad, "+task.args.at=9999"), runs(1, *FAST, *bad)
    assert run.ends[0].get("state") == "finished", run.log()
    measured, of_clean = ([line["step"] for line in one.metrics() if "control/size" in line] for one in (run, clean))
    assert of_clean[:5] == [2, 3, 4, 5, 6]
    assert measured[:5] == [2, 3, 4, 6, 7]
    assert [line.get("skipped") for line in run.metrics() if line["step"] in (4, 5)] == [None, 1]
    assert decisions(clean)[0][0] == 112
    assert decisions(run)[0][0] == 128
    assert replayed(run) == decisions(run)


class Infinite(Counted):
    """``Counted``, with an infinite gradient and a finite loss for the samples from ``at`` on of the order."""

    def __init__(self, at: int = 64, **args: Any) -> None:
        super().__init__(**args)
        self.at, self.seen = at, 0

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        loss, units = super().loss(model, batch)
        first = self.seen <= self.at < self.seen + len(batch[0]) and model.training
        self.seen += len(batch[0]) * model.training
        weight = next(model.parameters())
        return (loss + torch.sqrt(weight - weight.detach()).sum() if first else loss), units


# ---- kills, engines and devices

CHOSEN = {80: 28, 160: 20, 260: 40}  # by ``script``, so all numerics and engines decide the same
SCRIPTED = (*FAST, "control=noise", "control.patience=1")
TIMES = {"time_s", "samples_per_s", "units_per_s", "data_wait", "memory_gb", "evaluation_s", "control/step_s"}


def lines_of(run: Run) -> list[dict[str, Any]]:
    return [{name: line[name] for name in line.keys() - TIMES} for line in run.metrics()]


class Killed(Counted):
    """``Counted``, whose process is killed after ``KILL_AT`` samples."""

    seen = 0

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        self.seen += len(batch[0])
        if self.seen > int(os.environ.get("KILL_AT", "100000")):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(model, batch)


def test_a_kill_between_a_decision_and_the_next_checkpoint_loses_nothing(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints after 160 and 320 samples; decisions after 112, 160 and 256, which take effect 16 samples later."""
    killed = (*FAST, "task._target_=tests.ranks.test_control_faults.Killed", "control=noise", "checkpoint.every=150sa")
    whole = runs(1, *killed)
    assert whole.ends[0].get("state") == "finished", whole.log()
    assert [start for start, _ in decisions(whole)] == [128, 176, 272]
    for at, taken in ((120, [128]), (300, [128, 176, 272])):
        monkeypatch.setenv("KILL_AT", str(at))
        with pytest.raises(FileNotFoundError):
            runs(1, *killed)
        monkeypatch.delenv("KILL_AT")
        there = Run(RunDir(runs.folder / f"run-{runs.count}"), [])
        assert [event["start_sample"] for event in there.events() if event["event"] == "batch"] == taken
        resumed = runs(1, *killed, resume=there)
        assert resumed.ends[0].get("state") == "finished", resumed.log()
        assert decisions(resumed) == decisions(whole) == replayed(resumed)
        assert lines_of(resumed) == lines_of(whole)
        assert distance(resumed.weights(), whole.weights()) == 0


def test_bitwise_runs_have_the_same_bits_and_decisions_on_any_ranks(runs: Runs) -> None:
    bits = (*FAST, "control=noise", "control.patience=1", "numerics=bitwise", "batch.per_gpu=5")
    one = runs(1, *bits)
    assert len(decisions(one)) > 1, one.log()
    for world in (2, 3):
        other = runs(world, *bits)
        assert decisions(other) == decisions(one)
        assert all(torch.equal(tensor, other.weights()[name]) for name, tensor in one.weights().items())


@pytest.mark.parametrize("engine", ["deepspeed", "accelerate"])
def test_other_engines_train_the_decided_course(runs: Runs, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On two ranks, whose passes per step change with the batch."""
    if engine == "accelerate":
        pytest.importorskip("accelerate")
    script(CHOSEN, monkeypatch)
    one = runs(1, *SCRIPTED)
    other = runs(2, *SCRIPTED, "batch.per_gpu=5", f"engine={engine}")
    assert other.ends[0].get("state") == "finished", (other.ends, other.log())
    assert [size for _, size in decisions(one)] == list(CHOSEN.values())
    assert decisions(other) == decisions(one)
    assert [line["samples"] for line in other.metrics()] == [line["samples"] for line in one.metrics()]
    assert distance(other.weights(), one.weights()) < ADAM_ROUNDING


@pytest.mark.parametrize("every", ["3sa", "50sa"])
def test_results_that_arrive_a_step_late_give_the_same_course(
    runs: Runs, every: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an accelerator, also with an interval that is shorter than a step."""
    now = DelayedReadback.read

    def late(self: Any, step: Step, total: Any, update: Any) -> Any:
        arrived, self._held = getattr(self, "_held", None), now(self, step, total, update)
        return arrived

    def flush(self: Any) -> Any:
        arrived, self._held = getattr(self, "_held", None), None
        return arrived

    course = (*FAST, "control=noise", "control.patience=1", f"control.every={every}")
    cpu = runs(1, *course)
    monkeypatch.setattr(DelayedReadback, "read", late)
    monkeypatch.setattr(DelayedReadback, "flush", flush)
    for options in ((), ("data.workers=3", "batch.per_gpu=64")):
        delayed = runs(1, *course, *options)
        assert delayed.ends[0].get("state") == "finished", delayed.log()
        assert decisions(delayed) == decisions(cpu) == replayed(delayed) != []
        assert distance(delayed.weights(), cpu.weights()) < ADAM_ROUNDING
        if not options:
            assert lines_of(delayed) == lines_of(cpu)


def test_a_plan_of_a_run_directory_has_its_decisions(runs: Runs) -> None:
    """Those of its newest checkpoint."""
    course = (*FAST, "control=noise", "control.patience=1")
    run = runs(1, *course, stop_at=14)
    config = configured(["data.workers=0", "check.contract=false", *course])
    plan = plan_from_checkpoint(resolve(config, 1), config, run.run)
    assert [(one.start_sample, one.global_size) for one in plan.decisions] == decisions(run) != []
    assert [stage.cut.global_size for stage in plan.stages][1:] == [size for _, size in decisions(run)]
