"""Test that durations convert to whole samples exactly."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isobatch.scaling.limits import LARGEST
from isobatch.scaling.units import MEANING, Duration
from tests.support.examples import examples

quick = examples(50)


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("10ep", 10, "ep"),
        ("5000st", 5000, "st"),
        ("1e6sa", 1_000_000, "sa"),
        ("2e9tok", 2_000_000_000, "tok"),
        ("5%", 5, "%"),
        (".5ep", 0.5, "ep"),
        ("1.EP", 1, "ep"),
        (" 20 ep ", 20, "ep"),
        ("1e-3%", 0.001, "%"),
        ("0", 0, "sa"),
        (0, 0, "sa"),
        (0.0, 0, "sa"),
    ],
)
def test_a_number_with_its_unit_is_parsed(text: object, value: float, unit: str) -> None:
    assert Duration.parse(text) == Duration(value, unit)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ten epochs", "not a duration"),
        ("", "not a duration"),
        ("ep", "not a duration"),
        ("1_000sa", "not a duration"),
        ("nan", "not a duration"),
        (float("nan"), "not a duration"),
        (math.inf, "not a duration"),
        (True, "not a duration"),
        (None, "not a duration"),
        (["1ep"], "not a duration"),
        ("-1ep", "0 or more"),
        ("1e999ep", "finite"),
        ("100", "no unit; write 100ep or 100st"),
        (3, "no unit"),
        ("3h", "unknown unit 'h'"),
        ("3epochs", "unknown unit 'epochs'"),
    ],
)
def test_invalid_durations_are_refused_with_their_value(text: object, expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as refusal:
        Duration.parse(text)
    shown = json.dumps(text) if text is None or text is True else repr(text)
    assert shown in str(refusal.value)


@given(st.floats(0, LARGEST), st.sampled_from(list(MEANING)))
@quick
def test_text_reads_back_as_the_same_duration(value: float, unit: str) -> None:
    duration = Duration(value, unit)  # type: ignore[arg-type]
    assert Duration.parse(str(duration)) == duration


LENGTHS = {"global_size": 256, "train_samples": 1437, "units_per_sample": 512, "run_samples": 28_740}


@pytest.mark.parametrize(
    ("text", "samples"),
    [
        ("20ep", 28_740),
        ("0.5ep", 719),  # 718.5, rounded up
        ("10st", 2560),
        ("0.5st", 128),
        ("1e6sa", 1_000_000),
        ("1024tok", 2),
        ("1025tok", 3),
        ("5%", 1437),
        ("0.001%", 1),
        ("1e-9ep", 1),  # never 0
        ("1e-300sa", 1),
        ("0%", 0),
        ("120%", 34_488),
    ],
)
def test_durations_are_converted_to_samples(text: str, samples: int) -> None:
    assert Duration.parse(text).samples(**LENGTHS) == samples


def test_decimal_numbers_are_exact() -> None:
    assert math.ceil(0.07 * 100) == 8  # the error of binary fractions
    assert Duration.parse("0.07ep").samples(global_size=1, train_samples=100) == 7
    assert Duration.parse("7%").samples(global_size=1, run_samples=100) == 7
    assert Duration.parse("1e15sa").samples(global_size=1) == 10**15


@given(st.decimals(0, 10**6, places=3), st.integers(1, 10**9))
@quick
def test_epochs_are_rounded_up_exactly(epochs: object, train_samples: int) -> None:
    samples = Duration.parse(f"{epochs}ep").samples(global_size=1, train_samples=train_samples)
    assert samples is not None
    assert 0 <= samples - Fraction(str(epochs)) * train_samples < 1


@pytest.mark.parametrize(("text", "missing"), [("1ep", "train_samples"), ("1%", "run_samples")])
def test_durations_that_wait_for_the_data_are_unknown(text: str, missing: str) -> None:
    assert Duration.parse(text).samples(**{**LENGTHS, missing: None}) is None
