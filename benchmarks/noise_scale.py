"""Compare the measured gradient noise scale with the gradients of all samples one by one, along real trainings."""

from __future__ import annotations

import json
import math
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap  # type: ignore[attr-defined]
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import default_collate

from benchmarks.cores import on_all_cores
from benchmarks.tables import silenced
from isobatch.scaling.noise import Smoothed
from tests.support.harness import in_ranks

BATCH = 32
STEPS = 300
AGES = (4, 0)  # the truth is a mean over this many steps before a point, since it moves up and down
POINTS = (50, 100, 150, 200, 250, 300)  # steps after which the scale is compared
SAMPLES = 512  # most samples whose gradients are computed one by one
SEEDS = (0, 1)
FLOOR = 0.01
TASKS = {
    "digits, MLP": ("task=digits", "task.args.dropout=0", "task.args.width=32"),
    "mnist1d, conv net": ("task=mnist1d", "task.args.width=16"),
    "text, GPT": ("task=text", "task.args.length=16", "task.args.width=32", "task.args.dropout=0"),
}
OPTIMIZERS = {"SGD": ("optimizer=sgd",), "AdamW": ("optimizer=adamw",)}
RATES = {("digits, MLP", "SGD"): 0.02, ("digits, MLP", "AdamW"): 0.002, ("mnist1d, conv net", "SGD"): 0.05,
         ("mnist1d, conv net", "AdamW"): 0.005, ("text, GPT", "SGD"): 0.05, ("text, GPT", "AdamW"): 0.003}  # fmt: skip
# parts of a step that are compared, and the cut
WAYS = {"2 halves": (2, BATCH), "8 micro-batches": (None, BATCH // 8)}
CUTS = ((1, BATCH // 4), (2, BATCH))  # ranks, samples in a micro-batch


class Point(NamedTuple):
    """Hold the averages of the estimates after a step, and the scale by samples, raw and in the optimizer's norm."""

    noise: Smoothed
    truth: tuple[float, float]


def overrides(task: str, optimizer: str, seed: int) -> tuple[str, ...]:
    rate = f"lr.peak={RATES[task, optimizer]}"
    return (*TASKS[task], *OPTIMIZERS[optimizer], rate, f"seed={seed}", f"batch.global_size={BATCH}",
            "lr.decay=constant", f"duration={STEPS}st")  # fmt: skip


def course(world: Any, given: tuple[str, ...], parts: int | None, per_gpu: int, *, truth: bool) -> Iterator[Point]:
    """Train, measure every step, and yield the state of the measurement at POINTS.

    Args:
        truth: compute the truth, too, from the gradients of single samples.
    """
    from isobatch.conf.compose import compose
    from isobatch.scaling.plan import Intervals
    from isobatch.scaling.planning.resolve import resolve
    from isobatch.trainers.data.loader import Loader
    from isobatch.trainers.data.state import TrainState
    from isobatch.trainers.engines.make import make_engine
    from isobatch.trainers.engines.step_report import Requests
    from isobatch.trainers.loop.fit import Stepper
    from isobatch.trainers.model.build import prepare
    from isobatch.trainers.model.randomness import Stream, seed_generators
    from isobatch.trainers.ranks.watch import Watch
    from isobatch.trainers.tasks.task import make_model, make_task

    config = compose([*given, f"batch.per_gpu={per_gpu}"])
    seed_generators(config.seed)
    task = make_task(config)
    data, stream = task.train_data(), Stream(config.seed, world.device)
    intervals = Intervals(None, None, None, noise=1, noise_parts=parts)  # type: ignore[arg-type]
    plan = replace(resolve(config, world.size, len(data)), intervals=intervals)
    model = prepare(make_model(config, task), config, stream, world.size)
    engine = make_engine(config, task, model, plan.peak, world)
    world.kept.append(engine)
    state, noise, recent = TrainState(plan), Smoothed(), list[Any]()
    stepper = Stepper(engine, Loader(data, task, state, world, 0), stream, Watch(), None)
    while step := plan.step_at(state.samples):
        _, update = stepper.take(step, Requests)
        if new := update.estimate(step.cut):
            noise = noise.updated(new.of_data(len(data)), update.norm.name)
        state.advance(step, skipped=False)
        if truth and any(state.steps + age in POINTS for age in AGES):
            recent = [*recent, by_sample(task, model, data, engine._tuned.optimizer)]
        if state.steps in POINTS:
            raw, own = (sum(recent) / len(recent)).tolist() if recent else ((1.0, 0.0), (1.0, 0.0))
            recent = []
            yield Point(noise, (raw[1] / raw[0], own[1] / own[0]))


def by_sample(task: Any, model: Any, data: Any, optimizer: Any) -> Tensor:
    """Return |G|² and tr Σ of the data at the current weights, raw and in the optimizer's current norm: [2, 2]."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    every = max(1, len(data) // SAMPLES)
    rows = [data[index] for index in range(0, len(data) // every * every, every)]
    batch = default_collate(rows)
    scales = {name: _scale(optimizer, parameter) for name, parameter in model.named_parameters()}
    floor = FLOOR * torch.cat([scale.flatten() for scale in scales.values()]).square().mean().sqrt()
    divisors = {name: scale + floor if float(floor) else torch.ones(()) for name, scale in scales.items()}

    def loss(weights: dict[str, Tensor], sample: Any) -> Tensor:
        one = sample[None] if isinstance(sample, Tensor) else tuple(each[None] for each in sample)
        found: Tensor = task.loss(partial(functional_call, model, weights), one)[0].sum()
        return found

    sums, squares = torch.zeros(2, sum(map(Tensor.numel, parameters.values())), dtype=torch.float64), torch.zeros(2)
    for start in range(0, len(rows), 128):
        part = batch[start : start + 128] if isinstance(batch, Tensor) else tuple(b[start : start + 128] for b in batch)
        with sdpa_kernel(SDPBackend.MATH):  # the others have no batching rule
            found = vmap(grad(loss), (None, 0))(parameters, part)
        for norm in (0, 1):
            flat = torch.cat([(one / divisors[name] if norm else one).flatten(1) for name, one in found.items()], 1)
            sums[norm] += flat.sum(0, dtype=torch.float64)
            squares[norm] += flat.square().sum()
    count = len(rows)
    mean_sq = (sums / count).square().sum(1)
    trace = (squares - count * mean_sq) / (count - 1)
    mean_sq -= trace * (1 / count - 1 / len(data))  # if a part of the data stands for all of it
    return torch.stack((mean_sq, trace), 1)


def _scale(optimizer: Any, parameter: Tensor) -> Tensor:
    """Return √v̂ of AdamW, or zeros."""
    state = optimizer.state[parameter] if optimizer else {}
    if "exp_avg_sq" not in state:
        return torch.zeros_like(parameter)
    beta = next(g["betas"][1] for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    scale: Tensor = (state["exp_avg_sq"] / (1 - beta ** float(state["step"]))).sqrt()
    return scale


def measured(task: str, optimizer: str, seed: int, _folder: Path) -> dict[str, Any]:
    """Return the points of every way to measure. All ways train alike, so the first finds the truth for the others."""
    from isobatch.trainers.ranks.world import World

    torch.set_num_threads(1)
    found, truths, given = dict[str, Any](), list[tuple[float, float]](), overrides(task, optimizer, seed)
    for way, (parts, per_gpu) in WAYS.items():
        points = list(course(World.alone(), given, parts, per_gpu, truth=not truths))
        truths = truths or [point.truth for point in points]
        found[way] = [[truth[parts == 2], *_plain(point.noise)] for point, truth in zip(points, truths, strict=True)]
    return found


def _plain(noise: Smoothed) -> list[float | None]:
    scale = noise.scale()
    return [noise.grad_sq, noise.trace, *((scale.low, scale.high) if scale else (None, None))]


def apart(task: str, optimizer: str) -> float:
    """Return the largest relative difference of tr Σ, and of |G|² relative to tr Σ / B, over the cuts."""
    given, found = (*overrides(task, optimizer, 0), f"duration={POINTS[0]}st"), []
    for ranks, per_gpu in ((1, BATCH), *CUTS):
        with tempfile.TemporaryDirectory() as folder:
            body = partial(_at_last, given=given, per_gpu=per_gpu)
            found.append(in_ranks(ranks, body, Path(folder), deadline_s=300)[0])
    grad_sq, trace = found[0]
    traces = [abs(other[1] / trace - 1) for other in found]
    return float(max(*traces, *(abs(other[0] - grad_sq) / (trace / BATCH) for other in found)))


def _at_last(world: Any, given: tuple[str, ...], per_gpu: int) -> list[float]:
    *_, last = course(world, given, 2, per_gpu, truth=False)
    return [last.noise.grad_sq, last.noise.trace]


def share(ratios: list[float], most: float) -> str:
    """Format how many of ``ratios`` are within a factor of ``most``."""
    return f"{100 * statistics.fmean(1 / most <= ratio <= most for ratio in ratios):.0f} %" if ratios else "-"


def typical(truths: list[float]) -> str:
    """Format the geometric mean of the scales by sample; "?" if |G|² can't be told from 0 by SAMPLES samples."""
    return f"{math.exp(statistics.fmean(map(math.log, truths))):,.0f}" if min(truths) > 0 else "?"


def rows() -> list[dict[str, Any]]:
    """Return a row per task, optimizer and way to measure: over the points of all seeds."""
    cases = [(task, optimizer) for task in TASKS for optimizer in OPTIMIZERS]
    jobs = [(case, seed) for case in cases for seed in SEEDS]
    with silenced():
        results = dict(zip(jobs, on_all_cores([partial(measured, *case, seed) for case, seed in jobs]), strict=True))
        differences = {case: apart(*case) for case in cases}
    found = []
    for case in cases:
        for way in WAYS:
            points = [point for seed in SEEDS for point in results[case, seed][way]]
            truths = [truth for truth, *_ in points]
            known = [
                (trace / grad_sq / truth, low <= truth <= high)
                for truth, grad_sq, trace, low, high in points
                if low is not None and truth > 0
            ]
            ratios = [ratio for ratio, _ in known]
            course = [typical(truths[i :: len(POINTS)]) for i in range(len(POINTS))]
            found.append(
                {
                    "task": case[0],
                    "optimizer": case[1],
                    f"by sample, at steps {POINTS[0]} … {POINTS[-1]}": " ".join(course),
                    "measured from": way,
                    "known": f"{len(known)} of {len(points)}",
                    "measured / by sample": math.exp(statistics.fmean(map(math.log, ratios))) if ratios else "-",
                    "within × 1.5": share(ratios, 1.5),
                    "within × 2": share(ratios, 2.0),
                    "in the interval": share([1.0 if inside else 9.0 for _, inside in known], 2.0),
                    "over cuts": f"{differences[case]:.0e}" if way == "2 halves" else "",
                }
            )
    return found


if __name__ == "__main__":
    for row in rows():
        print(json.dumps(row, ensure_ascii=False))
