"""Test the search for the largest per-GPU batch on simulated memory curves, and the arithmetic of estimates."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from math import lcm

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isobatch.conf.compose import compose
from isobatch.scaling.errors import UserError
from isobatch.scaling.plan import EnginePlacement
from isobatch.scaling.planning.resolve import resolve
from isobatch.scaling.tuning.estimated import (
    Estimate,
    estimate,
    from_json,
    memory_rows,
    refuse_absurd,
    refuse_too_small,
    shorter_state,
    what_helps,
)
from isobatch.scaling.tuning.footprint import Footprint, Pass, curve, placed
from isobatch.scaling.tuning.memory import EIGHTS, PROBES, Bounds, Limit, Probe, concluded, next_size, told

GB = 1_000_000_000
MARGIN = 0.2
DDP = EnginePlacement("ddp")


def search(
    peak: Callable[[int], float], bounds: Bounds, prior: Callable[[float], float] | None, noise: Callable[[], float]
) -> list[Probe]:
    """Probe a memory curve until the search ends."""
    probes: list[Probe] = []
    while (size := next_size(probes, bounds, prior)) is not None:
        probes.append(Probe(size, int(peak(size) * noise())))
    return probes


@settings(max_examples=150, deadline=None)
@given(
    weights=st.floats(1e7, 1e10),
    states=st.sampled_from([0, 1, 2]),
    update=st.floats(1, 2.2),
    growing=st.floats(0, 1),
    largest=st.floats(16, 20_000),
    share=st.floats(1.05, 20),
    wrong=st.floats(0.85, 1.15),
    granule=st.sampled_from([1, 3, 32]),
    rng=st.randoms(use_true_random=False),
)
def test_a_search_finds_the_largest_batch_in_few_probes_and_never_leaves_the_limit(
    weights: float, states: int, update: float, growing: float, largest: float, share: float, wrong: float,
    granule: int, rng: st.DataObject,
) -> None:  # fmt: skip
    lasting = weights * (1 + states)
    step, fixed = lasting + weights * update, lasting + weights * growing
    room = step * share
    each = (room - fixed) / (largest * granule)

    def peak(size: float) -> float:
        return max(step, fixed + each * size)

    def prior(size: float) -> float:
        return lasting + wrong * (peak(size) - lasting)

    bounds = Bounds(room, least=granule, first=granule, granule=granule, lasting=lasting)
    probes = search(peak, bounds, prior, lambda: rng.uniform(0.998, 1.002))  # type: ignore[attr-defined]
    found = concluded(probes, bounds, Limit(int(room / (1 - MARGIN)), "a test"), MARGIN)
    assert len(probes) <= PROBES
    assert all((probe.peak or 0) < room / (1 - MARGIN) for probe in probes), "a probe needed more than the limit"
    assert found.per_gpu in [probe.per_gpu for probe in probes], "it was never run"
    assert found.per_gpu % granule == 0
    assert peak(found.per_gpu) <= 1.002 / 0.998 * room
    stride = lcm(EIGHTS, granule)
    if share > 1.2:  # else the batch's part of the memory is so small that its noise hides it
        assert found.per_gpu >= min(0.95 * largest * granule, bounds.whole(largest * granule - 1) - stride)


def test_without_an_estimate_no_probe_leaves_the_limit() -> None:
    peaks = [lambda size: max(3e9, 2e9 + 1e7 * size), lambda size: 1e9 + 1e8 * size]
    for peak in peaks:
        bounds = Bounds(8e9, least=2, first=2, lasting=1e9)
        probes = search(peak, bounds, None, lambda: 1.0)
        assert all((probe.peak or 0) <= 8e9 for probe in probes)
        assert len(probes) > 2


def test_the_cap_ends_the_search() -> None:
    bounds = Bounds(8e9, least=2, first=2, cap=36, lasting=1e9)
    probes = search(lambda size: 1e9 + 1e6 * size, bounds, lambda size: 1e9 + 1e6 * size, lambda: 1.0)
    assert [probe.per_gpu for probe in probes] == [2, 36]
    assert concluded(probes, bounds, Limit(10 * GB, "a test"), MARGIN).outcome == "cap"


def test_nothing_fits() -> None:
    bounds = Bounds(8e9, least=2, first=2)
    probes = search(lambda size: 9e9, bounds, None, lambda: 1.0)
    found = concluded(probes, bounds, Limit(10 * GB, "cluster.memory_gb"), MARGIN)
    assert (found.per_gpu, found.outcome, len(probes)) == (0, "nothing", 1)
    assert "nothing fits" in told(found)
    assert "cluster.memory_gb" in told(found)


def test_a_size_that_ran_out_of_memory_bounds_the_search() -> None:
    """The size before a restart is known from the journal."""
    bounds = Bounds(8e9, least=2, first=2, lasting=1e9)
    probes = [Probe(2, int(1.2e9)), Probe(40, None)]
    while (size := next_size(probes, bounds)) is not None:
        assert size < 40
        probes.append(Probe(size, int(1e9 + 1e8 * size)))
    assert concluded(probes, bounds, Limit(10 * GB, "a test"), MARGIN).per_gpu < 40


def test_memory_that_runs_out_where_nothing_predicts_it_leaves_a_probe_for_what_fits() -> None:
    bounds, probes = Bounds(8e9, least=2, first=2, cap=64, lasting=1e9), list[Probe]()
    while (size := next_size(probes, bounds)) is not None:
        probes.append(Probe(size, int(1e9 + 1e6 * size) if size <= 24 else None))
    assert concluded(probes, bounds, Limit(10 * GB, "a test"), MARGIN).per_gpu == 24


def test_a_size_that_is_taken_for_too_large_is_told_with_its_reason() -> None:
    bounds = Bounds(8e9, least=2, first=2, cap=64, lasting=1e9)
    probes = [Probe(2, int(1e9)), Probe(64, None, "a test")]
    assert (next_size(probes, bounds) or 0) <= 32
    found = concluded(probes, bounds, Limit(10 * GB, "a limit"), MARGIN)
    assert found.probes[1] == {"per_gpu": 64, "peak_gb": None, "why": "a test"}
    assert "64 samples counted as too large, since a test" in told(found)


def test_a_result_is_plain_json() -> None:
    bounds = Bounds(8e9, least=2, first=2, lasting=1e9)
    probes = search(lambda size: 1e9 + 1e7 * size, bounds, lambda size: 1e9 + 1e7 * size, lambda: 1.0)
    found = concluded(probes, bounds, Limit(10 * GB, "a test"), MARGIN, lambda size: 1e9 + 1.1e7 * size).as_json()
    assert json.loads(json.dumps(found)) == found
    assert found["per_sample_mb"] == pytest.approx(10)
    assert found["fixed_gb"] == pytest.approx(1)
    assert found["estimate"]["error"] == pytest.approx(0.1 * 7 / 8, abs=0.02)


def footprint() -> Footprint:
    passes = tuple(Pass(size, 100 + 7 * size, 3 * size) for size in (2, 4, 8))
    return Footprint(parameters=100, gradients=100, optimizer=200, block=20, rest=10, passes=passes)


def test_sharding_needs_less_where_it_shards() -> None:
    fixed = {
        name: placed(footprint(), EnginePlacement(name, stage), 4)[1] for name, stage in (("ddp", None), ("fsdp", None))
    }
    assert fixed["ddp"] == 400
    assert fixed["fsdp"] == 100 + 10 + 3 * 20
    stages = [placed(footprint(), EnginePlacement("deepspeed", stage), 4)[1] for stage in (1, 2, 3)]
    assert stages == sorted(stages, reverse=True)
    assert stages[0] != stages[1] != stages[2]


def test_a_single_pass_holds_no_gradient_of_an_earlier_one() -> None:
    alone, several = (curve(footprint(), DDP, 1, accumulates=accumulates) for accumulates in (False, True))
    assert alone
    assert several
    assert (alone.peak(16), several.peak(16)) == (300 + 100 + 7 * 16, 400 + 3 * 16)
    assert several.largest(400 + 3 * 100) == 100


def test_what_optimizer_auto_would_have_to_know_is_said() -> None:
    """With Adam's state nothing fits, with Adafactor 24 samples do: (400 - 210) / 7, in eights."""
    plan = resolve(compose(["task=digits", "batch.global_size=8", "optimizer=adamw"]), 1)
    small = replace(footprint(), optimizer=10)
    others = {"optimizer=adafactor": small}
    found = estimate(plan, footprint(), (400, "a test"), 0.0, others, {}, automatic="adamw")
    assert (found.per_gpu, found.ways[-1].per_gpu) == (0, 24)
    assert "adamw" in (shorter_state(found) or "")
    assert "24 samples" in (shorter_state(found) or "")
    assert shorter_state(replace(found, automatic="")) is None
    assert from_json(json.loads(json.dumps(found.as_json()))) == found


def estimated(limit: float, *overrides: str, source: str = "cluster.gpu_memory_gb") -> Estimate:
    plan = resolve(compose(["task=digits", "batch.global_size=32", "optimizer=adamw", *overrides]), 1)
    others = {"optimizer=adafactor": replace(footprint(), optimizer=10)}
    return estimate(plan, footprint(), (limit, source), 0.0, others, {})


def test_accumulation_halves_the_per_gpu_batch_until_it_fits() -> None:
    """32 samples in one pass need 300 + 100 + 7·32 bytes; in passes of 8 samples 400 + 3·8."""
    (way, other) = estimated(430).ways
    assert (way.change, way.per_gpu, way.accumulation) == ("batch.per_gpu=8", 8, 4)
    assert way.planned_gb == pytest.approx(424e-9)
    assert (other.planned_gb, other.accumulation) == (pytest.approx((210 + 7 * 32) * 1e-9), None)
    assert not any(way.accumulation for way in estimated(401).ways)  # not even one sample fits
    assert "batch.per_gpu=16" in [way.change for way in estimated(5000).ways]
    bitwise = ("numerics=bitwise", "batch.per_gpu=32")
    assert not any(way.accumulation for way in estimated(5000, *bitwise).ways)


def test_a_per_gpu_batch_beyond_a_step_says_how_much_of_it_the_run_uses() -> None:
    found = estimated(10_000)
    assert found.share == 32
    assert (found.per_gpu or 0) > 1000
    assert any("of which a step of this run uses 32" in text for _, text in memory_rows(found))
    assert not any("uses" in text for _, text in memory_rows(estimated(430)))


def test_an_engine_on_more_ranks_is_estimated_at_the_per_gpu_batch_that_it_plans() -> None:
    """Each of 4 ranks has 8 of 32 samples: shards of 25, 25 and 50 bytes, 10 + 3·20 that are gathered, and 3·8."""
    plan = resolve(compose(["task=digits", "batch.global_size=32", "optimizer=adamw"]), 1)
    on_4 = replace(plan.dealt(4, None), engine=EnginePlacement("fsdp"))
    found = estimate(plan, footprint(), (5000, "a test"), 0.0, {}, {"engine=fsdp": on_4})
    (sharded,) = (way for way in found.ways if way.change == "engine=fsdp")
    assert (sharded.planned, sharded.planned_gb) == (8, pytest.approx((100 + 70 + 24) / GB))
    assert any("engine=fsdp" in text and "at 8 samples" in text for _, text in memory_rows(found))


def test_a_change_that_needs_more_and_fits_no_more_is_left_out() -> None:
    plan = resolve(compose(["task=digits", "batch.global_size=1", "optimizer=adamw"]), 1)  # can't accumulate
    changed = {"more": replace(footprint(), buffers=11), "same": footprint(), "less": replace(footprint(), optimizer=9)}
    found = estimate(plan, footprint(), (5000, "a test"), 0.0, changed, {})
    assert [way.change for way in found.ways] == ["less"]
    del changed["less"]
    for limit, fits in ((5000, "which fits"), (150, "nothing fits")):
        found = estimate(plan, footprint(), (limit, "a test"), 0.0, changed, {})
        texts = [text for _, text in memory_rows(found)]
        assert texts[-1] == "no change that the estimate knows needs less"
        assert fits in texts[-2]
        assert not any("below" in text for text in texts)


def test_the_bias_on_a_cpu_and_the_context_of_a_gpu_are_said() -> None:
    ((_, gpu), *_), ((_, cpu), *_) = (
        memory_rows(replace(estimated(430), process_gb=process)) for process in (0.0, 0.3)
    )
    assert "CUDA" in gpu
    assert "too low" not in gpu
    assert "CUDA" not in cpu
    assert "too low" in cpu


def test_where_nothing_fits_it_is_said_what_would() -> None:
    text = what_helps(estimated(395))
    assert "weights, gradients and optimizer state need 0.4 kB" in text
    assert "optimizer=adafactor (56 samples per GPU)" in text  # 210 + 3·56 bytes, in passes
    assert "no change" in what_helps(estimated(150))


def test_a_limit_below_the_weights_is_rejected_with_what_they_need() -> None:
    with pytest.raises(UserError, match=r"0\.4 kB") as error:
        refuse_too_small(estimated(50))
    assert error.value.key == "cluster.gpu_memory_gb"
    refuse_too_small(estimated(50, source="the device"))  # what it has can't be changed
    refuse_too_small(estimated(150))  # nothing fits, but the number isn't absurd
    plan = resolve(compose(["task=digits", "batch.global_size=32", "optimizer=adamw"]), 1)
    large = replace(footprint(), block=0, rest=0)
    sharded = {"engine=fsdp": replace(plan.dealt(64, None), engine=EnginePlacement("fsdp"))}
    refuse_too_small(estimate(plan, large, (90, "cluster.gpu_memory_gb"), 0.0, {}, sharded))  # it fits in parts


def test_an_absurd_limit_is_rejected() -> None:
    refuse_absurd(80.0, "cluster.gpu_memory_gb")
    with pytest.raises(UserError) as error:
        refuse_absurd(1e9, "cluster.gpu_memory_gb")
    assert error.value.key == "cluster.gpu_memory_gb"
