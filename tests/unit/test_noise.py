"""Test the gradient noise scale on synthetic gradients with known |G|² and tr Σ."""

from __future__ import annotations

import doctest
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from isobatch.scaling import noise
from isobatch.scaling.geometry import Cut, solve
from isobatch.scaling.noise import FEWEST, MEMORY, Estimate, Smoothed, estimate, filled, student, unmeasurable
from isobatch.trainers.checkpoints.commit import compose
from isobatch.trainers.tensors.manifest import Damaged, parse, sealed
from tests.unit.test_manifest import header_of
from tests.unit.test_plan import make

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
    runs = planted(100.0, (4, 4, 4, 4), runs=20, steps=300)
    assert np.mean([e.grad_sq < 0 for run in runs for e in run]) > 0.3
    found = [known.scale for run in runs if (known := smoothed(run).scale())]
    assert len(found) == 20
    assert float(np.median(found)) == pytest.approx(100, rel=0.1)


@pytest.mark.parametrize(
    ("scale", "sizes", "steps"),
    [(10.0, (4, 4, 4, 4), 100), (10.0, (9, 7), 100), (30.0, (3, 3, 2), 200), (100.0, (8,) * 8, 100), (1.0, (2, 1), 30)],
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


def test_the_first_estimates_weigh_the_same_and_old_ones_decay() -> None:
    values = [Estimate(float(i), 3.0 * i) for i in range(1, 5)]
    found = smoothed(values)
    assert found.grad_sq == pytest.approx(2.5, rel=0.01)
    assert found.trace_var == pytest.approx(9 * 1.25, rel=0.02)
    assert found.covariance == pytest.approx(3 * 1.25, rel=0.02)
    assert found.weight_sq == pytest.approx(1 / 4, rel=0.01)
    before = smoothed([Estimate(1.0, 1.0)] * 1000)
    assert (before.grad_sq, before.trace_var) == (pytest.approx(1), pytest.approx(0))
    after = before
    for _ in range(MEMORY):
        after = after.updated(Estimate(2.0, 5.0))
    assert after.grad_sq == pytest.approx(2 - np.exp(-1), rel=1e-3)
    assert after.trace == pytest.approx(5 - 4 * np.exp(-1), rel=1e-3)
    assert after.weight_sq == pytest.approx(1 / (2 * MEMORY), rel=0.01)


def test_quantiles_equal_those_of_tables() -> None:
    for freedom, quantile in ((9, 2.2622), (20, 2.0860), (60, 2.0003), (1e9, 1.95996)):
        assert student(freedom) == pytest.approx(quantile, rel=3e-3)


def test_one_micro_batch_gives_no_estimate() -> None:
    with pytest.raises(ValueError, match="needs at least 2 micro-batches, not 1"):
        estimate(1.0, 1.0, 8, 1)


def test_empty_micro_batches_are_not_counted() -> None:
    assert filled(solve(4, global_size=3)) == 3
    assert filled(Cut(100, 17, 3, 2)) == 6
    assert filled(solve(2, global_size=8, granule=8)) == 1


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
