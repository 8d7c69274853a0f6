"""Test the noisy quadratic against formulas by hand, and against a Monte Carlo of the same updates."""

from __future__ import annotations

import math

import numpy as np
import pytest

from isobatch.scaling.errors import UserError
from isobatch.scaling.tuning.quadratic import Array, Optimizer, Phase, Quadratic

PLAIN, HEAVY, NESTEROV = Optimizer(), Optimizer(0.9), Optimizer(0.9, nesterov=True)
OPTIMIZERS = pytest.mark.parametrize("optimizer", [PLAIN, HEAVY, NESTEROV], ids=["plain", "heavy ball", "Nesterov"])


def one(curvature: float = 0.5, noise: float = 3.0, start: float = 4.0) -> Quadratic:
    return Quadratic(np.array([curvature]), np.array([noise]), np.array([start]))


def test_one_dimension_by_hand() -> None:
    """E θ² after t steps is q^t·θ₀² + η²c/B·(1 − q^t)/(1 − q), with q = (1 − ηh)²."""
    q, noise = (1 - 0.2 * 0.5) ** 2, 0.2**2 * 3.0 / 8
    expected = q**25 * 4.0 + noise * (1 - q**25) / (1 - q)
    assert one().loss_after([Phase(25, 8, 0.2)]) == pytest.approx(0.5 * 0.5 * expected, rel=1e-12)


def test_steady_loss_by_hand() -> None:
    """½·ηc/(B(2 − ηh)) without momentum, ½·ηc/B·(1+m)/((1−m)(2(1+m) − ηh)) with heavy-ball momentum."""
    assert one().steady_loss(8, 0.2) == pytest.approx(0.5 * 0.2 * 3 / 8 / (2 - 0.1), rel=1e-12)
    heavy = 0.5 * 0.2 * 3 / 8 * 1.9 / (0.1 * (3.8 - 0.1))
    assert one().steady_loss(8, 0.2, HEAVY) == pytest.approx(heavy, rel=1e-12)
    assert one().steady_loss(8, 4.0) == math.inf
    assert one().steady_loss(math.inf, 0.2, NESTEROV) == pytest.approx(0, abs=1e-12)


@OPTIMIZERS
def test_the_steady_loss_is_that_after_many_steps(optimizer: Optimizer) -> None:
    model, lr = Quadratic.power_law(20), 0.3
    after = model.loss_after([Phase(20_000, 4, lr)], optimizer)
    assert after == pytest.approx(model.steady_loss(4, lr, optimizer), rel=1e-9)


@OPTIMIZERS
def test_the_loss_grows_beyond_the_largest_lr_alone(optimizer: Optimizer) -> None:
    model = Quadratic.power_law(10)
    largest = model.largest_lr(optimizer)
    assert model.loss_after([Phase(20_000, 4, 0.999 * largest)], optimizer) < 1e6
    assert model.loss_after([Phase(20_000, 4, 1.001 * largest)], optimizer) > 1e6


def simulated(model: Quadratic, phases: list[Phase], optimizer: Optimizer, chains: int) -> Array:
    """Return the final loss of many seeded trainings, by torch's own update written out."""
    draw = np.random.default_rng(0)
    theta = np.sqrt(model.start) * np.ones((chains, 1))
    velocity = np.zeros_like(theta)
    for steps, batch, lr in phases:
        for _ in range(steps):
            gradient = model.curvature * theta + np.sqrt(model.noise / batch) * draw.standard_normal(theta.shape)
            velocity = optimizer.momentum * velocity + gradient
            theta = theta - lr * (gradient + optimizer.momentum * velocity if optimizer.nesterov else velocity)
    return np.asarray((model.curvature * theta**2).sum(-1) / 2)


@OPTIMIZERS
def test_expected_losses_are_those_of_a_monte_carlo(optimizer: Optimizer) -> None:
    """The mean of n losses lies within 4 standard errors of the expectation, in all but 1 of 16,000 cases."""
    model, phases = Quadratic.power_law(6, noise=5.0), [Phase(12, 2, 0.3), Phase(9, 16, 0.1)]
    losses = simulated(model, phases, optimizer, 20_000)
    error = losses.std() / math.sqrt(losses.size)
    assert error < 0.01 * losses.mean()  # so that the test can tell a wrong formula
    assert abs(model.loss_after(phases, optimizer) - losses.mean()) < 4 * error


@OPTIMIZERS
def test_steps_to_a_target_are_the_first_ones_that_reach_it(optimizer: Optimizer) -> None:
    model, lrs, batch = Quadratic.power_law(10), (0.01, 0.05, 0.2, 1.0, 5.0), 8
    target = 0.2 * float(model.loss(model.start))
    found = model.steps_to(target, batch, lrs, optimizer)
    stable = [lr for lr in lrs if lr < model.largest_lr(optimizer)]
    first = next(n for n in range(1, 10_000)
                 if any(model.loss_after([Phase(n, batch, lr)], optimizer) <= target for lr in stable))  # fmt: skip
    assert found
    assert (found.steps, found.samples) == (first, first * batch)
    assert model.loss_after([Phase(first, batch, found.lr)], optimizer) <= target
    assert model.steps_to(target, batch, lrs, optimizer, most=first) == found
    assert model.steps_to(target, batch, lrs, optimizer, most=first - 1) is None
    assert model.steps_to(100.0, batch, lrs, optimizer) == (0, 0.0, 0.01)


def test_larger_batches_save_steps_below_the_critical_batch_alone() -> None:
    model = Quadratic.power_law(50)
    target = 0.1 * float(model.loss(model.start))
    critical = model.critical_batch(target)
    assert critical
    small, smaller, endless, large = model.samples_to(target, [critical / 32, critical / 16, math.inf, 32 * critical])
    assert small and smaller and endless and large  # noqa: PT018
    assert 0.45 < smaller.steps / small.steps < 0.6
    assert large.steps <= endless.steps + 1
    assert critical == pytest.approx(small.samples / endless.steps, rel=0.1)


def test_noise_scale_by_hand() -> None:
    """Σ cᵢ / Σ hᵢ²θᵢ² at θ² = (1, 4)."""
    model = Quadratic(np.array([1.0, 0.5]), np.array([3.0, 2.0]), np.ones(2))
    assert model.noise_scale(np.array([1.0, 4.0])) == pytest.approx(5 / (1 + 1))
    moved = model.moments([Phase(5, 4, 0.2)])[:, 0]
    assert model.noise_scale(moved) > model.noise_scale(model.start)  # it grows while the gradient shrinks


@pytest.mark.parametrize(
    "make",
    [
        lambda: Optimizer(1.0),
        lambda: one(curvature=0.0),
        lambda: one(noise=-1.0),
        lambda: one(start=math.nan),
        lambda: Quadratic(np.ones(2), np.ones(3), np.ones(2)),
        lambda: one().steps_to(math.nan, 8, [0.1]),
        lambda: one().loss_after([Phase(3, 0, 0.1)]),
    ],
)
def test_wrong_values_are_rejected(make: object) -> None:
    with pytest.raises(UserError):
        make()  # type: ignore[operator]
