"""Test the gradient noise scale on synthetic gradients with known |G|² and tr Σ."""

from __future__ import annotations

import doctest
import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from isobatch.scaling import noise
from isobatch.scaling.geometry import Cut, solve
from isobatch.scaling.noise import FEWEST, Estimate, Smoothed, estimate, unmeasurable
from isobatch.scaling.plan import Intervals
from isobatch.trainers.checkpoints.commit import compose
from isobatch.trainers.tensors.manifest import Damaged, parse, sealed
from tests.support.steps import walk
from tests.unit.test_manifest import header_of
from tests.unit.test_plan import make

HALVES = Intervals(None, None, None, noise=1, noise_parts=2)
DIMENSIONS = 20
SHAPE = np.linspace(0.2, 2, DIMENSIONS)  # share of each dimension in the variance
SHAPE /= SHAPE.sum()


def planted(scale: float, sizes: tuple[int, ...], runs: int, steps: int, seed: int = 0) -> list[list[Estimate]]:
    """Return estimates of steps with micro-batches of ``sizes`` samples, for |G|² = 1 and tr Σ = ``scale``."""
    random, batch = np.random.default_rng(seed), sum(sizes)
    mean = np.full(DIMENSIONS, DIMENSIONS**-0.5)
    parts_sq: NDArray[np.float64] = np.zeros((runs, steps))
    whole: NDArray[np.float64] = np.zeros((runs, steps, DIMENSIONS))
    for size in sizes:
        errors = random.standard_normal((runs, steps, DIMENSIONS)) * np.sqrt(scale * SHAPE / size)
        part = (mean + errors) * size / batch
        parts_sq += (part**2).sum(-1) / size
        whole += part
    whole_sq = (whole**2).sum(-1)
    rows = zip(parts_sq.tolist(), whole_sq.tolist(), strict=True)
    return [[estimate(p, w, batch, len(sizes)) for p, w in zip(*row, strict=True)] for row in rows]


def smoothed(estimates: list[Estimate]) -> Smoothed:
    found = Smoothed()
    for new in estimates:
        found = found.updated(new)
    return found


def test_docstring_examples_hold() -> None:
    assert doctest.testmod(noise).failed == 0


def test_equal_sizes_follow_the_papers_formulas() -> None:
    """Compare with McCandlish et al. 2018, A.1, with b = 4 and B = 12, for the norms of any three gradients."""
    parts = np.random.default_rng(0).standard_normal((3, 5))
    small_sq, big_sq = float((parts**2).sum(1).mean()), float((parts.mean(0) ** 2).sum())
    found = estimate(float(((parts / 3) ** 2).sum()) / 4, big_sq, 12, 3)
    assert found.grad_sq == pytest.approx((12 * big_sq - 4 * small_sq) / (12 - 4))
    assert found.trace == pytest.approx((small_sq - big_sq) / (1 / 4 - 1 / 12))


@pytest.mark.parametrize("sizes", [(1, 1), (16, 1), (5, 3, 3, 1), (2,) * 9])
def test_estimates_are_unbiased_whatever_the_sizes(sizes: tuple[int, ...]) -> None:
    (estimates,) = planted(30.0, sizes, runs=1, steps=40_000)
    for values, truth in (([e.grad_sq for e in estimates], 1.0), ([e.trace for e in estimates], 30.0)):
        error = float(np.std(values)) / len(values) ** 0.5
        assert abs(float(np.mean(values)) - truth) < 4 * error
        assert error < 0.3 * truth


def test_separate_averages_find_a_scale_far_above_the_batch() -> None:
    """A third of the ratios of single steps are negative here, so their mean has no meaning."""
    runs = planted(100.0, (4, 4, 4, 4), runs=20, steps=900)
    assert np.mean([e.grad_sq < 0 for run in runs for e in run]) > 0.3
    found = [known.scale for run in runs if (known := smoothed(run).scale())]
    assert len(found) == 20
    assert float(np.median(found)) == pytest.approx(100, rel=0.1)


@pytest.mark.parametrize(
    ("scale", "sizes", "steps"),
    [(10.0, (4, 4, 4, 4), 100), (10.0, (9, 7), 200), (30.0, (3, 3, 2), 280), (100.0, (8,) * 8, 100), (1.0, (2, 1), 30)],
)
def test_the_interval_has_its_stated_coverage(scale: float, sizes: tuple[int, ...], steps: int) -> None:
    found = [smoothed(run).scale() for run in planted(scale, sizes, runs=400, steps=steps)]
    known = [each for each in found if each]
    assert len(known) > 380
    assert 0.92 <= float(np.mean([each.low <= scale <= each.high for each in known])) <= 0.98
    assert all(0 <= each.low <= each.scale <= each.high for each in known)


def test_pure_noise_seldom_gives_a_scale() -> None:
    """If |G|² is negligible, the scale is mostly unknown, and the remaining estimates are valid numbers."""
    found = [smoothed(run).scale() for run in planted(1e9, (8, 8), runs=400, steps=60)]
    known = [each for each in found if each]
    assert len(known) <= 0.05 * len(found)
    assert all(0 <= each.low <= each.scale <= each.high < float("inf") for each in known)


def test_the_first_estimates_give_no_scale() -> None:
    (estimates,) = planted(1.0, (16, 16), runs=1, steps=FEWEST)
    assert smoothed(estimates[:-1]).scale() is None
    assert smoothed(estimates).scale() is not None
    assert Smoothed().scale() is None


def test_equal_samples_have_no_noise() -> None:
    found = smoothed([estimate(0.5**2 / 2 + 0.5**2 / 2, 1.0, 4, 2)] * FEWEST)
    assert found.scale() == noise.Scale(0.0, 0.0, 0.0)


def test_the_averages_look_back_over_a_share_of_the_run() -> None:
    """The n-th of N estimates has weight 5/(n + 4) · ∏ (1 − 5/(m + 4)) over the later ones."""
    values = np.random.default_rng(0).standard_normal((60, 2))
    found, weights = smoothed([Estimate(*row) for row in values.tolist()]), np.zeros(60)
    for n in range(1, 61):
        weights *= 1 - 5 / (n + 4)
        weights[n - 1] = 5 / (n + 4)
    means = weights @ values
    spread = (weights[:, None] * (values - means)).T @ (values - means)
    assert (found.grad_sq, found.trace) == (pytest.approx(means[0]), pytest.approx(means[1]))
    assert (found.grad_sq_var, found.trace_var) == (pytest.approx(spread[0, 0]), pytest.approx(spread[1, 1]))
    assert found.covariance == pytest.approx(spread[0, 1])
    assert found.weight_sq == pytest.approx(float((weights**2).sum()))
    assert float(weights[:20].sum()) < 0.01  # the first third of the run is forgotten


def test_a_falling_gradient_is_followed() -> None:
    """|G|² falls tenfold in 500 measurements; an average over a fixed 100 of them would read 60 % too much."""
    found, falling = Smoothed(), [10 ** (-n / 500) for n in range(500)]
    for value in falling:
        found = found.updated(Estimate(value, 1.0))
    assert found.grad_sq / falling[-1] < 1.6


def test_another_norm_starts_new_averages() -> None:
    raw = smoothed([Estimate(1.0, 2.0)] * 3)
    found = raw.updated(Estimate(5.0, 6.0), "adam")
    assert (found.count, found.grad_sq, found.metric) == (1, 5.0, "adam")
    assert found.updated(Estimate(7.0, 6.0), "adam").count == 2


def test_draws_without_replacement_are_corrected() -> None:
    """Over all ways to draw two halves from 6 samples, the mean of the corrected |G|² is that of the data."""
    samples = np.random.default_rng(0).standard_normal((6, 3))
    found = []
    for first in combinations(range(6), 2):
        for second in combinations(sorted({*range(6)} - {*first}), 1):
            one, other = samples[[*first]].mean(0), samples[[*second]].mean(0)
            trace = 2 * 1 / 3 * float(((one - other) ** 2).sum())
            found.append(Estimate(float(one @ other), trace).of_data(6))
    assert np.mean([each.trace for each in found]) == pytest.approx(float(samples.var(0, ddof=1).sum()))
    assert np.mean([each.grad_sq for each in found]) == pytest.approx(float((samples.mean(0) ** 2).sum()))


def test_one_micro_batch_gives_no_estimate() -> None:
    with pytest.raises(ValueError, match="needs at least 2 micro-batches, not 1"):
        estimate(1.0, 1.0, 8, 1)


def test_empty_micro_batches_are_not_counted() -> None:
    assert solve(4, global_size=3).filled == 3
    assert Cut(100, 17, 3, 2).filled == 6
    assert solve(2, global_size=8, granule=8).filled == 1


def test_a_step_of_one_micro_batch_is_reported_with_a_fix() -> None:
    plan = make(1000, batches=((0, 33),), world=1)
    assert "on 1 rank a step has only one" in (text := unmeasurable(plan) or "")
    assert "give batch.per_gpu=17, or more ranks" in text
    assert unmeasurable(replace(plan, per_gpu=17)) is None
    assert unmeasurable(replace(plan, world=2)) is None
    assert unmeasurable(replace(make(1000, batches=((0, 32), (320, 64)), world=1), per_gpu=32)) is None
    whole = replace(make(1000, batches=((0, 32),), world=2), granule=32)
    assert "on 2 ranks a step has only one, so nothing is measured; give a larger global batch" in (
        unmeasurable(whole) or ""
    )


@pytest.mark.parametrize(("granule", "size"), [(1, 1), (32, 32)])
def test_a_step_that_cannot_be_halved_is_reported_with_a_fix(granule: int, size: int) -> None:
    plan = replace(make(1000, batches=((0, size),), world=2, intervals=HALVES), granule=granule)
    assert f"noise.parts=2 measures how much the halves of a step differ, but a step of {size} sample" in (
        text := unmeasurable(plan) or ""
    )
    assert f"give batch.global_size={2 * granule} or more" in text
    assert not plan.step_at(0).measured  # type: ignore[union-attr]
    assert unmeasurable(make(1000, batches=((0, size), (320, 64)), world=2, intervals=HALVES)) is None


def test_uneven_halves_are_not_measured_where_cuts_have_to_be_even() -> None:
    plan = replace(make(1000, batches=((0, 6),), world=2, intervals=HALVES), even=True)
    assert "batch.even=true, and the halves of 6 samples aren't even" in (unmeasurable(plan) or "")
    step, uneven = plan.step_at(0), replace(plan, even=False).step_at(0)
    assert step is not None
    assert uneven is not None
    assert (step.measured, uneven.measured) == (False, True)
    assert unmeasurable(replace(make(1000, batches=((0, 8),), world=2, intervals=HALVES), even=True)) is None


def test_bitwise_pieces_are_not_parted() -> None:
    plan = make(1000, world=2, per_gpu=32, numerics="bitwise", intervals=HALVES)
    assert "can only halve a step between its micro-batches, and it has one" in (text := unmeasurable(plan) or "")
    assert "give batch.per_gpu=16" in text
    assert unmeasurable(replace(plan, per_gpu=16)) is None


@pytest.mark.parametrize("world", [1, 3])
def test_the_plan_knows_which_steps_are_measured(world: int) -> None:
    every = replace(HALVES, noise=96)
    steps = list(walk(make(1000, world=world, intervals=every)))
    assert [step.index for step in steps if step.halves] == [*range(2, len(steps), 3)]
    assert all(step.measured == bool(step.halves) for step in steps)
    assert {sum(cut.global_size for cut in step.parts) for step in steps} == {32}


def test_statistics_over_ranks_need_samples_in_each_half() -> None:
    few = make(1000, batches=((0, 4),), world=4, sync=True, intervals=HALVES)
    assert not few.step_at(0).measured  # type: ignore[union-attr]
    assert make(1000, batches=((0, 8),), world=4, sync=True, intervals=HALVES).step_at(0).measured  # type: ignore[union-attr]


def manifest(noise: Smoothed | None) -> bytes:
    files = [{"bytes": 8 + 2, "sha256": "", "slices": {}} for _ in range(2)]
    return compose(header_of(noise=noise), files, {})


def test_a_checkpoint_keeps_the_noise() -> None:
    (estimates,) = planted(10.0, (4, 4), runs=1, steps=17)
    found = smoothed(estimates)
    assert parse(manifest(found), Path()).header.noise == found


def test_checkpoints_without_noise_are_read() -> None:
    text = manifest(None)
    fields = {name: value for name, value in json.loads(text).items() if name not in ("sha256", "noise")}
    assert parse(sealed(json.dumps(fields).removeprefix("{").encode()), Path()).header.noise is None


@pytest.mark.parametrize(
    "change", [{"count": -1}, {"trace": "much"}, {"trace_var": -1.0}, {"more": 1}, {"weight_sq": 1e999}, {"count": 0.5}]
)
def test_impossible_noise_is_rejected_as_damage(change: dict[str, object]) -> None:
    fields = json.loads(manifest(Smoothed().updated(Estimate(1.0, 2.0))))
    del fields["sha256"]
    fields["noise"] |= change
    with pytest.raises(Damaged, match=r"noise|Infinity"):
        parse(sealed(json.dumps(fields).removeprefix("{").encode()), Path())
