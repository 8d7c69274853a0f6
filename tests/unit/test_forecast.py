"""Test the fit of samples to a target by batch, and the statistics of repeated runs."""

from __future__ import annotations

import math
import random

import pytest

from isobatch.scaling.tuning.forecast import Fit, fit
from isobatch.scaling.tuning.spread import Spread, half_width, student


def law(batch: float, least: float, critical: float, power: float = 1.0) -> float:
    return float(least * (1 + (batch / critical) ** power) ** (1 / power))


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_the_parameters_of_exact_points_are_found(power: float) -> None:
    batches = [2**i for i in range(3, 12)]
    found = fit(batches, [law(batch, 5000, 150, power) for batch in batches])
    assert found.critical_batch == pytest.approx(150, rel=0.03)
    assert found.least == pytest.approx(5000, rel=0.03)
    assert found.power == pytest.approx(power, rel=0.1)
    assert found.predict(4096) == pytest.approx(law(4096, 5000, 150, power), rel=0.05)


# Epochs and millions of samples to the target in the MLPerf results that science.md quotes
PUBLISHED = {
    "ResNet-50, LARS": ([1632, 4096, 8192, 32768, 65536], [35, 40, 42, 56, 84.5], 50_000),
    "BERT, LAMB": ([448, 4096, 8192, 16384], [2.41, 2.84, 4.19, 5.50], 11_000),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_results_have_a_critical_batch_within_its_interval(name: str) -> None:
    batches, samples, about = PUBLISHED[name]
    found = fit(batches, samples)
    assert found.critical_batch == pytest.approx(about, rel=0.1)
    low, high = found.interval
    assert low and high and low < found.critical_batch < high  # noqa: PT018  narrowed for the comparison
    predicted = [found.predict(batch) or 0 for batch in batches]
    assert all(one == pytest.approx(other, rel=0.2) for one, other in zip(predicted, samples, strict=True))


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    noise, batches, inside = random.Random(0), [16, 64, 256, 1024], 0
    for _ in range(200):
        samples = [law(batch, 1000, 200) * math.exp(noise.gauss(0, 0.05)) for batch in batches]
        low, high = fit(batches, samples).interval
        inside += (low or 0) <= 200 <= (high or math.inf)
    assert 180 <= inside <= 198  # 95 % of 200 is 190


@pytest.mark.parametrize(
    ("batches", "samples", "named"),
    [
        ([], [], "0 batches"),
        ([16, 64], [100, 150], "2 batches"),
        ([16, 64, 256], [100.0, 101.0, 99.0], "don't bend"),
        ([32, 64, 128], [100.0, 100.0, 120.0], "larger batches would tell"),
        ([16, 64, 256, 1024], [100.0, 400.0, 1600.0, 6400.0], "in proportion"),
    ],
)
def test_too_few_or_straight_points_have_no_critical_batch(
    batches: list[float], samples: list[float], named: str
) -> None:
    found = fit(batches, samples)
    assert (found.critical_batch, found.predict(64)) == (None, None)
    assert named in found.note


def test_points_that_hardly_bend_bound_the_critical_batch_on_one_side() -> None:
    flat, steep = fit([16, 64, 256], [100, 101, 99]), fit([16, 64, 256, 1024], [100, 400, 1600, 6400])
    assert flat.interval[0] is not None
    assert flat.interval[0] > 256
    assert flat.interval[1] is None
    assert steep.interval[0] is None
    assert steep.interval[1] is not None
    assert steep.interval[1] < 16


def test_six_points_of_a_sharp_bend_need_the_power() -> None:
    batches = [16, 32, 64, 128, 256, 512]
    sharp = [law(batch, 1000, 100, 4.0) for batch in batches]
    assert fit(batches, sharp).power > 2.5
    assert fit(batches[:5], sharp[:5]).power == 1
    assert Fit(None, None, (None, None), 0).predict(3) is None


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4.5, 2.6589), (9, 2.26216), (1e4, 1.96020)]
)
def test_quantile_of_student(freedom: float, quantile: float) -> None:
    assert student(freedom) == pytest.approx(quantile, rel=1e-4)


def test_welch_by_hand() -> None:
    """Two groups of three: s² = 1 and 4, so that the half-width is t(2.941)·√(5/3)."""
    one, other = Spread.of([1, 2, 3]), Spread.of([8, 10, 12])
    assert one and other  # noqa: PT018
    assert (one.mean, one.deviation, one.n) == (2, 1, 3)
    assert half_width(one, other) == pytest.approx(3.2188 * math.sqrt(5 / 3), rel=1e-3)


@pytest.mark.parametrize(("one", "other"), [([1], [2, 3]), ([1, 2], [3]), ([1, 1], [2, 2])])
def test_without_a_spread_nothing_is_known_about_chance(one: list[float], other: list[float]) -> None:
    first, second = Spread.of(one), Spread.of(other)
    assert first and second  # noqa: PT018
    assert half_width(first, second) is None
