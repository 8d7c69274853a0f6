"""Test the plan of a run whose batch moves by measurement: what is rejected, and the steps that decisions make."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isobatch.conf.compose import compose
from isobatch.conf.keys import choices_of
from isobatch.scaling.control import Control
from isobatch.scaling.errors import UserError
from isobatch.scaling.plan import Plan
from isobatch.scaling.planning.resolve import continued, resolve
from isobatch.scaling.report.plan_json import from_json, to_json
from isobatch.scaling.rules import Recipe, Rule
from isobatch.scaling.schedule import Segment
from tests.support.examples import examples
from tests.support.golden import golden
from tests.support.steps import walk
from tests.unit.test_plan import make

TASK = ("task=custom", "task._target_=my_package.MyTask", "task.train_samples=4000", "lr.peak=0.01", "duration=10ep")
SIZES = ("batch.global_size=64", "batch.per_gpu=32")
NOISE = (*TASK, *SIZES, "control=noise")
GHOST = ("batchnorm.mode=ghost", "batchnorm.ghost_size=16")
TOKENS = ("task.units_per_sample=512", "batch.unit=tokens", "batch.global_size=32768", "batch.per_gpu=16384")


def planned(*overrides: str, world: int = 2, train_samples: int | None = None) -> Plan:
    return resolve(compose(overrides), world, train_samples)


def control_in(plan: Plan) -> Control:
    assert plan.control
    return plan.control


# ---- what is derived, and what is rejected


def test_defaults() -> None:
    control = control_in(planned(*NOISE))
    assert (control.least, control.most, control.quantum, control.every) == (64, 400, 8, 200)
    control = control_in(planned(*NOISE, *GHOST))
    assert (control.least, control.most, control.quantum) == (64, 400, 16)
    assert control_in(planned(*NOISE, *GHOST, train_samples=4090)).most == 400  # a tenth, in whole granules
    assert control_in(planned(*NOISE, *TOKENS)) == replace(control_in(planned(*NOISE)), every=200)
    given_in_tokens = ("control.least=16384", "control.most=65536", "control.quantum=8192")
    control = control_in(planned(*NOISE, *TOKENS, *given_in_tokens))
    assert (control.least, control.most, control.quantum) == (32, 128, 16)


@pytest.mark.parametrize(
    ("optimizer", "power"), [("sgd", 1), ("lars", 1), ("adamw", 0.5), ("lamb", 0.5), ("muon", 0.5), ("adafactor", 0.5)]
)
def test_the_exponent_of_the_gain_follows_the_optimizer(optimizer: str, power: float) -> None:
    """1 for SGD; ½ for Adam, as in AdaptDL's AdamScale, which takes the root of AdaScale's gain."""
    assert control_in(planned(*NOISE, f"optimizer={optimizer}")).power == power


def test_bounds_wait_for_the_data() -> None:
    """Nothing else of the run is known by then, so its length isn't, either."""
    unknown = (*NOISE, "task.train_samples=null", "duration=40000sa")
    plan = planned(*unknown)
    assert (plan.control, plan.samples, plan.schedule) == (None, None, None)
    assert planned(*unknown, train_samples=4000).steps == planned(*NOISE).steps
    assert control_in(planned(*unknown, train_samples=4000)) == control_in(planned(*NOISE))
    assert control_in(planned(*unknown, "control.most=128")).most == 128


REJECTED: dict[str, tuple[tuple[str, ...], str, list[str]]] = {
    "no per_gpu": (("batch.per_gpu=null",), "batch.per_gpu", ["control=noise", "auto"]),
    "stages": (("batch.schedule='0sa:64 50%:128'",), "batch.schedule", ["0sa:64", "doubling"]),
    "a ramp": (("batch.schedule='ramp from:32 over:30%'",), "batch.schedule", ["ramp", "doubling"]),
    "seesaw": (("batch.schedule=seesaw",), "batch.schedule", ["seesaw", "doubling"]),
    "a duration in steps": (("duration=500st",), "duration", ["500st", "ep"]),
    "even cuts": (("batch.even=true",), "batch.even", ["control.quantum"]),
    "another measurement": (("noise.every=10st",), "noise.every", ["control.every=0.5%"]),
    "synchronised statistics": (("batchnorm.mode=sync",), "batchnorm.mode", ["ghost"]),
    "a lower bound above the start": (("control.least=65",), "control.least", ["65", "64"]),
    "both bounds above the start": (("control.least=500",), "control.least", ["500", "64"]),
    "bounds without room": (("control.most=64",), "control.most", ["64", "256"]),
    "a first batch above a tenth of the data": (("batch.global_size=1000",), "control.most", ["1000", "4000"]),
    "a quantum that leaves no neighbour": (("control.quantum=256",), "control.quantum", ["256", "64"]),
    "no decision of so few steps": (
        ("batch.global_size=300", "duration=2000sa", "control.every=1%"), "control.every", ["300", "2,000", "2100sa"]
    ),
    "an upper bound below the start": (("control.most=63",), "control.most", ["63", "64"]),
    "bounds that exclude each other": (("control.least=65", "control.most=60"), "control.least", ["65"]),
    "an upper bound above the schedule's": (
        ("batch.schedule=doubling", "control.most=401"),
        "control.most",
        ["401", "400", "doubling"],
    ),
    "a lower bound of parts of granules": ((*GHOST, "control.least=40"), "control.least", ["40", "16", "32"]),
    "an upper bound of parts of granules": ((*GHOST, "control.most=100"), "control.most", ["100", "16", "96"]),
    "a clock beside bitwise numerics": (
        ("control=goodput", "numerics=bitwise", "batch.per_gpu=16"), "control.half_speed", ["bitwise", "goodput"]
    ),
    "a quantum of parts of granules": ((*GHOST, "control.quantum=24"), "control.quantum", ["24", "16", "32"]),
    "a batch of one": (("control.least=1",), "control.least", ["1", "2"]),
    "a batch of one granule": ((*GHOST, "control.least=16"), "control.least", ["16", "32"]),
    "a start of one": (("batch.global_size=1",), "batch.global_size", ["1", "2"]),
    "one piece": (("numerics=bitwise", "control.least=32"), "control.least", ["32", "batch.per_gpu"]),
    "a start of one piece": (("numerics=bitwise", "batch.per_gpu=64"), "batch.global_size", ["64", "batch.per_gpu"]),
    "a rule that ends below": (
        ("optimizer=adamw", "lr.peak=null", "lr.base=0.01", "lr.base_batch=64",
         "lr.rule=sde", "control.most=800"),
        "control.most", ["800", "639"],
    ),
    "a rule that ends below a tenth of the data": (
        ("optimizer=adamw", "lr.peak=null", "lr.base=0.01", "lr.base_batch=32", "lr.rule=sde"),
        "control.most", ["400", "319"],
    ),
    "no measurement in the run": (("control.every=200%",), "control.every", ["200%", "80,000", "40,000", "5714sa"]),
    "no decision in the run": (("control.every=15%",), "control.every", ["15%", "40,000", "5714sa"]),
    "no decision with this patience": (("control.patience=200",), "control.every", ["0.5%", "40,000", "195sa"]),
    "half a sample of tokens": ((*TOKENS, "control.most=66000"), "control.most", ["66000", "65536"]),
    "tokens of parts of granules": ((*TOKENS, *GHOST, "control.most=51200"), "control.most", ["8,192", "49152"]),
    "tokens below the start": ((*TOKENS, "control.most=16384"), "control.most", ["16384", "32768"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REJECTED)
def test_what_contradicts_a_controller_is_rejected(name: str) -> None:
    overrides, key, named = REJECTED[name]
    with pytest.raises(UserError) as error:
        planned(*NOISE, *overrides)
    assert error.value.key == key
    assert error.value.fix
    assert not [text for text in named if text not in str(error.value)]


def test_messages_equal_their_golden_file() -> None:
    answers = []
    for name, (overrides, _, _) in REJECTED.items():
        with pytest.raises(UserError) as error:
            planned(*NOISE, *overrides)
        assert len(str(error.value)) < 600
        answers.append(f"{name}: {' '.join(overrides)}\n{error.value}\n")
    golden("control", "\n".join(answers))


def test_the_nearest_accepted_values() -> None:
    """Each is one step from a rejected one."""
    for overrides in (
        ("control.least=56", "control.most=64"),
        ("control.quantum=32", "control.most=96"),
        ("control.least=2",),
        ("numerics=bitwise", "control.least=33"),
        (*GHOST, "control.least=32"),
        ("batch.schedule=doubling", "control.most=400"),
        ("control.every=5714sa",),
        ("control.every=195sa", "control.patience=200"),
    ):
        assert planned(*NOISE, *overrides).control, overrides


# ---- decisions


def controlled(plan: Plan, **changes: Any) -> Plan:
    fields: dict[str, Any] = {"least": 1, "most": 10**6, "quantum": 1, "every": 10, "patience": 1, "lr": "rule"}
    return replace(plan, control=Control("noise", **(fields | {"factor": 1.0, "power": 0.5} | changes)))


@st.composite
def decided(draw: st.DrawFn) -> Plan:
    """Draw plans with up to five decisions, some within a step, some beyond the end of the run."""
    granule, samples = draw(st.sampled_from([1, 1, 8])), draw(st.integers(1, 3000))
    sizes = st.builds(lambda count: count * granule, st.integers(1, 30) | st.integers(1, 400 // granule))
    bitwise = draw(st.booleans())
    plan = controlled(
        make(
            samples,
            batches=((0, draw(sizes)),),
            world=draw(st.integers(1, 7)),
            per_gpu=granule * draw(st.integers(1, 12)),
            granule=granule,
            numerics="bitwise" if bitwise else "fast",
            rule=draw(st.sampled_from([Rule("linear"), Rule("sqrt"), Rule("none")])),
        ),
        lr=draw(st.sampled_from(["rule", "hold", "adascale"])),
    )
    for start in sorted(draw(st.sets(st.integers(1, samples + 50), max_size=5))):
        plan = plan.decide(start, draw(sizes), draw(st.floats(1e-15, 1e15)))
    return plan


@given(decided())
@examples(60)
def test_each_decision_takes_effect_at_the_first_boundary_at_or_after_its_start(plan: Plan) -> None:
    steps = list(walk(plan))
    assert plan.samples is not None
    assert steps[0].start == 0
    assert all(before.stop == after.start and before.index + 1 == after.index for before, after in pairwise(steps))
    assert steps[-1].start < plan.samples <= steps[-1].stop
    assert (plan.steps, plan.added) == (len(steps), steps[-1].stop - plan.samples)
    for step in steps:
        in_force = [*plan.segments, *(one for one in plan.decisions if one.start_sample <= step.start)][-1]
        assert step.cut.global_size == in_force.global_size == step.stop - step.start
        assert plan.step_at(step.start) == step
    assert from_json(to_json(plan)) == plan


@given(decided(), st.data())
@examples(40)
def test_a_decision_changes_no_step_before_its_start(plan: Plan, data: st.DataObject) -> None:
    """So samples that were fetched before it was taken are still right."""
    last = plan.decisions[-1].start_sample if plan.decisions else 0
    start = last + data.draw(st.integers(1, 500))
    more = plan.decide(start, plan.granule * data.draw(st.integers(1, 40)), 50.0)
    assert [step for step in walk(more) if step.start < start] == [step for step in walk(plan) if step.start < start]


@given(decided(), st.integers(1, 7), st.integers(1, 12))
@examples(40)
def test_the_decided_course_is_the_same_on_other_hardware(plan: Plan, world: int, per_gpu: int) -> None:
    size = plan.per_gpu if plan.numerics == "bitwise" else per_gpu * plan.granule
    other = plan.dealt(world, size)
    both = zip(walk(plan), walk(other), strict=True)
    assert all(replace(mine, cut=its.cut, halves=its.halves) == its for mine, its in both)


def peaks(plan: Plan) -> list[tuple[int, Recipe]]:
    return [(stage.cut.global_size, stage.peak) for stage in plan.stages]


ADAM = Recipe(lr=0.002, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, ema=0.99)


@pytest.mark.parametrize(
    ("rule", "lr", "betas"),
    [
        (Rule("linear"), 0.008, (0.9, 0.95)),
        (Rule("sqrt"), 0.004, (0.9, 0.95)),
        (Rule("sde"), 0.004, (0.6, 0.8)),
        (Rule("half-life", 0.5), 0.004, (0.9**4, 0.95**4)),
        (Rule("none"), 0.002, (0.9, 0.95)),
    ],
)
def test_the_recipe_follows_the_rule_from_the_first_batch(rule: Rule, lr: float, betas: tuple[float, float]) -> None:
    """Through any batches in between, since rules compose; the average keeps its half-life in samples."""
    start = controlled(make(rule=rule, base=ADAM, batches=((0, 32),)))
    for plan in (start.decide(100, 128), start.decide(50, 72).decide(100, 40).decide(200, 128)):
        size, peak = peaks(plan)[-1]
        assert size == 128
        assert peak.lr == pytest.approx(lr)
        assert peak.betas == pytest.approx(betas)
        assert peak.ema == pytest.approx(0.99**4)
        held = replace(start, control=replace(control_in(start), lr="hold")).decide(100, 128)
        assert peaks(held)[-1] == (128, replace(peaks(start.decide(100, 128))[-1][1], lr=ADAM.lr))
    assert peaks(start.decide(100, 72).decide(300, 32))[-1] == (32, ADAM)


def test_a_given_peak_is_that_of_the_first_batch() -> None:
    plan = controlled(make(rule=Rule("linear", fixed=("lr", "betas")), batches=((0, 32),)))
    assert [peak.lr for _, peak in peaks(plan.decide(100, 64))] == pytest.approx([0.1, 0.2])


@pytest.mark.parametrize("scale", [1e-3, 20.0, 300.0, 1e15])
def test_the_gain_of_adascale_by_its_paper(scale: float) -> None:
    """r = (σ² + μ²)/(σ²/S + μ²), with the variance σ² of the first batch's gradient, and S times that batch.

    For Adam its root. Source: Johnson et al. 2020, arXiv:2007.05105, section 3; AdaptDL's ``AdamScale``.
    """
    first, size, mean_sq = 32, 96, 0.7
    variance = scale * mean_sq / first
    gain = (variance + mean_sq) / (variance / (size / first) + mean_sq)
    for power in (1.0, 0.5):
        plan = controlled(make(batches=((0, first),)), lr="adascale", power=power).decide(64, size, scale)
        assert plan.stages[1].peak.lr / plan.stages[0].peak.lr == pytest.approx(gain**power)
        assert 1 - 1e-9 <= plan.stages[1].peak.lr / plan.stages[0].peak.lr <= (size / first) ** power + 1e-9


# ---- together with a schedule that doubles the batch


@pytest.mark.parametrize("mode", ["rule", "hold"])
def test_a_schedule_multiplies_the_chosen_batch_and_holds_the_lr(mode: str) -> None:
    """Where the batch doubles the LR stays, and where it can't grow any more the LR decays."""
    wanted = "batch.schedule='doubling to:1024'", "control.most=256", f"control.lr={mode}"
    plan = planned(*NOISE, *wanted)
    assert [segment.global_size for segment in plan.segments] == [64, 128, 256, 512, 1024]
    assert [peak.lr for _, peak in peaks(plan)] == [0.01] * 5

    early = plan.decide(1000, 128)  # the doubling up to 1024 is complete one stage earlier
    assert [size for size, _ in peaks(early)] == [64, 128, 256, 512, 1024, 1024]
    gain = 2.0 if mode == "rule" else 1.0
    assert [peak.lr / 0.01 for _, peak in peaks(early)] == pytest.approx([1.0, *[gain] * 4, gain / 2])

    late = plan.decide(plan.segments[2].start_sample + 1000, 96).decide(plan.segments[3].start_sample + 500, 64)
    assert [size for size, _ in peaks(late)] == [64, 128, 256, 4 * 96, 8 * 96, 8 * 64, 16 * 64]
    gain = 1.5 if mode == "rule" else 1.0
    assert [peak.lr / 0.01 for _, peak in peaks(late)] == pytest.approx([1, 1, 1, gain, gain, 1, 1])
    assert from_json(to_json(late)) == late


# ---- a run that is resumed


def test_decisions_stay_on_other_hardware_and_with_a_longer_duration() -> None:
    """And so does the interval of a share of the run: another would move measurements of the past."""
    stored = planned(*NOISE).decide(5000, 128).decide(9000, 72)
    other = planned(*NOISE, "batch.per_gpu=24", world=3)
    resumed = continued(other, stored, extends=False)
    assert (resumed.decisions, resumed.control) == (stored.decisions, stored.control)
    assert (resumed.world, resumed.per_gpu) == (3, 24)
    assert [step.stop for step in walk(resumed)] == [step.stop for step in walk(stored)]

    longer = planned(*NOISE, "duration=20ep", "batch.per_gpu=24", world=3)
    assert control_in(longer).every == 2 * control_in(stored).every
    extended = continued(longer, stored, extends=True)
    assert (extended.decisions, extended.control) == (stored.decisions, stored.control)
    assert (extended.samples, extended.schedule) == (80_000, longer.schedule)
    assert extended.stages[-1].cut.global_size == 72
    assert [step.stop for step in walk(extended)][: stored.steps] == [step.stop for step in walk(stored)]


def test_edited_decisions_are_found() -> None:
    plan = planned(*NOISE).decide(5000, 128)
    for change in (
        {"decisions": []},
        {"control": None},
        {
            "decisions": [
                {"start_sample": 0, "global_size": 128, "rule": json.loads(to_json(plan))["segments"][0]["rule"]}
            ]
        },
    ):
        with pytest.raises(ValueError, match=r"not a plan|contradicts itself"):
            from_json(json.dumps(json.loads(to_json(plan)) | change))


def test_decisions_rise_and_need_a_controller() -> None:
    plan = planned(*NOISE).decide(5000, 128)
    for start in (5000, 4000, 0):
        with pytest.raises(ValueError, match="decisions"):
            plan.decide(start, 64)
    with pytest.raises(ValueError, match="decisions"):
        replace(planned(*TASK, *SIZES), decisions=(Segment(5000, 128, Rule("none")),))


def test_the_largest_batch_counts_what_the_controller_may_choose() -> None:
    """``batch.per_gpu=auto`` looks for the memory of that."""
    assert planned(*NOISE).largest == 400
    assert planned(*NOISE, "batch.schedule=doubling to:256", "control.most=128").largest == 256
    assert planned(*NOISE, "control.most=128").largest == 128


def test_the_next_step_boundary() -> None:
    plan = planned(*NOISE).decide(100, 96)
    assert [plan.boundary(sample) for sample in (0, 1, 128, 129, 224, 225)] == [0, 64, 128, 224, 224, 320]


def test_a_bandit_fits_no_more_intervals_than_it_has_time_for() -> None:
    bandit = ("control=bandit", "batch.per_gpu=16", "batch.global_size=8", "control.most=64")
    with pytest.raises(UserError, match="at least 20sa") as raised:
        planned(*bandit, "control.every=19sa", "duration=40000sa")
    assert raised.value.key == "control.every"
    assert planned(*bandit, "control.every=20sa", "duration=40000sa").control


def test_controllers_share_the_defaults_of_their_common_keys() -> None:
    """Each YAML has them, so that --help shows them with every choice."""
    sections = [compose([f"control={name}"]).control.model_dump() for name in choices_of("control") if name != "none"]
    common = set.intersection(*(set(section) for section in sections)) - {"name"}
    assert common >= {"least", "most", "quantum", "every", "patience", "lr"}
    assert all(
        {key: section[key] for key in common} == {key: sections[0][key] for key in common} for section in sections
    )
