"""Move the batch by measurement: the same decisions on any cut, after a resume, and from the metrics alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from isobatch.scaling.control import Control
from isobatch.scaling.geometry import Cut
from isobatch.scaling.noise import Estimate
from isobatch.scaling.plan import Plan
from isobatch.scaling.report.plan_json import from_json
from isobatch.scaling.tuning.controllers import CONTROLLERS, Measurement, Memory, replay
from isobatch.trainers.engines.step_report import Update
from tests.support.harness import ADAM_ROUNDING, Run, Runs, distance
from tests.support.tasks import Counted

TASK = ("task=custom", "task._target_=tests.support.tasks.Counted", "task.args.dropout=0.1", "optimizer=adamw",
        "lr.peak=0.002", "batch.global_size=16", "duration=4000sa", "log.every=7st", "evaluate.every=null")  # fmt: skip
CONTROL = ("control.every=2%", "control.quantum=4", "batch.per_gpu=8", "ema=200sa")
BY = {
    "norm-test": ("control=norm-test", "control.most=128"),
    "noise": ("control=noise", "control.most=128", "control.lr=adascale"),
    "variance": ("control=variance", "control.most=100", "control.alpha=0.02", "control.lr=hold"),
    "goodput": ("control=goodput", "control.most=128", "control.half_speed=64", "lr.rule=sde"),
}


COURSES = {
    "at an odd sample": {100: 28, 160: 20},
    "larger, at the end": {330: 32},
    "smaller, at the end": {80: 32, 300: 20},
}


def script(course: dict[int, int], patch: pytest.MonkeyPatch) -> None:
    """Let ``control=noise`` ask for the batches of ``course`` from their samples on, also on forked ranks."""

    def ask(control: Control, memory: Memory, seen: Measurement) -> float:
        return max(((sample, size) for sample, size in course.items() if sample <= seen.samples), default=(0, 16))[1]

    patch.setitem(CONTROLLERS, "noise", CONTROLLERS["noise"]._replace(ask=ask))


def plan_of(run: Run) -> Plan:
    return from_json((run.run.path / "plan.json").read_text())


def decisions(run: Run) -> list[tuple[int, int]]:
    return [(one.start_sample, one.global_size) for one in plan_of(run).decisions]


def replayed(run: Run) -> list[tuple[int, int]]:
    plan = plan_of(run)
    assert plan.control
    assert plan.samples
    return replay(plan.control, plan.cut.global_size, run.metrics(), plan.samples)


@pytest.mark.parametrize("name", BY)
def test_the_course_is_the_same_on_any_cut_and_after_a_resume(runs: Runs, name: str) -> None:
    """Also with samples that are fetched ahead, whose plan changes while they wait."""
    whole = runs(1, *TASK, *CONTROL, *BY[name])
    assert whole.ends[0]["state"] == "finished", whole.log()
    found = decisions(whole)
    assert len(found) >= 2
    assert replayed(whole) == found
    events = [event for event in whole.events() if event["event"] == "batch"]
    assert [(event["start_sample"], event["size"]) for event in events] == found
    sizes = {line["global_size"] for line in whole.metrics() if "loss" in line}
    assert sizes == {16, *(size for _, size in found)}

    cut = runs(3, *TASK, *CONTROL, *BY[name], "batch.per_gpu=5", "data.workers=2", stop_at=40)
    assert {end["state"] for end in cut.ends} == {"stopped"}
    cut = runs(2, *TASK, *CONTROL, *BY[name], "engine=fsdp", resume=cut)
    assert cut.ends[0]["state"] == "finished", cut.log()
    assert decisions(cut) == found
    assert replayed(cut) == found
    assert distance(cut.weights(), whole.weights()) < ADAM_ROUNDING


@pytest.mark.parametrize("name", COURSES)
def test_samples_fetched_past_a_decision_are_fetched_again(
    runs: Runs, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four workers fetch eight passes ahead: far past a decision, and at the end of the run all of its steps."""
    script(COURSES[name], monkeypatch)
    short = (*TASK, *CONTROL, "control=noise", "control.every=16sa", "control.patience=1", "control.most=64",
             "batch.per_gpu=64", "duration=400sa")  # fmt: skip
    alone, ahead = runs(1, *short), runs(1, *short, "data.workers=4")
    assert ahead.ends[0]["state"] == "finished", ahead.log()
    assert decisions(alone)[-1][1] == list(COURSES[name].values())[-1]
    assert decisions(ahead) == decisions(alone)
    assert [line["samples"] for line in ahead.metrics()] == [line["samples"] for line in alone.metrics()]
    assert distance(ahead.weights(), alone.weights()) == 0


# ---- measurements that can't be used

FAST = (*TASK, *CONTROL, "control.every=16sa", "control.most=128", "duration=480sa", "log.every=1st")


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
        "task._target_=tests.ranks.test_control.Infinite",
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
