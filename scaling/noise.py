"""The gradient noise scale: how much the gradients of samples differ, relative to their mean.

Glossary: G is the mean gradient over all samples, Σ the covariance of one sample's gradient, B the global batch in
samples. A step is cut into n micro-batches (or halves) of b_j samples (Σ_j b_j = B) with mean gradients g_j; g_B is the
gradient of the whole step. The simple noise scale is tr Σ / |G|², in samples: at a batch of that size, half of |g_B|²
is noise.

The noise scale isn't the critical batch and can be far from it; it shows the trend (Merrill et al. 2025).
Source: McCandlish et al. 2018, arXiv:1812.06162, appendix A.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from isobatch.scaling.geometry import counted, halves
from isobatch.scaling.limits import Count
from isobatch.scaling.quantiles import student

if TYPE_CHECKING:
    from isobatch.scaling.plan import Plan

FORGETTING = 5  # weight of the n-th estimate: 5/(n + 4), so the averages look back over the last third of the run
FEWEST = 10  # measurements before the first interval
Metric = Literal["raw", "adam", "muon"]
"""The norm in which gradients are measured: as they are, or in the geometry of the optimizer's steps."""


class Norm(NamedTuple):
    """Hold the norm in which the gradients of a step are measured, and a description for the user."""

    name: Metric
    text: str


RAW = Norm("raw", "raw")


@dataclass(frozen=True, slots=True)
class Estimate:
    """Hold the estimates of one step. They are unbiased, and so noisy that ``grad_sq`` is often negative.

    Attributes:
        grad_sq: |G|².
        trace: tr Σ, in the same unit (that of a squared gradient).
    """

    grad_sq: float
    trace: float

    def of_data(self, samples: int) -> Estimate:
        """Return the estimates for a data set of ``samples``, from which each epoch draws without replacement.

        Two parts of a step then have no sample in common: E⟨g₁, g₂⟩ = |G|² − tr Σ / N, with the mean G over the data.

        >>> Estimate(grad_sq=1.0, trace=50.0).of_data(100)
        Estimate(grad_sq=1.5, trace=50.0)
        """
        return Estimate(self.grad_sq + self.trace / samples, self.trace)


def estimate(parts_sq: float, whole_sq: float, batch: int, micro_batches: int) -> Estimate:
    """Return the estimate of one step from squared gradient norms.

    A mean of b gradients has E|g_b|² = |G|² + tr Σ / b, so for micro-batches of any sizes

        tr Σ = (Σ_j b_j |g_j|² − B |g_B|²) / (n − 1),     |G|² = |g_B|² − tr Σ / B.

    With n equal micro-batches, Σ_j b_j |g_j|² is B times the mean of |g_j|², which gives the paper's formulas.
    Micro-batch j accumulates p_j = b_j g_j / B into g_B = Σ_j p_j.

    Args:
        parts_sq: Σ_j |p_j|² / b_j over the non-empty micro-batches.
        whole_sq: |g_B|², before clipping.
        batch: B.
        micro_batches: n, the number of non-empty micro-batches.

    Raises:
        ValueError: there are fewer than two micro-batches to compare.

    For 3 samples in two micro-batches, 2 samples with mean gradient 3 and 1 with gradient 6:

    >>> estimate(parts_sq=2.0**2 / 2 + 2.0**2 / 1, whole_sq=4.0**2, batch=3, micro_batches=2)
    Estimate(grad_sq=14.0, trace=6.0)
    """
    if micro_batches < 2:
        raise ValueError(f"the noise scale needs at least 2 micro-batches, not {micro_batches}")
    trace = max(0.0, batch * (batch * parts_sq - whole_sq) / (micro_batches - 1))  # only rounding makes it negative
    return Estimate(whole_sq - trace / batch, trace)


@dataclass(frozen=True, slots=True)
class Scale:
    """Hold the noise scale in samples, and its interval: 95 % if the scale stood still, less as it rises."""

    scale: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Smoothed:
    """Hold moving averages of the estimates, separately for numerator and denominator: a mean of ratios is biased.

    The n-th estimate has weight 5/(n + 4), so the averages look back over a share of the run, not over a number of
    estimates: |G|² falls all the time, and an old one hides it. n estimates are worth 0.36 n + 0.7 equal ones.

    Attributes:
        count: number of estimates.
        grad_sq, trace: averages of |G|² and tr Σ.
        grad_sq_var, trace_var, covariance: of single estimates around these averages.
        weight_sq: sum of the squared weights, which sum to 1. An average has this share of one estimate's variance.
        metric: the norm of all estimates.
    """

    count: Count = 0
    grad_sq: float = 0.0
    trace: float = 0.0
    grad_sq_var: float = 0.0
    trace_var: float = 0.0
    covariance: float = 0.0
    weight_sq: float = 0.0
    metric: Metric = "raw"

    def __post_init__(self) -> None:
        finite = all(map(math.isfinite, astuple(self)[:-1])) and min(self.count, self.grad_sq_var, self.trace_var) >= 0
        if not finite or (self.count > 1 and not 0 < self.weight_sq < 1):
            raise ValueError(f"{self} isn't a valid average of estimates")

    def updated(self, new: Estimate, metric: Metric = "raw") -> Smoothed:
        """Return the averages with one more estimate; estimates in another ``metric`` are dropped.

        Raises:
            ValueError: the estimate isn't finite, or its square overflows.
        """
        if metric != self.metric:
            return Smoothed(metric=metric).updated(new, metric)
        weight = FORGETTING / (self.count + FORGETTING)
        off, off_trace = new.grad_sq - self.grad_sq, new.trace - self.trace

        def spread(before: float, product: float) -> float:
            return (1 - weight) * (before + weight * product)

        return Smoothed(
            count=self.count + 1,
            grad_sq=self.grad_sq + weight * off,
            trace=self.trace + weight * off_trace,
            grad_sq_var=spread(self.grad_sq_var, off * off),
            trace_var=spread(self.trace_var, off_trace * off_trace),
            covariance=spread(self.covariance, off * off_trace),
            weight_sq=(1 - weight) ** 2 * self.weight_sq + weight**2,
            metric=metric,
        )

    def scale(self) -> Scale | None:
        """Return tr Σ / |G|² with its interval, or None if the interval is unbounded.

        The interval holds every ratio θ consistent with the averages T of tr Σ and D of |G|² (Fieller 1954):

            (T − θD)² ≤ t² (var T − 2θ cov(T, D) + θ² var D).

        It is bounded if D is positive beyond its error, D² > t² var D. t is Student's quantile at the effective
        degrees of freedom of the weights.
        """
        if self.count < FEWEST:
            return None
        error_sq = student(1 / self.weight_sq - 1) ** 2 * self.weight_sq / (1 - self.weight_sq)
        a = self.grad_sq * self.grad_sq - error_sq * self.grad_sq_var
        if self.grad_sq <= 0 or a <= 0:
            return None
        b = self.grad_sq * self.trace - error_sq * self.covariance
        c = self.trace * self.trace - error_sq * self.trace_var
        half = math.sqrt(max(0.0, b * b - a * c))
        return Scale(self.trace / self.grad_sq, max(0.0, (b - half) / a), (b + half) / a)


def unmeasurable(plan: Plan) -> str | None:
    """Return a message with a fix if every step is a single micro-batch, which can't be measured, else None."""
    cut = plan.cut
    if plan.noise[1]:
        return _unhalvable(plan)
    if any(stage.cut.filled > 1 for stage in plan.stages):
        return None
    half = -(-cut.global_size // cut.granule // 2) * cut.granule
    fix = f"batch.per_gpu={plan.sized(half)}, or more ranks" if half < cut.global_size else "a larger global batch"
    one = f"on {counted(cut.world, 'rank')} a step has only one, so nothing is measured"
    return f"noise.every measures how much the micro-batches of a step differ, but {one}; give {fix}"


def _unhalvable(plan: Plan) -> str | None:
    cut = plan.cut
    if any(plan.halves(stage.cut) for stage in plan.stages):
        return None
    if plan.even and halves(cut):
        one = f"batch.even=true, and the halves of {plan.size(cut.global_size)} aren't even"
        fix = "leave out batch.even, or give a global batch whose halves are even"
    elif cut.pieces:
        one = "numerics=bitwise can only halve a step between its micro-batches, and it has one"
        half = -(-cut.global_size // cut.granule // 2) * cut.granule
        fix = f"give batch.per_gpu={plan.sized(half)}" if half < cut.global_size else "give a larger global batch"
    else:
        one = f"a step of {plan.size(cut.global_size)} can't be halved"
        fix = f"give batch.global_size={plan.sized(2 * cut.granule)} or more"
    return f"noise.parts=2 measures how much the halves of a step differ, but {one}, so nothing is measured; {fix}"
