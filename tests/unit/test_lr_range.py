"""Test what a range test tells, on noisy quadratics of a known largest stable LR, and on curves that show nothing."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from isobatch.scaling.tuning.lr_range import FEWEST, RangeTest, read
from isobatch.scaling.tuning.quadratic import SGD, Optimizer

DECADES = 3
RISE = 10 ** (2 * DECADES / 199)  # of the LR from step to step


def of_quadratic(
    limit: float, noise: float, seed: int, optimizer: Optimizer = SGD, steps: int = 200, start: float = 3.0,
    top: float = 1e3,
) -> RangeTest:  # fmt: skip
    """Return the range test of SGD on ½·Σ hᵢθᵢ², whose largest curvature makes ``limit`` the largest stable LR.

    The gradient has noise of variance noise²·hᵢ, and the measured loss noise of its own. The LR rises over 6 decades in
    ``steps``, up to ``top`` times a fifth of the limit.
    """
    random, curvature = np.random.default_rng(seed), optimizer.largest_lr(1.0) / limit / np.arange(1, 21)
    weights, velocity, curve = start * random.standard_normal(20), np.zeros(20), RangeTest.empty()
    for lr in limit / 5 * 10 ** np.linspace(-DECADES, DECADES, steps):
        if lr > limit / 5 * top:
            break
        curve.add(float(lr), float((curvature * weights**2).sum() / 2 + noise * random.normal()))
        if curve.diverged():
            break
        gradient = curvature * weights + noise * np.sqrt(curvature) * random.standard_normal(20)
        velocity = optimizer.momentum * velocity + gradient
        weights = weights - lr * velocity
    return curve


@pytest.mark.parametrize("limit", [0.01, 1.0])
@pytest.mark.parametrize("noise", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("seed", range(4))
def test_the_largest_stable_lr_of_a_quadratic_is_found(limit: float, noise: float, seed: int) -> None:
    """Within a factor of 1.6: in the ten steps that the average remembers, the LR doubles, and the loss has to grow."""
    curve = of_quadratic(limit, noise, seed)
    assert curve.diverged()
    found = read(curve)
    assert found.largest_stable == pytest.approx(limit, rel=0.6)
    assert found.steepest
    assert 0.01 * limit < found.steepest < limit
    assert found.suggestion == min(found.steepest, found.largest_stable / 2)
    assert found.why
    assert found.note == ""
    assert json.loads(json.dumps(found.plain(), allow_nan=False))["curve"][0][:2] == list(curve.tried[0][:2])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("noise", [0.02, 0.1])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_shortest_test_finds_it_too(momentum: float, noise: float, seed: int) -> None:
    """Within a factor of 2: an average over ten of these steps, in which the LR rises fourfold, reads a third of it."""
    found = read(of_quadratic(1.0, noise, seed, Optimizer(momentum), steps=100))
    assert found.largest_stable
    assert 0.5 < found.largest_stable < 2


def test_the_smoothed_curve_does_not_lag_behind_the_lr() -> None:
    """A loss that is linear in the log of the LR stays that line."""
    curve = RangeTest.empty()
    for step in range(100):
        curve.add(1e-5 * RISE**step, 3 - math.log(RISE**step))
    for one in curve.tried:
        assert one.smoothed == pytest.approx(3 - math.log(one.smoothed_lr / 1e-5), abs=1e-9)


def test_a_test_that_stays_stable_has_no_largest_lr() -> None:
    found = read(of_quadratic(1.0, 0.02, 0, top=2.0))  # up to 0.4 of the limit
    assert found.largest_stable is None
    assert found.suggestion == found.steepest
    assert "no largest stable LR found" in found.note


def test_a_loss_that_never_falls_tells_nothing() -> None:
    curve = of_quadratic(1.0, 0.5, 0, start=0.0)
    found = read(curve)
    assert (found.steepest, found.largest_stable, found.suggestion) == (None, None, None)
    assert "no LR found: the loss didn't fall by more than its noise" in found.note


def of_trained(fall: float, seed: int) -> RangeTest:
    """Return the range test of trained weights: noise whose first value is low, a fall at an LR of 0.01, an explosion.

    The noise is that of a finished digits run.
    """
    random, curve = np.random.default_rng(seed), RangeTest.empty()
    for step in range(200):
        lr = 1e-4 * RISE**step
        noise = 0.03 * random.standard_normal() if step else -0.05
        curve.add(lr, 0.5 + noise - fall / (1 + (0.01 / lr) ** 2) + lr**4)
        if curve.diverged():
            break
    return curve


@pytest.mark.parametrize("seed", range(8))
def test_a_low_first_loss_of_trained_weights_is_no_fall(seed: int) -> None:
    found = read(of_trained(0.0, seed))
    assert (found.steepest, found.largest_stable, found.suggestion) == (None, None, None)
    assert "no LR found: the loss didn't fall by more than its noise" in found.note


@pytest.mark.parametrize("seed", range(8))
def test_a_small_fall_of_trained_weights_is_found_where_it_is(seed: int) -> None:
    """The noise before it isn't taken for a fall, so that the lowest LR isn't suggested."""
    found = read(of_trained(0.2, seed))
    assert found.suggestion == pytest.approx(0.01, rel=0.7)
    assert found.largest_stable


@pytest.mark.parametrize("end", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_ends_the_test(end: float) -> None:
    curve = RangeTest.empty()
    for step in range(FEWEST // 2):
        curve.add(1e-4 * RISE**step, 1.0)
    assert not curve.diverged()
    curve.add(1e-2, end)
    assert curve.diverged()
    assert f"the loss isn't finite after {FEWEST // 2} steps" in read(curve).note
    assert len(curve.tried) == FEWEST // 2


def test_a_sudden_end_is_above_the_largest_stable_lr() -> None:
    """The loss fell until it was no longer finite."""
    curve = RangeTest.empty()
    for step in range(100):
        curve.add(1e-4 * RISE**step, 2 - step / 100)
    curve.add(1e-4 * RISE**100, math.nan)
    found = read(curve)
    assert found.largest_stable == curve.tried[-1].smoothed_lr
    assert found.note == ""
