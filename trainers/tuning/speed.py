"""Measure how fast steps of each per-GPU batch are."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from isobatch.scaling.errors import UserError
from isobatch.scaling.tuning.speed import AGAIN, KNEE, NOISY, Speed, Timed, sizes_to_time, unknown, without_slow_rounds
from isobatch.trainers.ranks.internals import BatchNorm
from isobatch.trainers.tuning.bench import Bench, Trial

WARM_UP = 1  # step that is slower than others, since it allocates and compiles
LEAST, MOST, ENOUGH_S = 1, 20, 0.1  # steps of a measurement, and the time from which they suffice
ROUNDS = 3, 5  # measurements of each size, at least and at most: sizes take turns, since a machine has slow moments
ROUNDS_S = 20.0  # time from which no further round begins


def measure(bench: Bench, fits: int | None = None) -> Speed:
    """Time steps with one pass and with two, by per-GPU batch; the same on all ranks.

    Sizes rise until two in a row are slower than the fastest, or to the largest that fits. Then all of them are timed
    again, in turns.

    Args:
        fits: the largest per-GPU batch that fits into memory; None: not known, so the run's own is the largest.

    Raises:
        UserError: nothing fits.
    """
    if fits == 0:
        problem = "no per-GPU batch fits into memory, so there is no step to time"
        raise UserError(problem, "action=plan plan.memory=true tells what needs less memory", "tune.parts", "speed")
    world, granule = bench.session.world, bench.opened.plan.granule
    share = max(1, len(bench.opened.data) // world.size // granule) * granule
    most = min(fits or bench.opened.plan.cut.per_gpu, share)
    with bench.trial(bench.plan(granule * world.size, granule)) as trial:
        least = max(granule, 2 if any(isinstance(module, BatchNorm) for module in trial.model.modules()) else 1)
        times = first_round(trial, sizes_to_time(max(least, most), least))
        began = time.perf_counter()
        for number in range(1, ROUNDS[1]):
            if number >= ROUNDS[0] and world.any(time.perf_counter() - began > ROUNDS_S):
                break
            for done, size in enumerate(times):
                times[size].take(trial)
                bench.say(f"{size:,} per GPU, again", (number + (done + 1) / len(times)) / ROUNDS[1])
    ones, twos = [one.one for one in times.values()], [one.two for one in times.values()]
    settled = without_slow_rounds([*ones, *twos])
    for one, row, row_of_two in zip(times.values(), settled, settled[len(ones) :], strict=False):
        one.one, one.two = row, row_of_two
    return Speed(world.size, tuple(one.timed() for one in times.values()))


@dataclass
class Times:
    """The repeated times of one per-GPU batch: milliseconds of a step with one pass and with two, and waits."""

    per_gpu: int
    one: list[float] = field(default_factory=list)
    two: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)

    def take(self, trial: Trial) -> None:
        """Measure once more."""
        bench = trial.bench
        for passes, times in ((1, self.one), (2, self.two)):
            trial.follow(bench.plan(self.per_gpu * bench.session.world.size * passes, self.per_gpu))
            step_s, waited = time_steps(trial)
            times.append(1000 * bench.most(step_s))
            self.waits.append(bench.most(waited))

    def repeat(self, trial: Trial) -> None:
        """Repeat the last measurement, and keep the faster times."""
        one, two = self.one.pop(), self.two.pop()
        self.take(trial)
        self.one[-1], self.two[-1] = min(one, self.one[-1]), min(two, self.two[-1])

    def timed(self) -> Timed:
        """Return the speed."""
        return Timed.of(self.per_gpu, self.one, self.two, statistics.median(self.waits))


def first_round(trial: Trial, sizes: Iterable[int]) -> dict[int, Times]:
    """Measure each size once, by ascending size, until two in a row are slower than the fastest.

    Before that counts, they are measured again: a machine has slow moments.
    """
    bench, times = trial.bench, dict[int, Times]()
    for size in sizes:
        times[size] = Times(size)
        times[size].take(trial)
        if last_two_are_slower(bench, times):
            for last in list(times)[-2:]:
                times[last].repeat(trial)
        bench.say(f"{size:,} per GPU: {rate(bench, times[size]):,.0f} samples/s")
        if last_two_are_slower(bench, times):
            break
    return times


def last_two_are_slower(bench: Bench, times: Mapping[int, Times]) -> bool:
    """Return whether the last two sizes are slower than the fastest one."""
    rates = [rate(bench, one) for one in times.values()]
    return len(rates) > 2 and all(last < (1 - KNEE) * max(rates) for last in rates[-2:])


def rate(bench: Bench, times: Times) -> float:
    """Return the samples per second of all ranks."""
    timed = times.timed()
    return Speed(bench.session.world.size, (timed,)).samples_per_s(timed)


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
    if text := unknown(found["spread"]):
        return f"{text}; {AGAIN}"
    sizes = {row["per_gpu"]: row for row in found["sizes"]}
    knee, best = sizes[found["knee"]], max(sizes.values(), key=lambda row: row["samples_per_s"])
    advice = {
        "data": f"; bound by data: ranks wait {knee['data_wait']:.0%} of a step, so give data.workers more processes",
        "communication": f"; bound by the update and communication: {knee['fixed_ms']:.3g} of {knee['step_ms']:.3g} ms "
        "aren't passes, so accumulation is faster",
        "compute": "",
    }
    if found["sizes"][-1]["per_gpu"] == found["knee"] and not found["to_the_largest"]:
        advice["compute"] = "; larger ones weren't timed, as memory isn't in tune.parts"
    fastest = f"{best['samples_per_s']:,.0f} samples/s at {best['per_gpu']:,} per GPU"
    noisy = f", so {AGAIN}" if found["spread"] > NOISY else ""
    spread = f"; repeated times spread by {found['spread']:.0%}{noisy}{advice[found['bound']]}"
    if knee is best:
        return f"{fastest}{spread}"
    return f"{fastest}; {knee['per_gpu']:,} per GPU is within {max(KNEE, found['spread']):.0%} of it{spread}"
