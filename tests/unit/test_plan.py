"""Test that a plan has the same steps from any position, on any hardware, and from its JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isobatch.scaling.order import indices
from isobatch.scaling.plan import Choice, Plan, Step
from isobatch.scaling.report.plan_json import _numbers, from_json, to_json
from isobatch.scaling.report.plan_table import table
from isobatch.scaling.rules import Recipe, Rule
from isobatch.scaling.schedule import Schedule, Segment
from tests.support.examples import examples
from tests.support.steps import walk

quick = examples(25)


def make(samples: int | None = 1000, *, batches: tuple[tuple[int, int], ...] = ((0, 32),), **changes: Any) -> Plan:
    """Return a plan of ``samples`` with (start sample, global batch) for each segment."""
    rule = changes.pop("rule", Rule("linear"))
    schedule = samples and Schedule(
        samples=samples,
        warmup_samples=samples // 10,
        warmup_from=0.01,
        decay="cosine",
        final=0.0,
        exponent=2.0,
        milestones=(),
        gamma=0.1,
        cooldown_samples=0,
    )
    fields: dict[str, Any] = {
        "segments": tuple(Segment(start, size, rule) for start, size in batches),
        "world": 1,
        "per_gpu": None,
        "accumulation": None,
        "granule": 1,
        "even": False,
        "seed": 7,
        "samples": samples,
        "train_samples": 100,
        "unit": "samples",
        "units_per_sample": None,
        "task": "digits",
        "family": "images",
        "optimizer": Choice("sgd", "the default"),
        "base": Recipe(lr=0.1, betas=(0.9,), eps=None, weight_decay=1e-4),
        "base_batch": 32,
        "base_source": "tuned",
        "schedule": schedule,
        "identity": "0123456789ab",
    }
    return Plan(**{**fields, **changes})


cut_keys = st.fixed_dictionaries({"per_gpu": st.none() | st.integers(1, 50)}) | st.fixed_dictionaries(
    {"per_gpu": st.integers(1, 50), "numerics": st.just("bitwise")}
)


@st.composite
def plans(draw: st.DrawFn, most_samples: int = 3000) -> Plan:
    """Draw plans of one to five segments, some shorter than a step, some beyond the end of the run."""
    samples = draw(st.integers(1, most_samples))
    starts = sorted({0} | draw(st.sets(st.integers(1, samples + 50), max_size=4)))
    batches = tuple((start, draw(st.integers(1, 40) | st.integers(1, 700))) for start in starts)
    return make(
        samples,
        batches=batches,
        world=draw(st.integers(1, 7) | st.integers(1, 100_000)),
        units_per_sample=draw(st.none() | st.just(16)),
        **draw(cut_keys),
        rule=draw(st.sampled_from([Rule("linear"), Rule("sqrt"), Rule("power", 0.75), Rule("none")])),
    )


def without_cut(step: Step) -> Step:
    return replace(step, cut=None)  # type: ignore[arg-type]


# ---- steps


@given(plans())
@quick
def test_step_at_from_any_step_equals_the_walk_from_0(plan: Plan) -> None:
    assert plan.samples is not None
    steps = list(walk(plan))
    assert [step.index for step in steps] == list(range(len(steps)))
    assert steps[0].start == 0
    assert all(before.stop == after.start for before, after in pairwise(steps))
    assert steps[-1].start < plan.samples <= steps[-1].stop
    for step in steps:
        assert plan.step_at(step.start) == step
        assert step.stop - step.start == step.cut.global_size
        assert step.expected_units == step.cut.global_size * (plan.units_per_sample or 1)
    assert plan.step_at(steps[-1].stop) is None
    assert list(walk(plan, steps[len(steps) // 2].start)) == steps[len(steps) // 2 :]
    assert (plan.steps, plan.added) == (len(steps), steps[-1].stop - plan.samples)


@given(plans())
@quick
def test_a_segment_starts_at_the_first_step_boundary_at_or_after_its_sample(plan: Plan) -> None:
    for step in walk(plan):
        in_force = [segment for segment in plan.segments if segment.start_sample <= step.start][-1]
        assert step.cut.global_size == in_force.global_size


def test_segments_give_the_steps_found_by_hand() -> None:
    plan = make(300, batches=((0, 100), (10, 7), (20, 5), (150, 90)))
    assert [(step.start, step.stop) for step in walk(plan)][:3] == [(0, 100), (100, 105), (105, 110)]
    assert [(step.start, step.stop) for step in walk(plan)][-3:] == [(145, 150), (150, 240), (240, 330)]
    assert (plan.steps, plan.added, plan.epochs) == (1 + 10 + 2, 30, 3.0)
    assert plan.cut.global_size == 100


@given(plans(), st.data())
@quick
def test_a_sample_inside_a_step_fails_an_assertion(plan: Plan, data: st.DataObject) -> None:
    assert plan.samples is not None
    boundaries = {step.start for step in walk(plan)}
    inside = sorted(set(range(plan.samples)) - boundaries)
    if inside:
        with pytest.raises(AssertionError, match="inside a step"):
            plan.step_at(data.draw(st.sampled_from(inside)))


def test_steps_before_the_first_sample_or_the_data_fail_an_assertion() -> None:
    with pytest.raises(AssertionError, match="no sample -32"):
        make().step_at(-32)
    unknown = make(None)
    with pytest.raises(AssertionError, match="waits for the data"):
        unknown.step_at(0)
    with pytest.raises(AssertionError, match="schedule waits for the data"):
        replace(make(), schedule=None).step_at(0)
    assert (unknown.steps, unknown.added, unknown.epochs) == (None, None, None)


@given(plans(), st.integers(1, 700), st.sampled_from([Rule("linear"), Rule("none")]), st.data())
@quick
def test_extending_changes_no_step_before_the_new_segment(
    plan: Plan, size: int, rule: Rule, data: st.DataObject
) -> None:
    assert plan.samples is not None
    start = data.draw(st.integers(plan.segments[-1].start_sample + 1, plan.samples + 100))
    longer = plan.extend(Segment(start, size, rule))
    assert longer.segments[:-1] == plan.segments
    before = [step for step in walk(plan) if step.start < start]
    steps = list(walk(longer))
    assert steps[: len(before)] == before
    assert all(step.cut.global_size == size for step in steps[len(before) :])


@pytest.mark.parametrize("starts", [(), (1,), (0, 5, 5), (0, 9, 3), (-1, 0)])
def test_segments_that_do_not_rise_from_0_are_refused(starts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="start at sample 0 and rise"):
        make(batches=tuple((start, 32) for start in starts))
    with pytest.raises(ValueError, match="start at sample 0 and rise"):
        make(batches=((0, 32), (50, 64))).extend(Segment(50, 128, Rule("none")))


def test_an_extension_that_cannot_be_cut_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"batch\.even=true"):
        make(world=4, even=True).extend(Segment(500, 33, Rule("linear")))


# ---- recipes


def test_each_segment_has_its_own_peak_on_one_schedule() -> None:
    plan = make(1000, batches=((0, 32), (500, 128)))
    first, last = plan.step_at(480), plan.step_at(512)
    assert first
    assert last
    assert plan.schedule
    assert first.recipe.lr == plan.schedule.lr(480, 0.1)
    assert last.recipe.lr == pytest.approx(plan.schedule.lr(512, 0.4))
    assert replace(last.recipe, lr=0.1) == plan.base


@given(st.lists(st.integers(1, 300), min_size=2, max_size=4, unique=True))
@quick
def test_the_lr_at_a_sample_is_the_same_whatever_the_batch(sizes: list[int]) -> None:
    every = [make(1000, batches=((0, size),), rule=Rule("none")) for size in sizes]
    lrs: dict[int, set[float]] = {}
    for plan in every:
        for step in walk(plan):
            lrs.setdefault(step.start, set()).add(step.recipe.lr)
    assert all(len(seen) == 1 for seen in lrs.values())


# ---- other hardware


@given(plans(), st.integers(1, 9) | st.integers(1, 100_000), st.none() | st.integers(1, 64))
@quick
def test_a_step_is_the_same_on_any_hardware_except_for_its_cut(plan: Plan, world: int, per_gpu: int | None) -> None:
    per_gpu = plan.per_gpu if plan.numerics == "bitwise" else per_gpu
    other = plan.dealt(world, per_gpu)
    for step, moved in zip(walk(plan), walk(other), strict=True):
        assert without_cut(step) == without_cut(moved)
        assert moved.cut.world == world
        assert moved.cut.global_size == step.cut.global_size
        assert per_gpu is None or moved.cut.micro_batches[0][0] <= per_gpu
    assert other.dealt(plan.world, plan.per_gpu) == plan


def test_the_accumulation_is_solved_for_new_hardware() -> None:
    plan = make(world=1, accumulation=4)
    assert plan.cut.accumulation == 4
    assert plan.dealt(8, None).cut.accumulation == 1
    assert plan.dealt(2, 4).cut.accumulation == 4


def trained_on(plan: Plan, until: int, start: int = 0) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the end of each step and the samples that the ranks fetch, in the order of the batch."""
    for step in walk(plan, start):
        if step.start >= until:
            return
        parts = [
            (step.start + first, step.start + last)
            for rank in range(plan.world)
            for first, last in step.cut.passes(rank)
        ]
        fetched = [indices(plan.seed, plan.train_samples or 0, *part) for part in sorted(parts)]
        yield step.stop, np.concatenate(fetched)


@given(st.data())
@examples(25)
def test_every_sample_is_used_once_per_epoch_with_any_batches_and_resizes(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 120))
    epochs = data.draw(st.integers(1, 3))
    worlds, sizes = st.integers(1, 5), st.integers(1, 50)
    plan = make(n * epochs, train_samples=n, batches=((0, data.draw(sizes)),), world=data.draw(worlds))
    seen: list[np.ndarray] = []
    at = 0
    for cause in data.draw(st.lists(st.sampled_from(["ranks", "batch"]), max_size=3)):
        for stop, part in trained_on(plan, data.draw(st.integers(0, n * epochs)), at):
            seen.append(part)
            at = stop
        if cause == "ranks":
            plan = plan.dealt(data.draw(worlds), data.draw(st.none() | sizes))
        elif at > plan.segments[-1].start_sample:
            plan = plan.extend(Segment(at, data.draw(sizes), Rule("linear")))
    seen += [part for _, part in trained_on(plan, n * epochs, at)]
    order = np.concatenate(seen)
    assert len(order) == n * epochs + (plan.added or 0)
    assert (order == indices(plan.seed, n, 0, len(order))).all()
    for epoch in range(epochs):
        assert sorted(order[epoch * n : (epoch + 1) * n]) == list(range(n))


# ---- JSON


@given(plans())
@quick
def test_json_reads_back_as_the_same_plan(plan: Plan) -> None:
    again = from_json(to_json(plan))
    assert again == plan
    assert list(walk(again)) == list(walk(plan))


def test_a_plan_that_waits_for_the_data_has_json() -> None:
    plan = make(None, train_samples=None, family=None, unit="tokens", units_per_sample=16)
    content = json.loads(to_json(plan))
    assert [content[name] for name in ("samples", "steps", "epochs", "added_samples", "schedule")] == [None] * 5
    assert content["lr"]["warmup_samples"] is None
    assert content["lr"]["peak"] == 0.1
    assert from_json(to_json(plan)) == plan


def places(value: Any, *path: str | int) -> Iterator[tuple[str | int, ...]]:
    """Yield the path to every value in nested JSON."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in inside:
        yield (*path, name)
        yield from places(inner, *path, name)


WHOLE = make(
    1000,
    batches=((0, 32), (500, 64)),
    world=3,
    per_gpu=8,
    unit="tokens",
    units_per_sample=16,
    base=Recipe(lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, ema=0.999),
    base_batch=16,
)
JUNK = [None, "x", True, -1, 0, 1.5, 10**30, [], [1], {}, {"a": 1}]


@given(st.sampled_from(list(places(json.loads(to_json(WHOLE))))), st.sampled_from(["remove", *JUNK]))
@examples(150)
def test_damage_raises_only_value_errors(path: tuple[str | int, ...], junk: Any) -> None:
    content = json.loads(to_json(WHOLE))
    inner = content
    for name in path[:-1]:
        inner = inner[name]
    before = inner[path[-1]]
    if junk == "remove":
        del inner[path[-1]]
    else:
        inner[path[-1]] = junk
    plan = plan_or_refusal(json.dumps(content))
    if isinstance(plan, str):
        assert "plan" in plan
        assert "\n" not in plan
        return
    if replace(plan, optimizer=WHOLE.optimizer) == WHOLE:
        return  # an explanation, or a key that earlier versions didn't write
    assert _numbers(to_json(plan)) == _numbers(json.dumps(content))
    another_kind = type(junk) is not type(before) and (type(before), type(junk)) != (float, int)
    left_out = junk == "remove" and isinstance(path[-1], int)  # without an item of a list the plan may be valid
    assert left_out or junk is None or not another_kind, f"{path} = {junk!r} was accepted"


def plan_or_refusal(text: str) -> Plan | str:
    try:
        return from_json(text)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "[]", "7", '"plan"', "{}", '{"asked": []}', '{"asked": {}}', "[" * 100_000, '{"asked": NaN}'],
)
def test_texts_that_are_no_plan_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a plan"):
        from_json(text)


@pytest.mark.parametrize(
    "name",
    ["global_size", "per_gpu", "accumulation", "world_size", "idle", "steps", "added_samples", "epochs"],
)
def test_edited_numbers_are_named(name: str) -> None:
    content = json.loads(to_json(WHOLE))
    content[name] += 1
    with pytest.raises(ValueError, match=f"contradicts itself in {name}"):
        from_json(json.dumps(content))


@pytest.mark.parametrize(("name", "value"), [("peak", 0.3), ("factor", 3.0), ("base", 0.3), ("warmup_samples", 7)])
def test_an_edited_lr_is_named(name: str, value: float) -> None:
    content = json.loads(to_json(WHOLE))
    content["lr"][name] = value
    with pytest.raises(ValueError, match="contradicts itself in lr"):
        from_json(json.dumps(content))


def test_other_wording_and_rounding_are_accepted() -> None:
    content = json.loads(to_json(make(rule=Rule("power", 0.7), batches=((0, 99),))))
    content["warnings"].append("a warning of a later version")
    content["lr"]["why"] = "because"
    content["lr"]["peak"] *= 1 + 1e-15  # pow differs between machines
    content["a_later_version"] = 1
    assert from_json(json.dumps(content)).peak.lr == pytest.approx(content["lr"]["peak"])


# ---- size


def test_a_plan_of_100_000_ranks_is_as_small_as_one_of_two() -> None:
    large = make(10**12, world=100_000, batches=((0, 10**6 + 1),), per_gpu=3)
    assert large.cut.accumulation == 4
    assert len(to_json(large)) < 5000
    assert len(table(large).splitlines()) < 30
    assert large.steps == -(-(10**12) // (10**6 + 1))
    last = large.step_at((large.steps - 1) * (10**6 + 1))
    assert last
    assert last.index == large.steps - 1
