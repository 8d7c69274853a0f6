"""Test warmup and decays as functions of samples."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isobatch.scaling.schedule import DECAYS, Schedule
from tests.support.examples import examples

quick = examples(50)
PEAK = 0.4


def schedule(decay: str = "cosine", **changes: Any) -> Schedule:
    """Return a schedule of 1,000 samples: a warmup of 100 from 0.1, then ``decay`` to a tenth of the peak."""
    fields: dict[str, Any] = {
        "samples": 1000,
        "warmup_samples": 100,
        "warmup_from": 0.1,
        "decay": decay,
        "final": 0.1,
        "exponent": 2.0,
        "milestones": (300, 600, 900),
        "gamma": 0.1,
        "cooldown_samples": 200,
    }
    return Schedule(**{**fields, **changes})


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    samples = draw(st.integers(1, 5000))
    warmup = draw(st.integers(0, samples))
    return schedule(
        draw(st.sampled_from(list(DECAYS))),
        samples=samples,
        warmup_samples=warmup,
        warmup_from=draw(st.floats(0, PEAK)),
        final=draw(st.floats(0, 1)),
        exponent=draw(st.floats(0.1, 5)),
        milestones=tuple(sorted(draw(st.lists(st.integers(warmup, 2 * samples), max_size=4)))),
        gamma=draw(st.floats(0.01, 1)),
        cooldown_samples=draw(st.integers(0, samples - warmup)),
    )


def test_there_are_six_decays() -> None:
    assert list(DECAYS) == ["cosine", "linear", "polynomial", "step", "constant", "wsd"]


@pytest.mark.parametrize(
    ("decay", "at_550", "at_the_end"),
    [  # 550 is halfway between the end of the warmup and the end of the run
        ("cosine", 0.22, 0.04),
        ("linear", 0.22, 0.04),
        ("polynomial", 0.04 + 0.36 * 0.25, 0.04),
        ("step", 0.04, 0.0004),
        ("constant", 0.4, 0.4),
        ("wsd", 0.4, 0.04),
    ],
)
def test_learning_rates_equal_those_by_hand(decay: str, at_550: float, at_the_end: float) -> None:
    lr = schedule(decay).lr
    assert lr(0, PEAK) == 0.1
    assert lr(50, PEAK) == pytest.approx(0.25)
    assert lr(100, PEAK) == pytest.approx(PEAK)
    assert lr(550, PEAK) == pytest.approx(at_550)
    assert lr(1000, PEAK) == lr(5000, PEAK) == pytest.approx(at_the_end)


def test_polynomial_decay_uses_its_exponent() -> None:
    assert schedule("polynomial", exponent=3.0, final=0.0).lr(550, 1.0) == pytest.approx(1 / 8)


def test_cosine_decay_after_a_quarter_is_as_by_hand() -> None:
    assert schedule(final=0.0).lr(325, 1.0) == pytest.approx((1 + 2**-0.5) / 2)


def test_step_decay_falls_at_its_milestones() -> None:
    lr = schedule("step").lr
    assert [lr(sample, 1.0) for sample in (299, 300, 599, 600, 899, 900)] == pytest.approx(
        [1, 0.1, 0.1, 0.01, 0.01, 0.001]
    )


def test_wsd_is_stable_up_to_its_cooldown_and_falls_linearly() -> None:
    lr = schedule("wsd").lr
    assert {lr(sample, PEAK) for sample in (100, 400, 799, 800)} == {PEAK}
    assert lr(900, PEAK) == pytest.approx((PEAK + 0.04) / 2)
    assert schedule("wsd", cooldown_samples=0).lr(999, PEAK) == PEAK


@given(schedules())
@quick
def test_the_lr_rises_to_the_peak_without_a_jump_and_then_never_rises(s: Schedule) -> None:
    lrs = [s.lr(sample, PEAK) for sample in range(0, s.samples + 1, max(1, s.samples // 200))]
    assert all(0 <= lr <= PEAK * (1 + 1e-12) for lr in lrs)
    if s.warmup_samples:
        assert s.lr(0, PEAK) == s.warmup_from
        rise = PEAK - s.warmup_from
        assert s.lr(s.warmup_samples - 1, PEAK) == pytest.approx(PEAK - rise / s.warmup_samples)
    if s.warmup_samples < s.samples and s.warmup_samples not in s.milestones:
        assert s.lr(s.warmup_samples, PEAK) == pytest.approx(PEAK)
    warm = [s.lr(sample, PEAK) for sample in range(0, s.warmup_samples, max(1, s.warmup_samples // 100))]
    assert warm == sorted(warm)
    rest = [s.lr(sample, PEAK) for sample in range(s.warmup_samples, s.samples + 1, max(1, s.samples // 200))]
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(rest))


@given(schedules(), st.floats(1e-6, 10), st.integers(0, 6000))
@quick
def test_after_the_warmup_the_lr_is_a_share_of_the_peak(s: Schedule, peak: float, sample: int) -> None:
    if sample >= s.warmup_samples:
        assert s.lr(sample, peak) == pytest.approx(peak * s.lr(sample, 1.0))


@pytest.mark.parametrize("decay", DECAYS)
def test_a_warmup_may_take_the_whole_run_or_nothing(decay: str) -> None:
    whole = schedule(decay, warmup_samples=1000, milestones=(), cooldown_samples=0)
    assert [whole.lr(sample, PEAK) for sample in (0, 500)] == pytest.approx([0.1, 0.25])
    assert schedule(decay, warmup_samples=0).lr(0, PEAK) == PEAK


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"decay": "cosin"}, "lr.decay=cosin: known decays are cosine, linear, polynomial, step, constant, wsd"),
        ({"warmup_samples": 1001, "milestones": ()}, "lr.warmup takes 1001 samples, but the run has 1000"),
        ({"decay": "wsd", "cooldown_samples": 901}, r"lr.warmup \(100 samples\) and lr.cooldown \(901\)"),
        ({"milestones": (600, 300)}, r"\[600, 300\]; they have to rise"),
        ({"milestones": (99, 300)}, r"\[99, 300\]; .* start after lr.warmup \(100 samples\)"),
    ],
)
def test_durations_that_exceed_the_run_are_refused(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        schedule(**changes)


def test_durations_that_just_fit_are_accepted() -> None:
    schedule("wsd", cooldown_samples=900)
    schedule("step", milestones=(100, 100, 2000))
    schedule("cosine", cooldown_samples=10**6)
