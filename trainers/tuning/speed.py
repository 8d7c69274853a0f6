"""Measure how fast steps of each per-GPU batch are."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch

from isobatch.scaling.errors import UserError
from isobatch.scaling.tuning.speed import KNEE, Speed, Timed, sizes_to_time
from isobatch.trainers.ranks.internals import BatchNorm
from isobatch.trainers.tuning.bench import Bench, Trial

WARM_UP = 1  # step that is slower than others, since it allocates and compiles
LEAST, MOST, ENOUGH_S = 2, 20, 0.2  # steps of a measurement, and the time from which they suffice
ROUNDS = 2  # measurements of each size, apart in time, since a machine has slow moments


def measure(bench: Bench, fits: int | None = None) -> Speed:
    """Time steps with one pass and with two, by per-GPU batch; the same on all ranks.

    Sizes rise until two in a row are slower than the fastest, or to the largest that fits.

    Args:
        fits: the largest per-GPU batch that fits into memory; None: not known, so the run's own is the largest.

    Raises:
        UserError: nothing fits.
    """
    if fits == 0:
        problem = "no per-GPU batch fits into memory, so there is no step to time"
        raise UserError(problem, "action=plan plan.memory=true tells what needs less memory", "tune.parts", "speed")
    world, granule = bench.session.world, bench.opened.plan.granule
    share = max(granule, len(bench.opened.data) // world.size)
    most = min(fits or bench.opened.plan.cut.per_gpu, share)
    timed = list[Timed]()
    with bench.trial(bench.plan(granule * world.size, granule)) as trial:
        least = max(granule, 2 if any(isinstance(module, BatchNorm) for module in trial.model.modules()) else 1)
        for size in sizes_to_time(max(least, most), least):
            timed.append(time_size(trial, size))
            speed = Speed(world.size, tuple(timed))
            bench.say(f"{size:,} per GPU: {speed.samples_per_s(timed[-1]):,.0f} samples/s")
            best = max(map(speed.samples_per_s, timed))
            if len(timed) > 2 and all(speed.samples_per_s(one) < (1 - KNEE) * best for one in timed[-2:]):
                break
    return Speed(world.size, tuple(timed))


def time_size(trial: Trial, per_gpu: int) -> Timed:
    """Return the speed of one per-GPU batch."""
    bench = trial.bench
    world = bench.session.world.size
    times: dict[int, list[float]] = {1: [], 2: []}
    waits: list[float] = []
    for passes in (1, 2) * ROUNDS:
        trial.follow(bench.plan(per_gpu * world * passes, per_gpu))
        step_s, waited = time_steps(trial)
        times[passes].append(bench.most(step_s))
        waits.append(bench.most(waited))
    one, two = (1000 * min(times[passes]) for passes in (1, 2))
    return Timed.of(per_gpu, one, two, statistics.median(waits))


def time_steps(trial: Trial) -> tuple[float, float]:
    """Return the median seconds of a step, and the share of it in which this rank waited for data."""
    world = trial.bench.session.world
    seconds, waits, began = list[float](), list[float](), time.perf_counter()
    for number in range(WARM_UP + MOST):
        at = time.perf_counter()
        taken = trial.step()
        assert taken is not None
        if world.device.type != "cpu":
            torch.accelerator.synchronize(world.device)
        if number >= WARM_UP:
            seconds.append(time.perf_counter() - at)
            waits.append(float(taken[1].waited_s) / world.size)
        enough = number >= WARM_UP + LEAST - 1 and time.perf_counter() - began > ENOUGH_S
        if world.any(enough):
            break
    return statistics.median(seconds), min(1.0, sum(waits) / sum(seconds))


def tell(found: Mapping[str, Any]) -> str:
    """Return a sentence with the fastest per-GPU batch, and what bounds it."""
    sizes = {row["per_gpu"]: row for row in found["sizes"]}
    knee, best = sizes[found["knee"]], max(sizes.values(), key=lambda row: row["samples_per_s"])
    advice = {
        "data": f"; bound by data: ranks wait {knee['data_wait']:.0%} of a step, so give data.workers more processes",
        "communication": f"; bound by communication: {knee['fixed_ms']:.3g} of {knee['step_ms']:.3g} ms aren't passes, "
        "so accumulation pays",
        "compute": "",
    }
    if found["sizes"][-1]["per_gpu"] == found["knee"] and not found["to_the_largest"]:
        advice["compute"] = "; larger ones weren't timed, as memory isn't in tune.parts"
    fastest = f"{best['samples_per_s']:,.0f} samples/s at {best['per_gpu']:,} per GPU"
    if knee is best:
        return f"{fastest}{advice[found['bound']]}"
    return f"{fastest}; {knee['per_gpu']:,} per GPU is within 5 % of it{advice[found['bound']]}"
