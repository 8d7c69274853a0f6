"""Test each warning on both sides of its boundary."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isobatch.conf.compose import compose
from isobatch.scaling.families import FAMILIES
from isobatch.scaling.plan import Plan
from isobatch.scaling.planning.advice import warnings
from isobatch.scaling.planning.resolve import resolve
from isobatch.scaling.rules import Rule
from isobatch.scaling.schedule import Segment
from tests.support.examples import examples


@cache
def quiet() -> Plan:
    """Return a plan without warnings."""
    overrides = [
        "lr.base=0.1",
        "lr.base_batch=64",
        "batch.global_size=64",
        "lr.warmup=5%",
        "task.family=null",
        "duration=100ep",
    ]
    plan = resolve(compose(["task=custom", "task._target_=a.B", "task.train_samples=100000", *overrides]), world=2)
    assert warnings(plan) == []
    return plan


def advised(batch: int = 64, rule: Rule | None = None, **changes: Any) -> list[str]:
    segment = Segment(0, batch, rule or Rule("none"))
    return warnings(replace(quiet(), segments=(segment,), **changes))


def without_warmup(plan: Plan) -> Any:
    assert plan.schedule
    return replace(plan.schedule, warmup_samples=0)


@pytest.mark.parametrize(
    ("rule", "base_batch", "within", "beyond"),
    [
        ("linear", 64, 2048, 2050),  # 32 ×
        ("linear", 4096, 8192, 8194),
        ("sqrt", 64, 4096, 4098),  # 64 ×
        ("sqrt", 16384, 32768, 32770),
    ],
)
def test_a_rule_far_beyond_its_tested_range_warns(rule: str, base_batch: int, within: int, beyond: int) -> None:
    assert advised(within, Rule(rule), base_batch=base_batch) == []
    (warning,) = advised(beyond, Rule(rule), base_batch=base_batch)
    assert warning.startswith(f"lr.rule={rule} is far above its tested range: the global batch of {beyond:,} samples")
    assert "lr.peak" in warning
    assert advised(beyond, Rule("none"), base_batch=base_batch) == []
    assert advised(beyond, Rule("power", 0.1), base_batch=base_batch) == []
    assert advised(beyond, Rule(rule), base_batch=beyond, base_source="peak") == []


def test_no_warmup_at_a_large_batch_warns() -> None:
    no_warmup = without_warmup(quiet())
    assert advised(254, schedule=no_warmup) == []
    (warning,) = advised(256, schedule=no_warmup)
    assert warning.startswith("no warmup at a large batch (256 samples, 4 × that of the base LR)")
    assert advised(256) == []
    assert advised(4094, schedule=no_warmup, base_batch=4094) == []
    (warning,) = advised(4096, schedule=no_warmup, base_batch=4096, base_source="peak")
    assert warning.startswith("no warmup at a large batch (4,096 samples):")
    assert advised(4096, schedule=None, samples=None) == []


def test_a_base_lr_that_is_only_a_starting_point_warns() -> None:
    (warning,) = advised(base_source="usual")
    assert "0.1 at a batch of 64 samples is only a usual starting point for sgd" in warning
    for source in ("given", "tuned", "moved", "peak"):
        assert advised(base_source=source) == []


def test_idle_work_warns() -> None:
    assert advised(19, world=10)[0].startswith("5% of the work idles: 10 ranks × accumulation 1 can't share 19 samples")
    assert advised(191, world=100) == []  # 4.5 %
    (warning,) = advised(19, world=3, per_gpu=2, accumulation=None)[:1]
    assert warning.endswith("are even: 24")  # 18 doesn't divide into 4 passes, which may be given
    (warning,) = advised(1, world=2)
    assert warning.startswith("50% of the work idles: 2 ranks × accumulation 1 can't share 1 sample evenly")
    assert warning.endswith("are even: 2")


@given(st.integers(2, 60), st.integers(1, 400), st.none() | st.integers(1, 30), st.none() | st.integers(1, 5))
@examples(50)
def test_the_batches_suggested_against_idling_do_not_idle(
    world: int, batch: int, per_gpu: int | None, passes: int | None
) -> None:
    asked: dict[str, Any] = {"world": world, "per_gpu": per_gpu, "accumulation": None if per_gpu else passes}
    found = [text for text in advised(batch, **asked) if "idles" in text]
    for size in re.findall(r"\d+", found[0].split("are even:")[1]) if found else []:
        plan = replace(quiet(), segments=(Segment(0, int(size), Rule("none")),), even=True, **asked)
        assert plan.cut.idle == 0


def test_a_batch_larger_than_the_data_warns() -> None:
    assert advised(1000, train_samples=1000) == []
    assert advised(1000, train_samples=None) == []
    (warning,) = advised(1000, train_samples=999)
    assert warning.startswith("the global batch of 1,000 samples is larger than the data (999 samples)")


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.unit == "sample"])
def test_a_batch_far_from_the_usual_range_of_its_family_warns(family: str) -> None:
    least, most = FAMILIES[family].usual
    for size in (max(1, -(-least // 4)), least, most, 4 * most):
        assert advised(size, family=family, world=1) == []
    assert f"the usual range for {family} ({least} to {most})" in advised(4 * most + 1, family=family, world=1)[0]
    if least > 4:
        assert f"the usual range for {family}" in advised((least - 1) // 4, family=family, world=1)[0]


def test_a_language_batch_is_compared_in_tokens_if_their_number_is_known() -> None:
    tokens = {"family": "language", "units_per_sample": 1000, "world": 1, "base_batch": 100_000}
    assert advised(63, **tokens) == []
    assert advised(16_000, **tokens) == []
    assert "a global batch of 62,000 tokens is far from" in advised(62, **tokens)[0]
    assert "a global batch of 16,001,000 tokens is far from" in advised(16_001, **tokens)[0]
    assert advised(1, **{**tokens, "units_per_sample": None}) == []


def test_sizes_are_printed_in_the_unit_they_were_given_in() -> None:
    (warning,) = advised(1, world=2, unit="tokens", units_per_sample=512)
    assert "can't share 512 tokens evenly" in warning
    assert warning.endswith("are even: 1024")


def test_every_stage_is_checked() -> None:
    def staged(*sizes: int, rule: str = "none", **changes: Any) -> list[str]:
        segments = tuple(Segment(1000 * number, size, Rule(rule)) for number, size in enumerate(sizes))
        return warnings(replace(quiet(), segments=segments, **changes))

    assert staged(64, 128) == []
    (idles,) = staged(64, 3, 128)
    assert idles.startswith("25% of the work idles: 2 ranks × accumulation 1 can't share 3 samples evenly")
    (wraps,) = staged(64, 5000, train_samples=4000)
    assert wraps.startswith("the global batch of 5,000 samples is larger than the data")
    (far,) = staged(64, 250, 990, 3900, 4096, rule="linear")
    assert far.startswith("lr.rule=linear is far above its tested range: the global batch of 4,096 samples")
    (unusual,) = staged(64, 4096, family="images")
    assert unusual.startswith("a global batch of 4,096 samples is far from the usual range")


def test_statistics_of_one_pass_warn_with_accumulation() -> None:
    assert advised(64, sync=True) == []
    (warning,) = advised(64, sync=True, accumulation=2)
    assert warning.startswith("batchnorm.mode=sync computes its statistics over one pass of all ranks")
    assert "accumulation 2" in warning


def test_a_warmup_of_a_few_steps_warns() -> None:
    schedule = quiet().schedule
    assert schedule
    short = replace(schedule, warmup_samples=5 * 256 - 1)
    (warning,) = advised(256, schedule=short)
    assert warning.startswith("a warmup of 5 steps at a large batch (256 samples, 4 × that of the base LR)")
    assert advised(254, schedule=short) == []  # 5.04 steps, less than 4 × the base
    assert advised(256, schedule=replace(schedule, warmup_samples=5 * 256)) == []


def test_a_learning_rate_that_jumps_in_a_run_warns() -> None:
    def staged(*sizes: int, rule: str) -> list[str]:
        segments = tuple(Segment(1000 * number, size, Rule(rule)) for number, size in enumerate(sizes))
        return warnings(replace(quiet(), segments=segments))

    (jumps,) = staged(64, 128, 512, rule="linear")
    assert jumps.startswith("the learning rate becomes 4 × as large in one step, at sample 2,048")
    assert staged(64, 128, 510, rule="linear") == staged(64, 128, 512, rule="sqrt") == []


def test_a_rule_that_leaves_hardly_any_memory_warns() -> None:
    adam = replace(quiet().base, betas=(0.9, 0.99), eps=1e-8)
    (short,) = advised(576, Rule("sde"), base=adam)  # 1 − 9 × 0.1
    assert short.startswith("lr.rule=sde gives a beta of 0.1, which has hardly any memory")
    assert advised(320, Rule("sde"), base=adam) == []
