"""The plan as people read it: golden texts."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from textwrap import dedent

import pytest

from isobatch.conf.compose import compose
from isobatch.scaling.plan import Plan
from isobatch.scaling.planning.resolve import resolve
from isobatch.scaling.report.plan_table import WIDTH, table
from isobatch.scaling.rules import Rule
from isobatch.scaling.segments import Segment

TASK = (
    "task=custom",
    "task._target_=my_package.MyTask",
    "task.name=faces",
    "task.train_samples=1437",
    "task.family=images",
    "duration=20ep",
    "optimizer.usual={lr: 0.1, batch: 256}",
)


@cache
def plan_of(*overrides: str, world: int) -> Plan:
    return replace(resolve(compose([*TASK, *overrides]), world), identity="0123456789ab")


def check(plan: Plan, golden: str) -> None:
    lines = table(plan).splitlines()
    assert all(len(line) <= WIDTH for line in lines)
    assert lines[0] == "Isobatch plan · faces · 0123456789ab"
    assert lines[1] == lines[-1] == "─" * WIDTH
    assert lines[2:-1] == dedent(golden).strip("\n").splitlines()


def test_one_worker() -> None:
    check(
        plan_of("lr.base=0.1", "lr.base_batch=256", "batch.global_size=1024", world=1),
        """
        global batch   1,024 samples = 1,024 per GPU × 1 rank × accumulation 1
        duration       29 steps = 28,740 samples = 20 epochs of 1,437; the last step is whole, which adds 956 samples
        optimizer      sgd (the default), momentum 0.9, weight decay 0.0001
        learning rate  peak 0.4 = 0.1 × 1024/256 (linear; Goyal et al. 2017); base LR: given (lr.base)
        schedule       warmup from 0.1 over 1,437 samples (5%, 1.4 steps), then cosine decay to 0
        SGD's noise    5.61328 = ηN/(B(1−m)) at the peak (Smith & Le 2018)
        seed           0
          ! warning    a warmup of 1.4 steps at a large batch (1,024 samples, 4 × that of the base LR): large batches
                       lost 1 to 2 points of accuracy without one (Goyal et al. 2017); try lr.warmup=18%
        """,
    )


def test_uneven_and_worth_a_warning() -> None:
    check(
        plan_of("batch.global_size=2100", "batch.per_gpu=7", "lr.decay=step", "lr.warmup=0", world=160),
        """
        global batch   2,100 samples ≤ 7 per GPU × 160 ranks × accumulation 2
        micro-batches  180 × 7 samples and 140 × 6 samples; 6.2% of the work idles
        duration       14 steps = 28,740 samples = 20 epochs of 1,437; the last step is whole, which adds 660 samples
        optimizer      sgd (the default), momentum 0.9, weight decay 0.0001
        learning rate  peak 0.820312 = 0.1 × 2100/256 (linear; Goyal et al. 2017); base LR: a usual starting point of
                       the optimizer, not tuned for this task
        schedule       no warmup, then × 0.1 after 8,622, 17,244, 25,866 samples
        SGD's noise    5.61328 = ηN/(B(1−m)) at the peak (Smith & Le 2018)
        seed           0
          ! warning    no warmup at a large batch (2,100 samples, 8.20312 × that of the base LR): large batches lost 1
                       to 2 points of accuracy without one (Goyal et al. 2017); try lr.warmup=30%
          ! warning    the base LR 0.1 at a batch of 256 samples is only a usual starting point for sgd, nobody tuned
                       it for faces; tune it and give lr.base and lr.base_batch
          ! warning    6% of the work idles: 160 ranks × accumulation 2 can't share 2,100 samples evenly; nearest
                       global batches that are even: 1920 or 2240
          ! warning    the global batch of 2,100 samples is larger than the data (1,437 samples): one step sees
                       samples more than once; batch.global_size=all is full-batch descent
          ! warning    a global batch of 2,100 samples is far from what people use for images (32 to 512); expect to
                       re-tune
        """,
    )


def test_tokens_and_several_segments() -> None:
    tokens = ("task.family=language", "task.units_per_sample=512", "task.train_samples=100000", "batch.unit=tokens")
    sizes = ("batch.global_size=524288", "batch.per_gpu=65536", "lr.base=0.001", "lr.base_batch=131072")
    plan = plan_of(*tokens, *sizes, "optimizer=adamw", "lr.decay=wsd", "lr.final=0.1", world=3)
    later = (Segment(50_000, 2048, Rule("sqrt")), Segment(80_000, 4096, Rule("sqrt")))
    check(
        replace(plan, segments=(*plan.segments, *later)),
        """
        global batch   524,288 tokens (1,024 samples) ≤ 58,368 (of at most 65,536) per GPU × 3 ranks × accumulation 3
        micro-batches  7 × 58,368 tokens and 2 × 57,856 tokens; 0.2% of the work idles
        then           from sample 50,176, step 50: 1,048,576 tokens (2,048 samples) ≤ 58,368 (of at most 65,536) per
                       GPU × 3 ranks × accumulation 6, peak LR 0.00282843
                       from sample 80,896, step 65: 2,097,152 tokens (4,096 samples) ≤ 64,000 (of at most 65,536) per
                       GPU × 3 ranks × accumulation 11, peak LR 0.004
        duration       533 steps = 1,024,000,000 tokens = 20 epochs of 51,200,000; the last step is whole, which adds
                       983,040 tokens
        optimizer      adamw (given), β₁ 0.9, β₂ 0.999, ε 1e-08, weight decay 0.01
        learning rate  peak 0.002 = 0.001 × √(524288/131072) (sqrt; Krizhevsky 2014; Hoffer et al. 2017); base LR:
                       given (lr.base)
        schedule       warmup from 0.001 over 51,200,000 tokens (5%), then constant, and linear decay to 0.0004 over
                       the last 204,800,000 tokens
        seed           0
        """,
    )


def test_bitwise_numerics() -> None:
    check(
        plan_of("lr.peak=0.3", "batch.global_size=100", "batch.per_gpu=24", "numerics=bitwise", world=3),
        """
        global batch   100 samples ≤ 20 (of at most 24) per GPU × 3 ranks × accumulation 2
        micro-batches  5 × 20 samples and 1 empty; 16.7% of the work idles
        duration       288 steps = 28,740 samples = 20 epochs of 1,437; the last step is whole, which adds 60 samples
        optimizer      sgd (the default), momentum 0.9, weight decay 0.0001
        learning rate  peak 0.3 (lr.peak, given outright)
        schedule       warmup from 0 over 1,437 samples (5%), then cosine decay to 0
        SGD's noise    43.11 = ηN/(B(1−m)) at the peak (Smith & Le 2018)
        numerics       bitwise: the same weights, bit by bit, on any number of processes of one machine type; a step
                       took 1.14 × as long as a fast one, up to 1.53 × where it is mostly messages
                       (benchmarks/README.md)
        seed           0
          ! warning    17% of the work idles: 3 ranks × accumulation 2 can't share 100 samples evenly; nearest global
                       batches that are even: 126
        """,
    )


def test_before_the_data_is_opened() -> None:
    check(
        plan_of("task.train_samples=null", "lr.peak=0.3", "batch.global_size=2", world=3),
        """
        global batch   2 samples ≤ 1 per GPU × 3 ranks × accumulation 1
        micro-batches  2 × 1 sample and 1 empty; 33.3% of the work idles
        duration       unknown until the data is opened (plan.open_data=true opens it)
        optimizer      sgd (the default), momentum 0.9, weight decay 0.0001
        learning rate  peak 0.3 (lr.peak, given outright)
        schedule       unknown until the data is opened
        seed           0
          ! warning    33% of the work idles: 3 ranks × accumulation 1 can't share 2 samples evenly; nearest global
                       batches that are even: 3
          ! warning    a global batch of 2 samples is far from what people use for images (32 to 512); expect to
                       re-tune
        """,
    )


@pytest.mark.parametrize(
    ("decay", "text"),
    [
        ("cosine", "no warmup, then cosine decay to 0.04"),
        ("linear", "no warmup, then linear decay to 0.04"),
        ("polynomial", "no warmup, then polynomial decay (exponent 3) to 0.04"),
        ("constant", "no warmup, then constant"),
    ],
)
def test_the_other_decays(decay: str, text: str) -> None:
    plan = plan_of("lr.base=0.1", "lr.base_batch=256", "batch.global_size=1024", world=1)
    assert plan.schedule
    schedule = replace(plan.schedule, decay=decay, warmup_samples=0, final=0.1, exponent=3.0)
    assert f"\nschedule       {text}\n" in table(replace(plan, schedule=schedule))
