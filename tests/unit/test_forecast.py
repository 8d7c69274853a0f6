"""Test the fit of samples to a target by batch, and the statistics of repeated runs."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from isobatch.scaling.errors import UserError
from isobatch.scaling.quantiles import student
from isobatch.scaling.tuning.forecast import Fit, SpeedCurve, fit, forecast
from isobatch.scaling.tuning.quadratic import Optimizer, Quadratic
from isobatch.scaling.tuning.spread import Spread, half_width


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


def test_a_point_that_was_left_out_is_predicted_within_its_interval() -> None:
    """Of the five ResNet-50 results, each is within 10 % of what the other four predict."""
    batches, samples, _ = PUBLISHED["ResNet-50, LARS"]
    for place, (batch, took) in enumerate(zip(batches, samples, strict=True)):
        rest = fit(batches[:place] + batches[place + 1 :], samples[:place] + samples[place + 1 :])
        low, high = rest.expected(batch) or (math.inf, 0)
        assert low < took < high
        assert rest.predict(batch) == pytest.approx(took, rel=0.1)


def test_three_of_the_four_points_of_bert_are_too_few() -> None:
    batches, samples, _ = PUBLISHED["BERT, LAMB"]
    for place in range(4):
        rest = fit(batches[:place] + batches[place + 1 :], samples[:place] + samples[place + 1 :])
        assert (rest.critical_batch, rest.predict(32768), rest.expected(32768)) == (None, None, None)
        assert rest.note


@pytest.mark.parametrize("optimizer", [Optimizer(), Optimizer(0.9), Optimizer(0.9, nesterov=True)])
def test_the_critical_batch_of_a_simulated_curve_is_found(optimizer: Optimizer) -> None:
    """The law isn't exact there; the fit finds E_min/S_min within 25 %, and the samples at 4 times the batch, too."""
    model = Quadratic.power_law(40)
    target = 0.1 * float(model.loss(model.start))
    batches = [2**i for i in range(1, 9)]
    reached = model.samples_to(target, [*batches, 1024], optimizer)
    samples = [one.samples if one else math.nan for one in reached]
    found = fit(batches, samples[:-1])
    assert found.critical_batch == pytest.approx(model.critical_batch(target, optimizer), rel=0.25)
    assert found.predict(1024) == pytest.approx(samples[-1], rel=0.25)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    noise, batches, inside = random.Random(0), [16, 64, 256, 1024], 0
    for _ in range(200):
        samples = [law(batch, 1000, 200) * math.exp(noise.gauss(0, 0.05)) for batch in batches]
        low, high = fit(batches, samples).interval
        inside += (low or 0) <= 200 <= (high or math.inf)
    assert 180 <= inside <= 198  # 95 % of 200 is 190


@pytest.mark.parametrize(
    ("batches", "power", "at"),
    [([16, 64, 256, 1024], 1.0, 64), ([16, 64, 256, 1024], 1.0, 4096), ([16, 32, 64, 128, 256, 512], 2.0, 2048)],
)
def test_predicted_intervals_hold_one_more_run_as_often_as_they_say(batches: list[int], power: float, at: int) -> None:
    noise, inside, widths = random.Random(0), 0, []
    for _ in range(50):
        samples = [law(batch, 1000, 200, power) * math.exp(noise.gauss(0, 0.03)) for batch in batches]
        low, high = fit(batches, samples).expected(at) or (math.inf, 0.0)
        inside += low <= law(at, 1000, 200, power) * math.exp(noise.gauss(0, 0.03)) <= high
        widths.append(high / low)
    assert inside >= 43  # 47.5 of 50 ± 3 standard deviations of 1.5
    assert statistics.median(widths) < 2


def test_a_forecast_by_hand() -> None:
    """At the critical batch, p = 1, a target takes 2·E_min samples, so E_min/B_crit·2 steps, at an efficiency of ½."""
    found = fit([10, 40, 160, 640], [law(batch, 1000, 80) for batch in (10, 40, 160, 640)])
    critical = found.critical_batch or 0
    made = forecast(found, critical, SpeedCurve([(40, 100.0), (160, 400.0)]))
    assert made and made.seconds  # noqa: PT018
    assert made.samples.value == pytest.approx(2000, rel=0.02)
    assert made.steps.value == pytest.approx(made.samples.value / critical)
    assert made.seconds.value == pytest.approx(made.samples.value / (100 * critical / 40))
    assert made.efficiency == pytest.approx(0.5, rel=1e-6)
    assert made.samples.low <= made.samples.value <= made.samples.high


def test_speed_is_interpolated_and_never_extrapolated() -> None:
    curve = SpeedCurve([(64, 100.0), (256, 400.0), (16, 100.0), (1024, math.nan), (0, 5.0), (2048, -1.0)])
    assert [curve.at(batch) for batch in (15.9, 256.1, 1024)] == [None, None, None]
    assert [curve.at(batch) for batch in (16, 32, 64, 128, 256)] == pytest.approx([100, 100, 100, 200, 400])
    assert SpeedCurve([]).at(64) is None
    exact = fit([10, 40, 160], [law(batch, 1000, 80) for batch in (10, 40, 160)])
    beyond = forecast(exact, 2048, curve)
    assert beyond
    assert beyond.seconds is None


@pytest.mark.parametrize(
    ("batches", "samples"),
    [([0, 1, 2], [1, 2, 3]), ([1, 2, 3], [1, -2, 3]), ([1, 2, math.nan], [1, 2, 3]), ([1, 2, 4], [1, math.inf, 3]),
     ([1, 2, 1e60], [1, 2, 3])],
)  # fmt: skip
def test_impossible_numbers_are_rejected(batches: list[float], samples: list[float]) -> None:
    with pytest.raises(UserError, match="positive"):
        fit(batches, samples)


@pytest.mark.parametrize(
    ("batches", "samples", "named"),
    [
        ([], [], "0 batches"),
        ([16, 16, 64], [100, 110, 150], "2 batches"),
        ([1, 2, 4], [300, 200, 100], "up and down"),
        ([16, 64, 256, 1024], [100.0, 5.0, 700.0, 3.0], "the samples to the target go up and down"),
        ([1e-50, 1, 1e50], [1e-50, 1, 1e50], "in proportion"),
        ([16, 64], [100, 150], "2 batches"),
        ([16, 64, 256], [100.0, 101.0, 99.0], "don't bend"),
        ([32, 64, 128], [100.0, 100.0, 120.0], "larger batches would tell"),
        ([16, 64, 256, 1024], [100.0, 400.0, 1600.0, 6400.0], "in proportion to the batch: it is below the smallest"),
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
    found = fit(batches, sharp)
    assert found.power > 2.5
    assert found.plain
    assert (found.plain.power, found.plain.plain) == (1, None)
    assert abs(found.plain.predict(128) / sharp[3] - 1) > 5 * abs(found.predict(128) / sharp[3] - 1)  # type: ignore[operator]
    few = fit(batches[:5], sharp[:5])
    assert (few.power, few.plain) == (1, None)


def test_repeated_batches_count_once_as_batches_and_each_as_a_point() -> None:
    once = fit([16, 64, 256], [law(batch, 1000, 80) * wrong for batch, wrong in ((16, 1.05), (64, 1.0), (256, 1.05))])
    batches = [16, 16, 64, 64, 256, 256]
    twice = fit(batches, [law(batch, 1000, 80) * wrong for batch, wrong in zip(batches, [1.05, 1] * 3, strict=True)])
    assert (twice.batches, len(twice.points), twice.power) == (3, 6, 1)
    widths = [(high or math.inf) / (low or 1e-9) for low, high in (once.interval, twice.interval)]
    assert widths[1] < widths[0]


def test_a_fit_without_points_predicts_nothing() -> None:
    assert Fit(None, None, (None, None), 0).predict(3) is None


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [
        (1, 12.7062),
        (2, 4.30265),
        (3, 3.18245),
        (4.5, 2.6589),
        (9, 2.26216),
        (60, 2.0003),
        (1e4, 1.96020),
        (1e9, 1.95996),
    ],
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
