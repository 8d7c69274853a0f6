"""Test the parsing of batch schedules, and the steps of their plans."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from isobatch.conf.compose import compose
from isobatch.conf.identity import identity
from isobatch.conf.saved import dump
from isobatch.scaling.batch_schedule import BatchSchedule
from isobatch.scaling.errors import UserError
from isobatch.scaling.plan import Plan
from isobatch.scaling.planning.resolve import continued, resolve
from isobatch.scaling.report.plan_json import from_json, to_json
from isobatch.scaling.report.plan_table import table
from isobatch.scaling.schedule import samples_after

TASK = (
    "task.train_samples=10000", "task.tuned={sgd: {lr: 0.1, batch: 64}, adamw: {lr: 0.001, batch: 64}}",
    "duration=10ep", "lr.warmup=0",
)  # fmt: skip


def plan_of(schedule: str, *overrides: str, world: int = 1) -> Plan:
    return resolve(compose([*TASK, f"batch.schedule='{schedule}'", *overrides]), world)


def sizes(plan: Plan) -> list[tuple[int, int]]:
    """Return the start sample and the global batch of each stage."""
    return [(segment.start_sample, segment.global_size) for segment in plan.segments]


def walk(plan: Plan) -> list[tuple[int, int, float]]:
    """Return start, size and LR of every step, in the order of the loop."""
    found, sample = [], 0
    while step := plan.step_at(sample):
        assert step.index == len(found)
        found.append((step.start, step.stop - step.start, step.recipe.lr))
        sample = step.stop
    assert len(found) == plan.steps
    return found


def refusal(schedule: str, *overrides: str) -> str:
    with pytest.raises((UserError, ValueError)) as error:
        plan_of(schedule, *overrides)
    return str(error.value)


def test_stages_change_the_batch_and_the_lr() -> None:
    plan = plan_of("0sa:256 20000sa:512", "lr.decay=constant")
    assert sizes(plan) == [(0, 256), (20000, 512)]
    steps = walk(plan)
    assert {size for start, size, _ in steps if start < 20000} == {256}
    assert {size for start, size, _ in steps if start >= 20000} == {512}
    assert steps[79][0] == 20224  # the first step boundary at or after 20,000
    assert [lr for _, size, lr in steps] == pytest.approx([0.1 * size / 64 for _, size, _ in steps])
    assert sum(size for _, size, _ in steps) == 100_000 + (plan.added or 0)


@pytest.mark.parametrize(
    ("unit", "starts"), [("2ep", 20000), ("20%", 20000), ("50st", 50 * 32), ("2e4sa", 20000), ("320000tok", 20000)]
)
def test_stages_start_in_any_unit(unit: str, starts: int) -> None:
    plan = plan_of(f"0sa:32 {unit}:64", "task.units_per_sample=16")
    assert sizes(plan)[1] == (starts, 64)


def test_steps_are_counted_over_stages() -> None:
    plan = plan_of("0sa:32 100st:64 200st:128", "duration=600st", "lr.warmup=150st")
    assert sizes(plan) == [(0, 32), (3200, 64), (9600, 128)]
    assert (plan.steps, plan.added) == (600, 0)
    assert plan.schedule
    assert plan.schedule.warmup_samples == 100 * 32 + 50 * 64
    for steps in (0, 1, 99, 100, 101, 250, 600):
        assert samples_after(steps, sizes(plan)) == [*[start for start, _, _ in walk(plan)], plan.samples][steps]


def test_samples_after_steps_follow_the_plans_boundaries() -> None:
    """A stage starts at the end of a step. A stage that lies inside a step has no steps."""
    plan = plan_of("0sa:300 310sa:7 320sa:11 900sa:5", "duration=2000sa")
    starts = [start for start, _, _ in walk(plan)]
    assert [samples_after(steps, sizes(plan)) for steps in range(len(starts))] == starts


def test_hold_keeps_the_lr() -> None:
    held = plan_of("0sa:256 20000sa:512 lr:hold", "lr.decay=constant", "optimizer=adamw")
    assert [lr for _, _, lr in walk(held)] == pytest.approx([0.002] * (held.steps or 0))


def test_a_given_peak_is_that_of_the_first_stage() -> None:
    plan = plan_of("0sa:256 20000sa:512", "lr.peak=0.3", "lr.decay=constant")
    assert [stage.peak.lr for stage in plan.stages] == pytest.approx([0.3, 0.6])


def test_the_sde_rule_moves_the_betas_of_each_stage() -> None:
    plan = plan_of("0sa:64 20000sa:256", "optimizer=adamw", "lr.rule=sde")
    assert [stage.peak.betas for stage in plan.stages] == [(0.9, 0.999), (0.6, 0.996)]
    message = refusal("0sa:64 20000sa:1024", "optimizer=adamw", "lr.rule=sde")
    assert "639 samples" in message


def test_a_ramp_grows_by_a_quantum() -> None:
    """Increments are equally long, as in Megatron."""
    plan = plan_of("ramp from:32 to:128 over:30% by:32")
    assert sizes(plan) == [(0, 32), (10_000, 64), (20_000, 96), (30_000, 128)]
    plan = plan_of("ramp from:32 over:9000sa by:40", "batch.global_size=130")
    assert sizes(plan) == [(0, 32), (3000, 72), (6000, 112), (9000, 130)]


def test_the_curriculum_doubles_from_32_to_512_over_equal_parts() -> None:
    assert sizes(plan_of("curriculum")) == [(20_000 * k, 32 << k) for k in range(5)]
    assert sizes(plan_of("curriculum from:16 to:64", "batch.per_gpu=8")) == [(0, 16), (33334, 32), (66667, 64)]


@pytest.mark.parametrize("decay", ["cosine", "linear", "step"])
def test_doubling_replaces_the_decay(decay: str) -> None:
    """Where the LR would decay to η/f, the batch is f times larger and the LR stays (Smith et al. 2018)."""
    milestones = ("lr.milestones=[30%,60%,90%]", "lr.gamma=0.1") if decay == "step" else ()
    plan = plan_of("doubling to:1000", f"lr.decay={decay}", *milestones)
    usual = resolve(compose([*TASK, f"lr.decay={decay}", *milestones]), 1)
    assert plan.schedule
    assert usual.schedule
    factor = 10 if decay == "step" else 2
    assert [size for _, size in sizes(plan)] == [64 * factor**k for k in range(2 if decay == "step" else 4)]
    for start, size in sizes(plan)[1:]:
        assert usual.schedule.lr(start, 1.0) <= 64 / size * (1 + 1e-6) < usual.schedule.lr(start - 1, 1.0)
    last = sizes(plan)[-1][0]
    for start, size, lr in walk(plan):
        if start < last:
            assert lr == pytest.approx(0.1)
        elif decay == "linear":  # the last stage decays to the final LR
            assert lr == pytest.approx(0.1 * usual.schedule.lr(start, 1.0) * size / 64, rel=1e-3)
    assert usual.steps
    assert plan.steps
    assert plan.steps < 0.7 * usual.steps


def test_the_final_lr_of_the_table_is_that_of_the_last_step() -> None:
    plan = plan_of("doubling to:512", "lr.final=0.1")
    assert "then cosine decay to 0.0800" in " ".join(table(plan).split())
    assert walk(plan)[-1][2] == pytest.approx(0.08, rel=1e-2)
    milestones = ("lr.decay=step", "lr.milestones=[30%,60%,90%]")
    assert "then × 0.1 after 60,000, 90,000 samples" in " ".join(table(plan_of("doubling to:700", *milestones)).split())


def test_stages_without_a_step_are_dropped() -> None:
    plan = plan_of("0sa:64 100sa:128 101sa:256", "lr.decay=constant")
    assert [(stage.start, stage.cut.global_size) for stage in plan.stages] == [(0, 64), (128, 256)]
    plan = plan_of("0sa:1000 1100sa:1400", "duration=1500sa", "lr.decay=constant")
    assert [stage.start for stage in plan.stages] == [0]
    assert plan.steps == 2


def test_warmup_in_steps_counts_the_steps_of_the_stages() -> None:
    for schedule in ("0sa:32 20%:64", "0sa:32 2ep:64"):
        plan = plan_of(schedule, "lr.warmup=700st")
        assert plan.schedule
        assert plan.schedule.warmup_samples == 20_000 + 75 * 64


def test_doubling_ends_at_a_tenth_of_the_data() -> None:
    assert [size for _, size in sizes(plan_of("doubling"))] == [64, 128, 256, 512]  # the data has 10,000 samples


def test_seesaw_divides_the_lr_by_the_root() -> None:
    plan = plan_of("seesaw to:256", "optimizer=adamw")
    assert [stage.peak.lr for stage in plan.stages] == pytest.approx([0.001, 0.001 / math.sqrt(2), 0.0005])


def test_stages_are_the_same_run_on_other_hardware() -> None:
    plan = plan_of("curriculum", "batch.per_gpu=100")
    other = plan.dealt(7, 13)
    assert walk(other) == walk(plan)
    assert [stage.cut.accumulation for stage in other.stages] == [1, 1, 2, 3, 6]
    assert from_json(to_json(plan)) == plan


def test_every_stage_is_checked_before_the_start() -> None:
    plan_of("0sa:64 20000sa:90", "batch.even=true", "batch.per_gpu=16", world=2)
    with pytest.raises(ValueError, match=r"batch\.global_size=90 on 4 ranks"):
        plan_of("0sa:64 20000sa:90", "batch.even=true", world=4)
    with pytest.raises(ValueError, match="isn't a multiple of 32"):
        plan_of("0sa:64 20000sa:80", "batchnorm.mode=ghost", "batchnorm.ghost_size=32")


def test_a_longer_duration_must_not_move_completed_stages() -> None:
    fixed, moved = (plan_of(text) for text in ("0sa:32 2ep:64", "0sa:32 20%:64"))
    longer = continued(plan_of("0sa:32 2ep:64", "duration=20ep"), fixed, extends=True)
    assert longer.samples == 200_000
    with pytest.raises(ValueError, match=r"a longer duration moves the stages"):
        continued(plan_of("0sa:32 20%:64", "duration=20ep"), moved, extends=True)


def test_only_the_first_stage_is_known_before_the_data_is_opened() -> None:
    config = compose([*TASK, "task.train_samples=null", "batch.schedule=curriculum"])
    assert sizes(resolve(config, 1)) == [(0, 32)]
    assert len(sizes(resolve(config, 1, 500))) == 5


@pytest.mark.parametrize(
    ("schedule", "overrides", "expected"),
    [
        ("rampp", [], "rampp isn't start:size; write"),
        ("100sa:32", [], "the first stage has to start at 0sa"),
        ("0sa:32 1000:64", [], "'1000' has no unit"),
        ("0sa:32 10min:64", [], "10min is in minutes"),
        ("0sa:0", [], "0sa:0 has no valid size"),
        ("0sa:32 2ep:6.5", [], "2ep:6.5 has no valid size"),
        ("0sa:32 lr:hld", [], "lr:hld isn't valid: lr:rule scales the LR"),
        ("ramp from:32", [], "a ramp needs from:… and over:…"),
        ("ramp from:32 over:5% up:3", [], "up:3 isn't valid: ramp takes from:…, over:…"),
        ("doubling lr:hold", [], "lr:hold isn't valid: doubling takes to:…, each once"),
        ("curriculum from:64 to:32", [], "from:64 is above to:32"),
        ("0sa:32 3ep:64 2ep:128", [], "each has to start after the previous one"),
        ("0sa:32 90ep:64", [], "its last stage starts at sample 900,000, but the run has only 100,000"),
        ("0sa:32 50%:64", ["duration=100st"], "duration=100st depends on the batch"),
        ("curriculum", ["duration=100st"], "duration=100st depends on the batch"),
        ("0sa:32 2ep:64", ["batch.global_size=48"], "batch.global_size=48 contradicts batch.schedule=0sa:32 2ep:64"),
        ("0sa:32 2ep:64", ["batch.accumulation=2"], "batch.accumulation=2 can't hold"),
        ("doubling to:100", [], "64 samples × 2 is more than 100, its to:…"),
        ("doubling", ["lr.decay=constant"], "never reaches 1/2 of the peak"),
        ("ramp from:128 over:10%", [], "goes from 128 to 64; give a larger to:…"),
        ("0sa:64 2ep:100", ["batch.unit=tokens", "task.units_per_sample=32"], "100 tokens isn't a whole number of"),
    ],
)
def test_invalid_schedules_are_refused(schedule: str, overrides: list[str], expected: str) -> None:
    assert expected in refusal(schedule, *overrides)


@pytest.mark.parametrize("text", ["0sa:256 200000sa:512 lr:hold", "ramp from:32 over:30% by:16", "seesaw to:9"])
def test_a_schedule_is_stored_as_it_was_written(text: str) -> None:
    config = compose([f"batch.schedule='{text}'"])
    assert config.model_dump(mode="json")["batch"]["schedule"] == text
    assert config.batch.schedule == BatchSchedule.parse(text)


@pytest.mark.parametrize("junk", [None, 7, "", "  ", ["0sa:1"], {}])
def test_junk_is_refused(junk: Any) -> None:
    with pytest.raises(ValueError, match="is not a batch schedule; write"):
        BatchSchedule.parse(junk)


@pytest.mark.parametrize("schedule", ["0sa:32 2ep:64", "curriculum", "ramp from:16 to:128 over:20%", "doubling"])
def test_a_run_with_stages_resumes_from_its_folder(tmp_path: Path, schedule: str) -> None:
    first = compose([*TASK, f"batch.schedule='{schedule}'"])
    (tmp_path / "config.yaml").write_text(dump(first))
    (tmp_path / "plan.json").write_text("{}")
    resumed = compose([f"run.dir={tmp_path}", "batch.per_gpu=8"])
    assert identity(resumed) == identity(first)
    assert sizes(resolve(resumed, 3)) == sizes(resolve(first, 1))
    longer = compose([f"run.dir={tmp_path}", "duration=20ep"])
    assert resolve(longer, 2).samples == 200_000


def test_a_ramp_in_tokens_grows_to_the_global_batch() -> None:
    tokens = ("batch.unit=tokens", "task.units_per_sample=16", "batch.global_size=1024")
    plan = plan_of("ramp from:256 over:30%", *tokens)
    assert sizes(plan) == [(0, 16), (10_000, 32), (20_000, 48), (30_000, 64)]


def test_every_milestone_grows_the_batch_by_a_fractional_factor() -> None:
    plan = plan_of("doubling to:1000", "lr.decay=step", "lr.gamma=0.9")
    assert sizes(plan) == [(0, 64), (30_000, 71), (60_000, 79), (90_000, 88)]
    assert [lr for _, _, lr in walk(plan)] == pytest.approx([0.1] * (plan.steps or 0))


def test_an_infinite_factor_is_refused() -> None:
    assert "× inf is more than 1,000" in refusal("doubling", "lr.decay=step", "lr.gamma=1e-320")


def test_a_plan_with_unknown_stages_has_no_steps() -> None:
    plan = resolve(compose([*TASK, "task.train_samples=null", "duration=1e6sa", "batch.schedule='0sa:32 2ep:64'"]), 1)
    assert (plan.samples, plan.steps, plan.schedule) == (None, None, None)
