"""Test that a run whose batch changes is the same on any hardware, and after a stop inside a stage."""

from __future__ import annotations

import pytest

from tests.support.harness import ROUNDING, Runs, distance

MOVING = (
    "task=custom", "task._target_=tests.support.tasks.Counted", "duration=960sa", "lr.base=0.05", "lr.base_batch=24",
    "evaluate.every=null", "log.every=1sa", "lr.warmup=100sa",
)  # fmt: skip
STAGES = "batch.schedule='0sa:24 240sa:48 480sa:96'"


@pytest.mark.parametrize("schedule", [STAGES, "batch.schedule='ramp from:16 to:100 over:700sa by:7'"])
def test_stages_are_the_same_on_all_cuts(runs: Runs, schedule: str) -> None:
    whole = runs(1, *MOVING, schedule)
    parts = runs(3, *MOVING, schedule, "batch.per_gpu=7")
    assert len({line["global_size"] for line in whole.metrics() if "loss" in line}) > 2
    assert distance(whole.weights(), parts.weights()) < ROUNDING
    assert parts.losses() == pytest.approx(whole.losses(), rel=1e-5)


@pytest.mark.parametrize("extra", [(), ("optimizer=adamw", "lr.base=0.003", "lr.rule=sde", "optimizer.args={}")])
def test_run_stopped_inside_a_stage_resumes(runs: Runs, extra: tuple[str, ...]) -> None:
    """Stop on 2 ranks in the second stage and resume on 3. Every step has the same samples, batch and LR."""
    whole = runs(2, *MOVING, STAGES, *extra)
    stopped = runs(2, *MOVING, STAGES, *extra, stop_at=12)
    assert [stopped.ends[0][name] for name in ("state", "step", "samples")] == ["stopped", 12, 240 + 2 * 48]
    resumed = runs(3, *MOVING, STAGES, *extra, "batch.per_gpu=10", resume=stopped)
    assert resumed.ends[0]["state"] == "finished"
    steps = [
        [(line["step"], line["samples"], line["global_size"], line["lr"]) for line in run.metrics() if "loss" in line]
        for run in (whole, resumed)
    ]
    assert steps[0] == steps[1]
    assert [step[2] for step in steps[0]] == [24] * 10 + [48] * 5 + [96] * 5
    assert distance(whole.weights(), resumed.weights()) < (1e-5 if extra else 1e-6)


def test_lr_of_a_stage_reaches_the_optimizer(runs: Runs) -> None:
    moved = runs(1, *MOVING, STAGES, "lr.decay=constant")
    held = runs(1, *MOVING, STAGES.replace("sa:96'", "sa:96 lr:hold'"), "lr.decay=constant")
    rates = [line["lr"] for line in moved.metrics() if "loss" in line]
    assert rates[5:] == pytest.approx([0.05] * 5 + [0.1] * 5 + [0.2] * 5)
    assert {line["lr"] for line in held.metrics()[6:] if "loss" in line} == {0.05}
    assert distance(moved.weights(), held.weights()) > 1e-3
