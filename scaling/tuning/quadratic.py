"""Simulate SGD on a noisy quadratic in closed form, to check rules and forecasts without training. Torch-free.

The loss is ½·Σ hᵢθᵢ². A gradient over a batch B is hᵢθᵢ + noise of variance cᵢ/B, independent of θ. Expected losses
follow from the second moments of each dimension, a linear recursion, so that no random number is drawn.

Source: Zhang et al. 2019, arXiv:1907.04164, whose model has cᵢ = hᵢ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from isobatch.scaling.errors import UserError

Array = npt.NDArray[np.float64]

BLOCK = 64  # steps whose losses are computed at once
RATES = tuple(0.9 * 2 ** (-i / 4) for i in range(60))  # tried shares of the largest stable LR, down to 3e-5


class Phase(NamedTuple):
    """Steps at one batch and learning rate."""

    steps: int
    batch: float
    lr: float


class Reached(NamedTuple):
    """What a target took: steps, samples, and the learning rate that took the fewest."""

    steps: int
    samples: float
    lr: float


@dataclass(frozen=True, slots=True)
class Optimizer:
    """SGD as torch has it: v ← m·v + g; θ ← θ − η·v, or θ ← θ − η·(g + m·v) with Nesterov momentum."""

    momentum: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise UserError(f"momentum={self.momentum:g}", "give 0 or more, and less than 1", "momentum", self.momentum)

    def largest_lr(self, curvature: float) -> float:
        """Return the LR from which on the expected loss grows without bound in a dimension of this curvature."""
        m = self.momentum
        return 2 * (1 + m) / (curvature * (1 + 2 * m if self.nesterov else 1))

    def step(self, curvature: Array, lr: Array) -> tuple[Array, ...]:
        """Return a, b, p and c, d, q of one step: θ ← aθ + bv + p·noise, v ← cθ + dv + q·noise."""
        m = self.momentum
        of_gradient, of_velocity = (lr * (1 + m), lr * m * m) if self.nesterov else (lr, lr * m)
        return np.broadcast_arrays(1 - of_gradient * curvature, -of_velocity, -of_gradient, curvature, m, 1.0)


SGD = Optimizer()


@dataclass(frozen=True, slots=True)
class Quadratic:
    """A noisy quadratic.

    Attributes:
        curvature: hᵢ > 0; ``noise``: cᵢ ≥ 0, the variance of the gradient of one sample.
        start: E θᵢ² before the first step.
    """

    curvature: Array
    noise: Array
    start: Array

    def __post_init__(self) -> None:
        if not (self.curvature.ndim == 1 and self.curvature.shape == self.noise.shape == self.start.shape):
            raise UserError("curvature, noise and start aren't lists of one length", "give a value per dimension")
        if not all(np.isfinite(array).all() for array in (self.curvature, self.noise, self.start)):
            raise UserError("curvature, noise or start has a value that isn't finite", "give finite values")
        if not self.curvature.size or self.curvature.min() <= 0 or min(self.noise.min(), self.start.min()) < 0:
            raise UserError("a curvature isn't positive, or a noise or start is negative", "give a convex quadratic")

    @classmethod
    def power_law(cls, dimensions: int = 100, decay: float = 1.0, noise: float = 1.0) -> Quadratic:
        """Return one with hᵢ = i^−decay, cᵢ = noise·hᵢ and E θᵢ² = 1, as in the paper's figures for decay = 1."""
        curvature = np.arange(1, dimensions + 1, dtype=np.float64) ** -decay
        return cls(curvature, noise * curvature, np.ones(dimensions))

    def loss(self, squares: npt.NDArray[np.floating[Any]]) -> Array:
        """Return the expected loss at these E θᵢ² [..., dimensions]."""
        return np.asarray((self.curvature * squares).sum(-1) / 2)

    def moments(self, phases: Sequence[Phase], optimizer: Optimizer = SGD) -> Array:
        """Return E θ², E θv and E v² [dimensions, 3] after all phases, exactly, by matrix powers.

        The velocity v starts at 0 and is kept from phase to phase. Where training diverges, values may be inf or nan.
        """
        state = self._first()
        with np.errstate(over="ignore", invalid="ignore"):
            for steps, batch, lr in phases:
                state = np.linalg.matrix_power(self._transition(np.float64(lr), batch, optimizer), steps) @ state
        return state[..., :3, 0]

    def loss_after(self, phases: Sequence[Phase], optimizer: Optimizer = SGD) -> float:
        """Return the expected loss after all phases; inf where it is too large for a float."""
        loss = float(self.loss(self.moments(phases, optimizer)[:, 0]))
        return math.inf if math.isnan(loss) else loss

    def largest_lr(self, optimizer: Optimizer = SGD) -> float:
        """Return the LR from which on training diverges. Noise doesn't change it, as it doesn't depend on θ."""
        return optimizer.largest_lr(float(self.curvature.max()))

    def steady_loss(self, batch: float, lr: float, optimizer: Optimizer = SGD) -> float:
        """Return the expected loss after any number of steps at this batch and LR; inf beyond the largest LR."""
        if not 0 < lr < self.largest_lr(optimizer):
            return math.inf
        whole = self._transition(np.float64(lr), batch, optimizer)
        fixed = np.linalg.solve(np.eye(3) - whole[..., :3, :3], whole[..., :3, 3:])
        return float(self.loss(fixed[..., 0, 0]))

    def noise_scale(self, squares: Array) -> float:
        """Return tr Σ/|G|² in samples, where θ has these E θᵢ² [dimensions] (McCandlish et al. 2018, eq. 2.9)."""
        return float(self.noise.sum() / (self.curvature**2 * squares).sum())

    def steps_to(
        self, target: float, batch: float, lrs: Sequence[float], optimizer: Optimizer = SGD, most: int = 100_000
    ) -> Reached | None:
        """Return what the expected loss took to come down to ``target`` at the best of ``lrs``.

        Args:
            lrs: constant learning rates. Those that diverge, or whose steady loss is above the target, count too:
                momentum may carry the loss below it on its way.

        Returns:
            None if no LR reached it within ``most`` steps.
        """
        _refuse(target, batch)
        if self.loss(self.start) <= target:
            return Reached(0, 0.0, lrs[0])
        stable = np.array([lr for lr in lrs if 0 < lr < self.largest_lr(optimizer)])
        if not stable.size:
            return None
        one = self._transition(stable[:, None], batch, optimizer)
        rows = [one[..., 0, :]]  # of the matrices of 1, 2, … steps, the rows that give E θ²
        for _ in range(BLOCK - 1):
            rows.append((rows[-1][..., None, :] @ one)[..., 0, :])
        ahead, leap, state = np.stack(rows), np.linalg.matrix_power(one, BLOCK), self._first()[None]
        for before in range(0, most, BLOCK):
            losses = self.loss((ahead * state[..., 0][None]).sum(-1))  # [steps, lrs]
            if (found := np.argwhere(losses <= target)).size:
                steps = int(found[0, 0])
                best = int(losses[steps].argmin())
                total = before + steps + 1
                return Reached(total, total * batch, float(stable[best])) if total <= most else None
            state = leap @ state
        return None

    def samples_to(
        self, target: float, batches: Sequence[float], optimizer: Optimizer = SGD, most: int = 100_000
    ) -> list[Reached | None]:
        """Return what the target took at each batch, at the best LR of a grid from the largest stable one down."""
        lrs = [share * self.largest_lr(optimizer) for share in RATES]
        return [self.steps_to(target, batch, lrs, optimizer, most) for batch in batches]

    def critical_batch(self, target: float, optimizer: Optimizer = SGD, least: float = 1.0) -> float | None:
        """Return E_min/S_min of the curve of samples to the target, the batch at which its two straight ends meet.

        Args:
            least: the batch that is taken for a small one; that the samples no longer fall below it, check.

        Returns:
            None if a batch of ``least``, or one of endless size, doesn't reach the target.
        """
        small, endless = self.samples_to(target, [least, math.inf], optimizer, most=2_000_000)
        return small.samples / endless.steps if small and endless and endless.steps else None

    def _first(self) -> Array:
        """Return (E θ², E θv, E v², 1) [dimensions, 4, 1] before the first step."""
        zeros, ones = np.zeros_like(self.start), np.ones_like(self.start)
        return np.stack([self.start, zeros, zeros, ones], -1)[..., None]

    def _transition(self, lr: Array | np.float64, batch: float, optimizer: Optimizer) -> Array:
        """Return the matrix [..., dimensions, 4, 4] that takes (E θ², E θv, E v², 1) one step further."""
        _refuse(1.0, batch)
        a, b, p, c, d, q = optimizer.step(self.curvature, np.asarray(lr))
        variance = self.noise / batch
        entries: list[Any] = [
            *(a * a, 2 * a * b, b * b, p * p * variance),
            *(a * c, a * d + b * c, b * d, p * q * variance),
            *(c * c, 2 * c * d, d * d, q * q * variance),
            *(0, 0, 0, 1),
        ]
        return np.stack(np.broadcast_arrays(*entries), -1).reshape(*a.shape, 4, 4)


def _refuse(target: float, batch: float) -> None:
    """Raise UserError unless a target is finite and positive, and a batch positive; an endless one has no noise."""
    if not (math.isfinite(target) and target > 0):
        raise UserError(f"the target is {target:g}", "give a positive, finite loss")
    if not batch > 0:
        raise UserError(f"the batch is {batch:g}", "give a positive one")
