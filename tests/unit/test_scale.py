"""Compare the arithmetic of 1 to 100,000 ranks, in one process, with dealing and walking by hand."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from functools import cache
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isobatch.conf.compose import compose
from isobatch.conf.schema import RunConfig
from isobatch.scaling.geometry import Cut, solve
from isobatch.scaling.order import indices
from isobatch.scaling.plan import Plan
from isobatch.scaling.planning.resolve import resolve
from isobatch.scaling.report.plan_json import from_json, to_json
from isobatch.scaling.report.plan_table import table
from tests.support.examples import examples
from tests.support.steps import walk

WORLDS = (1, 2, 3, 7, 64, 1000, 99_999, 100_000)
quick = examples(60)

# ---- one step, dealt sample by sample


def cut_by_hand(world: int, granules: int, most: int, granule: int, bitwise: bool) -> list[list[list[int]]]:
    """Return the samples of every pass of every rank, by counting without division."""
    passes = 1
    while passes * world * most < granules:
        passes += 1
    piles = world * passes
    if bitwise:
        piles = 1
        while piles * most < granules:
            piles += 1
    sizes = [0] * piles
    for number in range(granules):
        sizes[number % piles] += 1  # in turn, so the first piles are larger
    samples = iter(range(granules * granule))
    micro_batches = [[next(samples) for _ in range(size * granule)] for size in sizes]
    ranks: list[list[list[int]]] = [[] for _ in range(world)]
    if bitwise:
        blocks = [0] * world
        for number in range(piles):
            blocks[number % world] += 1
        rest = iter(micro_batches)
        for rank, block in enumerate(blocks):
            ranks[rank] = [next(rest) for _ in range(block)]
    else:
        for j, micro_batch in enumerate(micro_batches):
            ranks[j % world].append(micro_batch)
    return [rank + [[]] * (passes - len(rank)) for rank in ranks]


def check(cut: Cut, by_hand: list[list[list[int]]]) -> None:
    """Check that every rank has the passes and samples dealt by hand, and that the cut's properties are correct."""
    for rank, passes in enumerate(by_hand):
        found = list(cut.passes(rank))
        assert [list(range(*one)) for one in found] == passes
        assert cut.share(rank) == sum(map(len, passes))
    shares = [sum(map(len, passes)) for passes in by_hand]
    assert cut.idle == pytest.approx(1 - sum(shares) / (len(shares) * max(shares)))
    sizes = [len(one) for passes in by_hand for one in passes]
    assert sorted(sizes, reverse=True) == [size for size, count in cut.micro_batches for _ in range(count)]
    assert cut.even is (len(set(sizes)) == 1)
    everything = sorted(sample for passes in by_hand for one in passes for sample in one)
    assert everything == list(range(cut.global_size))


@given(
    st.integers(1, 12) | st.integers(1, 300),
    st.integers(1, 400),
    st.integers(1, 40),
    st.sampled_from([1, 1, 3, 8]),
    st.booleans(),
)
@quick
def test_a_cut_equals_dealing_sample_by_sample(
    world: int, granules: int, most: int, granule: int, bitwise: bool
) -> None:
    per_gpu = most * granule + granule - 1
    cut = solve(world, global_size=granules * granule, per_gpu=per_gpu, granule=granule, bitwise=bitwise)
    check(cut, cut_by_hand(world, granules, most, granule, bitwise))


@pytest.mark.parametrize("bitwise", [False, True])
@pytest.mark.parametrize(
    ("world", "granules", "most"),
    [
        (99_999, 130_003, 1),
        (100_000, 100_000, 3),
        (1000, 13_003, 1),
        (64, 13_003, 1),
        (7, 10_000, 1000),
        (1, 10_003, 1000),
    ],
)
def test_a_cut_for_100_000_ranks_equals_dealing_sample_by_sample(
    world: int, granules: int, most: int, bitwise: bool
) -> None:
    cut = solve(world, global_size=granules, per_gpu=most, bitwise=bitwise)
    check(cut, cut_by_hand(world, granules, most, 1, bitwise))


# ---- a run, walked step by step


RUN = (
    "task=custom",
    "task._target_=my_package.MyTask",
    "task.train_samples=1013",
    "task.units_per_sample=16",
    "task.tuned={sgd: {lr: 0.05, batch: 32}}",
    "duration=7ep",
    "batch.per_gpu=5",
)
RUNS = {
    "one batch": ("batch.global_size=37", "lr.warmup=10%"),
    "stages": ("batch.schedule='0sa:32 1ep:48 40%:7 5ep:129'", "lr.decay=step", "lr.milestones=[30%,4ep]"),
    "leapt over": ("batch.schedule='0sa:500 600sa:64 700sa:32 1500sa:256'", "lr.decay=linear", "lr.final=0.1"),
    "ramp": ("batch.schedule='ramp from:16 over:50%'", "batch.global_size=128", "lr.warmup=20st"),
    "held": ("batch.schedule='0sa:32 3ep:64 lr:hold'", "lr.decay=wsd", "lr.cooldown=30%"),
}
BATCHES = {  # start sample and batch of each stage of RUNS; 7 epochs are 7,091 samples
    "one batch": {0: 37},
    "stages": {0: 32, 1013: 48, 2837: 7, 5065: 129},
    "leapt over": {0: 500, 600: 64, 700: 32, 1500: 256},
    "held": {0: 32, 3039: 64},
}


@cache
def config_of(*overrides: str) -> RunConfig:
    return compose([*RUN, *overrides])


def steps_by_hand(batches: dict[int, int], samples: int) -> list[tuple[int, int, int]]:
    """Return (index, start, stop) of every step. A step has the batch of the last stage that starts at or before it."""
    found, at = [], 0
    while at < samples:
        size = 0
        for start, batch in batches.items():
            size = batch if start <= at else size
        found.append((len(found), at, at + size))
        at += size
    return found


def lr_by_hand(name: str, sample: int, batch: int, samples: int) -> float:
    """Return the LR of RUNS at a sample, computed from the description of the recipes."""
    first = BATCHES[name][0]
    peak = 0.05 * first / 32 * (1 if name == "held" else batch / first)
    start = 0.05 if peak > 0.05 else 0.0
    warmup = math.ceil(0.1 * samples) if name == "one batch" else math.ceil(0.05 * samples)
    if sample < warmup:
        return start + sample * (peak - start) / warmup
    left = (samples - sample) / (samples - warmup)
    if name == "one batch":
        return peak * math.sin(math.pi / 2 * left) ** 2
    if name == "stages":
        for milestone in (math.ceil(0.3 * samples), 4 * 1013):
            peak = peak / 10 if sample >= milestone else peak
        return peak
    if name == "leapt over":
        return peak * left + 0.1 * peak * (1 - left)
    return min(peak, peak * (samples - sample) / math.ceil(0.3 * samples))


@pytest.mark.parametrize("numerics", ["fast", "bitwise"])
@pytest.mark.parametrize("name", BATCHES)
def test_a_plan_equals_walking_step_by_step(name: str, numerics: str) -> None:
    samples = 7 * 1013
    by_hand = steps_by_hand(BATCHES[name], samples)
    for world in WORLDS:
        plan = resolve(config_of(*RUNS[name], f"numerics={numerics}"), world)
        steps = list(walk(plan))
        assert [(step.index, step.start, step.stop) for step in steps] == by_hand
        assert (plan.steps, plan.added) == (len(by_hand), by_hand[-1][2] - samples)
        for step in steps:
            assert step.expected_units == 16 * (step.stop - step.start)
            assert (step.cut.world, step.cut.global_size) == (world, step.stop - step.start)
            lr = lr_by_hand(name, step.start, step.stop - step.start, samples)
            assert step.recipe.lr == pytest.approx(lr, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("name", RUNS)
def test_steps_are_the_same_on_any_number_of_ranks(name: str) -> None:
    """Steps are bitwise equal except for the cut, even if the ranks change at every step."""
    alone = resolve(config_of(*RUNS[name]), 1)
    plans = [resolve(config_of(*RUNS[name]), world) for world in WORLDS]
    for number, step in enumerate(walk(alone)):
        other = plans[number % len(plans)].step_at(step.start)
        assert other
        assert (other.index, other.start, other.stop) == (step.index, step.start, step.stop)
        assert (other.expected_units, other.recipe) == (step.expected_units, step.recipe)


# ---- the data that all ranks fetch together


def fetched(plan: Plan) -> Iterator[np.ndarray]:
    """Yield the samples that all ranks fetch in each step, in the order of the batch."""
    assert plan.train_samples
    for step in walk(plan):
        ranges = [
            (step.start + first, step.start + last)
            for rank in range(plan.world)
            for first, last in step.cut.passes(rank)
            if first < last
        ]
        yield np.concatenate([indices(plan.seed, plan.train_samples, *one) for one in sorted(ranges)])


@pytest.mark.parametrize("numerics", ["fast", "bitwise"])
@pytest.mark.parametrize("world", [1, 3, 1000, 100_000])
def test_all_ranks_together_fetch_every_sample_once_per_epoch(world: int, numerics: str) -> None:
    n = 20_011
    sizes = ("batch.schedule='0sa:15000 15000sa:9001'", "batch.per_gpu=4", "duration=2ep")
    plan = resolve(config_of(*sizes, f"task.train_samples={n}", f"numerics={numerics}"), world)
    seen = np.concatenate(list(fetched(plan)))
    assert len(seen) == 2 * n + (plan.added or 0)
    for epoch in range(2):
        assert (np.bincount(seen[epoch * n : (epoch + 1) * n], minlength=n) == 1).all()
    assert (seen == indices(plan.seed, n, 0, len(seen))).all()


# ---- the cost of a plan for many ranks


LARGE = ("task.train_samples=1000000000", "duration=3ep", "lr.decay=step")
MANY = {
    "even": ("batch.global_size=6400000", "batch.per_gpu=16"),
    "uneven": ("batch.global_size=1000003", "batch.per_gpu=3"),
    "fewer than ranks": ("batch.global_size=7", "batch.per_gpu=3"),
    "stages": ("batch.schedule='0sa:100000 1ep:1000003 2ep:9999991'", "batch.per_gpu=3"),
}


def calls_of(work: Callable[[], Any]) -> int:
    """Count function calls, a measure of work that doesn't depend on the machine's speed."""
    count = 0

    def called(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(called)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("numerics", ["fast", "bitwise"])
@pytest.mark.parametrize("name", MANY)
def test_a_plan_for_100_000_ranks_costs_as_much_as_for_two(name: str, numerics: str) -> None:
    config = config_of(*LARGE, *MANY[name], f"numerics={numerics}")

    def planned(world: int) -> str:
        plan = resolve(config, world)
        return to_json(plan) + table(plan)

    texts = [planned(world) for world in (2, 100_000)]  # also fills the caches
    few, many = (calls_of(lambda world=world: planned(world)) for world in (2, 100_000))  # type: ignore[misc]
    assert many < 2 * few + 10_000, "work grows with the ranks"
    assert all(len(text.encode()) < 10_000 for text in texts)
    assert len(texts[1]) < len(texts[0]) + 1500
    plan = resolve(config, 100_000)
    assert from_json(to_json(plan)) == plan


@pytest.mark.parametrize("numerics", ["fast", "bitwise"])
@pytest.mark.parametrize("name", ["uneven", "fewer than ranks"])
def test_a_refusal_on_100_000_ranks_is_cheap(name: str, numerics: str) -> None:
    config = config_of(*LARGE, *MANY[name], f"numerics={numerics}", "batch.even=true")

    def refused() -> None:
        with pytest.raises(ValueError, match="nearest even global batches on 100,000 ranks: "):
            resolve(config, 100_000)

    refused()
    assert calls_of(refused) < 1_000_000


def test_many_stages_are_shown_in_few_lines() -> None:
    plan = resolve(
        config_of("task.train_samples=1000000", "batch.schedule='ramp from:8 over:90%'", *LARGE[1:]), 100_000
    )
    more = resolve(config_of("batch.schedule='ramp from:1 over:90%'", "batch.global_size=512", *LARGE), 100_000)
    assert len(plan.stages) == 8
    assert len(more.stages) == 512
    assert "more stages" not in table(plan)
    lines = table(more).splitlines()
    assert len(lines) < 60
    assert any("… 500 more stages" in line for line in lines)
    assert any("512 samples" in line for line in lines)
    assert len(to_json(more)) < 400_000
