"""Test what a bandit learns of the critical batch, its trials, and the experience that it takes from another run."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest

from isobatch.conf.compose import compose
from isobatch.scaling.control import FEWEST, Belief, Control
from isobatch.scaling.errors import UserError
from isobatch.scaling.learned import Interval, belief, intervals_in, trial_of
from isobatch.scaling.plan import Plan
from isobatch.scaling.planning.resolve import resolve
from isobatch.scaling.report.plan_json import to_json
from isobatch.scaling.tuning.controllers import Measurement, Memory, first_memory, observed

EVERY = 200
VAGUE = Belief(128.0, 2.0)
BANDIT = ("task=mnist1d", "optimizer=adamw", "control=bandit", "batch.global_size=32", "batch.per_gpu=32")


def loss_at(progress: float, noise: float, random: Random) -> float:
    return 2.0 * progress**-0.4 * math.exp(random.gauss(0.0, noise))


def trained(control: Control, critical: float, count: int, noise: float = 0.0) -> Memory:
    """Return the memory after a run whose samples make progress as at this critical batch."""
    memory, progress, random = first_memory(32), 0.0, Random(0)
    size = memory.size
    for number in range(1, count + 1):
        step = EVERY / (1 + size / critical)
        progress += step
        loss = loss_at(progress - step / 2, noise, random)
        seen = Measurement(number * EVERY, size, 1.0, None, None, loss, None)
        size, memory = memory.size, observed(control, memory, seen, 10**9)  # a decision waits for an interval
    return memory


def control_of(**changes: Any) -> Control:
    fields: dict[str, Any] = {"least": 8, "most": 4096, "quantum": 1, "every": EVERY, "patience": 2, "lr": "rule"}
    return Control("bandit", **(fields | {"per": "second", "half_speed": 256.0, "prior": VAGUE} | changes))


@pytest.mark.parametrize("critical", [30.0, 128.0, 1000.0])
def test_the_critical_batch_is_learned_from_the_loss(critical: float) -> None:
    """Without noise the fit finds it within the grid's half doubling, wherever the prior is."""
    learned = belief(trained(control_of(), critical, 150).intervals, VAGUE)
    assert abs(math.log2(learned.critical / critical)) < 0.5
    assert learned.doublings < VAGUE.doublings


def test_a_noisy_loss_leaves_the_prior_nearly_as_it_is() -> None:
    """The noise of intervals of 200 samples hides the effect of the batch: a run learns a few tenths of a doubling."""
    learned = belief(trained(control_of(), 128.0, 100, noise=0.3).intervals, VAGUE)
    assert 1.0 < learned.doublings < VAGUE.doublings


@pytest.mark.parametrize(
    ("changes", "best"),
    [({}, math.sqrt(128 * 256)), ({"half_speed": 64.0}, math.sqrt(128 * 64)), ({"per": "sample"}, 128 / 4)],
)
def test_trials_are_above_and_below_the_best_batch(changes: dict[str, Any], best: float) -> None:
    """The first ones rest on the prior alone."""
    control, memory = control_of(**changes), Memory(round(best), best)
    sizes = []
    for number in range(1, 10):
        memory = observed(control, memory, Measurement(number * EVERY, memory.size, 1.0, None, None, 1.0, None), 10**9)
        sizes.append(memory.size)
    assert sizes[: FEWEST - 1] == [round(best)] * (FEWEST - 1)
    above, below = round(best * math.sqrt(2)), round(best / math.sqrt(2))
    assert sizes[FEWEST - 1 :] == [above, above, below, below, below]


def test_trials_grow_with_the_run() -> None:
    starts = [count for count in range(201) if trial_of(count)]
    assert starts[:4] == [5, 7, 9, 12]
    assert all(later >= 1.25 * start for start, later in pairwise(starts))
    assert [trial_of(start) for start in starts[:8]] == [1, -1, -1, 1, 1, -1, -1, 1]


@pytest.mark.parametrize("loss", [None, 0.0, -1.0])
def test_a_loss_without_a_logarithm_teaches_nothing(loss: float | None) -> None:
    memory = trained(control_of(), 128.0, 20)
    seen = Measurement(21 * EVERY, memory.size, 1.0, None, None, loss, None)
    assert observed(control_of(), memory, seen, 10**9).intervals == memory.intervals


def test_a_schedule_that_multiplies_the_batch_is_no_trial() -> None:
    seen = Measurement(EVERY, 256, 4.0, None, None, 1.0, None)
    assert observed(control_of(), first_memory(32), seen, 10**9).intervals == (Interval(EVERY, 1.0, 64.0),)


# ---- experience of another run


def plan_of(*overrides: str) -> Plan:
    return resolve(compose([*BANDIT, *overrides]), 1)


def write_run(folder: Path, critical: float = 1000.0, count: int = 150) -> None:
    """Write the files of a run that learned a critical batch."""
    folder.mkdir()
    (folder / "plan.json").write_text(to_json(plan_of()))
    lines = [
        {"step": number, "samples": one.samples, "loss": one.loss, "global_size": round(one.batch),
         "control/loss": one.loss, "control/growth": 1.0}
        for number, one in enumerate(trained(control_of(), critical, count).intervals, 1)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def prior_of(plan: Plan) -> Belief:
    assert plan.control
    assert plan.control.prior
    return plan.control.prior


def test_the_first_belief_is_vague() -> None:
    assert prior_of(plan_of()) == Belief(4 * 32.0, 2.0)


def test_a_run_starts_from_what_another_one_learned(tmp_path: Path) -> None:
    """It may still be off by a factor of 2, since it is another run."""
    write_run(tmp_path / "other")
    prior = prior_of(plan_of(f"control.prior={tmp_path / 'other'}"))
    assert 700 < prior.critical < 1400
    assert prior.doublings == 1.0


def test_a_run_that_has_begun_keeps_what_it_began_with(tmp_path: Path) -> None:
    """Also if the other run is gone."""
    write_run(tmp_path / "other")
    here = (f"control.prior={tmp_path / 'other'}", f"run.dir={tmp_path / 'here'}")
    plan = plan_of(*here)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "plan.json").write_text(to_json(plan))
    (tmp_path / "other" / "metrics.jsonl").unlink()
    assert prior_of(plan_of(*here)) == prior_of(plan)


@pytest.mark.parametrize("damage", ["nothing", "no lines", "no plan", "another controller", "half a prior"])
def test_a_run_without_experience_is_rejected(tmp_path: Path, damage: str) -> None:
    other = tmp_path / "other"
    if damage != "nothing":
        write_run(other, count=20)
        plan = json.loads((other / "plan.json").read_text())
        if damage == "no lines":
            (other / "metrics.jsonl").write_text('{"step": 1}\n{"samples":\n')
        elif damage == "no plan":
            (other / "plan.json").unlink()
        elif damage == "another controller":
            (other / "plan.json").write_text(json.dumps(plan | {"control": None}))
        else:
            (other / "plan.json").write_text(
                json.dumps(plan | {"control": {"prior": {"critical": -1, "doublings": 1}}})
            )
    with pytest.raises(UserError, match=r"isn't a run that control=bandit trained|doesn't exist") as raised:
        plan_of(f"control.prior={other}")
    assert raised.value.key == "control.prior"


def test_damaged_lines_are_left_out() -> None:
    good = {"samples": 200, "global_size": 32, "control/loss": 1.0, "control/growth": 1.0}
    bad = [{**good, "samples": 100}, {**good, "samples": 300, "control/loss": None}, {"samples": 400}]
    bad += [{**good, "samples": 300, "control/growth": 0.0}, {**good, "samples": 300, "control/loss": -1.0}]
    assert intervals_in([good, *bad, {**good, "samples": 400}]) == (Interval(200, 1.0, 32.0), Interval(400, 1.0, 32.0))
