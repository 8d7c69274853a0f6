"""Move the batch by measurement: the same decisions on any cut, after a resume, and from the metrics alone."""

from __future__ import annotations

import pytest

from isobatch.scaling.control import Control
from isobatch.scaling.plan import Plan
from isobatch.scaling.report.plan_json import from_json
from isobatch.scaling.tuning.controllers import CONTROLLERS, Measurement, Memory, replay
from tests.support.harness import ADAM_ROUNDING, Run, Runs, distance

TASK = ("task=custom", "task._target_=tests.support.tasks.Counted", "task.args.dropout=0.1", "optimizer=adamw",
        "lr.peak=0.002", "batch.global_size=16", "duration=4000sa", "log.every=7st", "evaluate.every=null")  # fmt: skip
CONTROL = ("control.every=2%", "control.quantum=4", "batch.per_gpu=8", "ema=200sa")
FAST = (*TASK, *CONTROL, "control.every=16sa", "control.most=128", "duration=480sa", "log.every=1st")
BY = {
    "norm-test": ("control=norm-test", "control.most=128"),
    "noise": ("control=noise", "control.most=128", "control.lr=adascale"),
    "variance": ("control=variance", "control.most=100", "control.alpha=0.02", "control.lr=hold"),
    "goodput": ("control=goodput", "control.most=128", "control.half_speed=64", "lr.rule=sde"),
    "bandit": ("control=bandit", "control.most=128", "control.per=second", "control.half_speed=64"),
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
    return replay(plan.control, plan.cut.global_size, run.metrics())


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


def test_a_lengthened_run_keeps_its_decisions(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a replay, though a batch that the shorter run had no room for would fit in the longer one."""
    script({80: 28, 400: 60}, monkeypatch)
    course = (*FAST, "control=noise", "control.patience=1")
    run = runs(1, *course)
    assert decisions(run) == [(112, 28)]
    run = runs(2, *course, "duration=960sa", resume=run, extends=True)
    assert run.ends[0].get("samples", 0) >= 960, run.log()
    assert decisions(run)[0] == (112, 28)
    assert decisions(run)[1][0] > 504
    assert replayed(run) == decisions(run)


def test_only_steps_of_one_size_on_one_hardware_are_timed(runs: Runs) -> None:
    """The first ones of an attempt and of a stage wait for more than later ones; a replay forgets as the run does."""
    keys = (*TASK, *CONTROL, "control=goodput", "control.most=128", "control.lr=hold")
    run = runs(1, *keys, stop_at=60)
    run = runs(1, *keys, "batch.per_gpu=5", resume=run)
    assert run.ends[0]["state"] == "finished", run.log()
    lines = [line for line in run.metrics() if "control/size" in line]
    numbers = [line["control/hardware"] for line in lines]
    assert len(set(numbers)) == 2
    first = [index for index, number in enumerate(numbers) if index == 0 or number != numbers[index - 1]]
    resized = [
        index for index in range(1, len(lines)) if lines[index]["global_size"] != lines[index - 1]["global_size"]
    ]
    assert resized
    assert all(lines[index]["control/step_s"] is None for index in (*first, *resized))
    assert any(line["control/step_s"] for line in lines)
    assert replayed(run) == decisions(run)
