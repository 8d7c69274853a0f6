"""Compare controllers of the global batch with fixed batches and schedules: samples, steps and cost to a target.

python -m benchmarks control control-decay
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from statistics import fmean, geometric_mean, stdev
from typing import NamedTuple

from torch import nn

from benchmarks.tables import Rows
from benchmarks.trained import Trained, train_all

SEEDS = tuple(range(100, 108))  # none of those that settings were chosen with, which are 0 to 2
FIXED, START = (16, 32, 64, 128, 256, 512), 32
HALF_SPEED = 256  # batch at which the assumed hardware reaches half of its highest samples/s
WHOLE = "all three"  # the geometric mean over the tasks
Keys = tuple[str, ...]
Way = tuple[str, str]
"""A task, and how its batch is chosen."""
SAME: Keys = (
    "optimizer=adamw", "clip_norm=1.0", "lr.rule=sqrt", f"lr.base_batch={START}", "lr.warmup=4000sa",
    "lr.warmup_from=0", "batch.per_gpu=512", "log.every=1%", "device=cpu",
)  # fmt: skip
CONTROLLERS = {
    "goodput": (f"control.half_speed={HALF_SPEED}",),
    "norm-test": (),
    "noise": (),
    "variance": (),
    "bandit": ("control.per=second", f"control.half_speed={HALF_SPEED}"),
}
AIMS = {"goodput": 1.05, "norm-test": 1.15, "noise": 1.20}  # most cost / that of the best fixed batch
AIM_OF_A_TASK, AIM_OF_START, AIM_OF_DOUBLING = 1.45, 0.65, 0.72
DOUBLING, LONGER = "batch.schedule=doubling", 2.0
DECAYED = {  # how the batch is chosen where the LR decays: the length of the run, and its keys
    f"fixed {START}": (1.0, ()),
    "doubling": (1.0, (DOUBLING,)),
    **{
        f"{name}{with_doubling}": (LONGER, (f"control={name}", *CONTROLLERS[name], *more))
        for name in ("goodput", "norm-test")
        for with_doubling, more in (("", ()), (" and doubling", (DOUBLING,)))
    },
}


class Setting(NamedTuple):
    """What is trained, and how far.

    Attributes:
        keys: the task, and the LR that was the best of a grid at ``START``.
        target: of the validation loss of the averaged weights.
        samples: the run of a controller, which measures every 0.5 % of it, and of the curriculum. Fixed
            batches may take three times as many.
        whole: the run whose LR decays to its end, or whose batch doubles in place of that.
    """

    keys: Keys
    target: float
    samples: int
    whole: int


SETTINGS = {
    "mnist1d": Setting(("task=mnist1d", "lr.base=0.02"), 0.12, 50_000, 30_000),
    "images": Setting(
        ("task=images", "model._target_=benchmarks.control.network", "model.args.width=8", "lr.base=0.008"),
        0.15, 50_000, 30_000,
    ),
    "text": Setting(
        ("task=text", "task.args.length=16", "task.args.width=32", "task.args.depth=1", "task.args.dropout=0.0",
         "task.train_samples=null", "evaluate.samples=500", "lr.base=0.008"),
        2.1, 50_000, 30_000,
    ),
}  # fmt: skip


def network(width: int) -> nn.Module:
    """Return a small convolutional network for MNIST without BatchNorm, whose statistics aren't averaged by ``ema``."""
    layers: list[nn.Module] = []
    inputs = 1
    for outputs, kernel in ((width, 5), (2 * width, 3), (2 * width, 3)):
        layers += [nn.Conv2d(inputs, outputs, kernel, stride=2, padding=kernel // 2), nn.ReLU()]
        inputs = outputs
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * inputs, 10))


class Spent(NamedTuple):
    """What a run took; infinite if it didn't reach the target."""

    samples: float
    steps: float

    @property
    def cost(self) -> float:
        """Return the time in steps of one sample, if a step of B samples takes 1 + B/HALF_SPEED."""
        return self.steps + self.samples / HALF_SPEED


def reached(run: Trained, target: float) -> Spent:
    """Return what a run took to the target, interpolated between two evaluations."""
    evaluated = [line for line in run.lines if line.get("ema/loss") is not None]
    for before, after in pairwise(evaluated):
        if after["ema/loss"] <= target:
            share = (before["ema/loss"] - target) / (before["ema/loss"] - after["ema/loss"])
            return Spent(*(before[name] + share * (after[name] - before[name]) for name in ("samples", "step")))
    return Spent(math.inf, math.inf)


def to_target(setting: Setting) -> dict[str, Keys]:
    """Return the keys of each way to the target. The LR decays only where larger batches replace that."""
    start, constant, long = f"batch.global_size={START}", "lr.decay=constant", f"duration={setting.samples}sa"
    longer = f"duration={3 * setting.samples}sa"
    return {
        **{fixed(batch): (constant, f"batch.global_size={batch}", longer) for batch in FIXED},
        "curriculum": (constant, "batch.schedule=curriculum", long),
        "doubling": (start, DOUBLING, f"duration={setting.whole}sa"),
        **{name: (constant, start, long, f"control={name}", *keys) for name, keys in CONTROLLERS.items()},
    }


def fixed(batch: int) -> str:
    return f"fixed {batch}"


def trained(ways: Mapping[Way, Keys]) -> dict[Way, list[Trained]]:
    """Train each way with all seeds."""
    runs = train_all(
        [(*SAME, *SETTINGS[way[0]].keys, *keys, f"seed={seed}") for way, keys in ways.items() for seed in SEEDS]
    )
    return {way: runs[number * len(SEEDS) :][: len(SEEDS)] for number, way in enumerate(ways)}


def rows() -> Rows:
    """Return a row per task and way to its target, and the means over the tasks of their costs."""
    ways = {
        (task, name): (*keys, "ema=2000sa", "evaluate.every=2000sa", f"stop.at=ema/loss<={setting.target}")
        for task, setting in SETTINGS.items()
        for name, keys in to_target(setting).items()
    }
    runs = trained(ways)
    spent = {way: [reached(run, SETTINGS[way[0]].target) for run in of] for way, of in runs.items()}
    costs = {way: [one.cost for one in of] for way, of in spent.items()}
    best = {
        task: min(((task, fixed(batch)) for batch in FIXED), key=lambda way: math.fsum(costs[way])) for task in SETTINGS
    }
    to_best = {way: _paired(of, costs[best[way[0]]]) for way, of in costs.items()}
    to_start = {way: _paired(of, costs[way[0], fixed(START)]) for way, of in costs.items()}
    found = [
        {
            "task": task,
            "global batch": f"{name}, the best" if best[task] == (task, name) else name,
            "at the target": _sizes(runs[task, name]),
            "samples": _spread([one.samples for one in spent[task, name]]),
            "steps": _spread([one.steps for one in spent[task, name]]),
            "cost": _spread(costs[task, name]),
            "/ best fixed": _ratio(to_best[task, name]),
            f"/ {fixed(START)}": _ratio(to_start[task, name]),
            "aim": f"≤ {AIM_OF_A_TASK:g}" if name in AIMS else "",
        }
        for task, name in ways
    ]
    names = [name for task, name in ways if task == next(iter(SETTINGS))]
    return found + [
        {
            "task": WHOLE, "global batch": name, "at the target": "", "samples": "", "steps": "", "cost": "",
            "/ best fixed": _ratio(_over_tasks(to_best, name)),
            f"/ {fixed(START)}": _ratio(_over_tasks(to_start, name)),
            "aim": f"≤ {AIMS[name]:g}, ≤ {AIM_OF_START:g}" if name in AIMS else "",
        }
        for name in names
    ]  # fmt: skip


def rows_of_decay() -> Rows:
    """Return a row per task and way to train a whole run whose LR decays: its cost and its last loss."""
    ways = {
        (task, name): (
            f"batch.global_size={START}",
            "lr.decay=cosine",
            f"duration={round(length * setting.whole)}sa",
            *keys,
        )
        for task, setting in SETTINGS.items()
        for name, (length, keys) in DECAYED.items()
    }
    runs = trained(ways)
    spent = {way: [Spent(run.last("samples"), run.last("step")) for run in of] for way, of in runs.items()}
    costs = {way: [one.cost for one in of] for way, of in spent.items()}
    losses = {way: [run.last("val/loss") for run in of] for way, of in runs.items()}
    to_cost = {way: _paired(of, costs[way[0], fixed(START)]) for way, of in costs.items()}
    to_loss = {way: _paired(of, losses[way[0], fixed(START)]) for way, of in losses.items()}
    found = [
        {
            "task": task,
            "global batch": name,
            "at the end": _sizes(runs[task, name]),
            "samples": f"{SETTINGS[task].whole * DECAYED[name][0]:,.0f}",
            "steps": _spread([one.steps for one in spent[task, name]]),
            "cost": _spread(costs[task, name]),
            "val/loss": _spread(losses[task, name], ".4g"),
            f"cost / {fixed(START)}": _ratio(to_cost[task, name]),
            f"loss / {fixed(START)}": _ratio(to_loss[task, name]),
        }
        for task, name in ways
    ]
    return found + [
        {
            "task": WHOLE, "global batch": name, "at the end": "", "samples": "", "steps": "", "cost": "",
            "val/loss": "",
            f"cost / {fixed(START)}": _ratio(_over_tasks(to_cost, name)),
            f"loss / {fixed(START)}": _ratio(_over_tasks(to_loss, name)),
        }
        for name in DECAYED
    ]  # fmt: skip


def _paired(values: Sequence[float], bases: Sequence[float]) -> list[float]:
    """Return the ratios seed by seed; infinite where one of the two is."""
    return [value / base if math.isfinite(base) else math.inf for value, base in zip(values, bases, strict=True)]


def _over_tasks(ratios: Mapping[Way, Sequence[float]], name: str) -> list[float]:
    """Return the geometric mean over the tasks, by seed."""
    return [math.prod(of) ** (1 / len(of)) for of in zip(*(ratios[task, name] for task in SETTINGS), strict=True)]


def _spread(values: Sequence[float], form: str = ",.0f", mean: Callable[[Sequence[float]], float] = fmean) -> str:
    """Format the mean ± standard deviation over seeds, or in how many a value is known."""
    known = [value for value in values if math.isfinite(value)]
    if len(known) < len(values):
        return f"{len(known)} of {len(values)}"
    return f"{mean(known):{form}} ± {stdev(known) if known[1:] else 0:{form}}"


def _ratio(values: Sequence[float]) -> str:
    return _spread(values, ".2f", geometric_mean)


def _sizes(runs: Sequence[Trained]) -> str:
    """Format the range of the last batches."""
    sizes = sorted(round(run.last("global_size")) for run in runs if run.lines)
    return "–".join(f"{size}" for size in sorted({*sizes[:1], *sizes[-1:]}))


if __name__ == "__main__":
    for row in rows():
        print(json.dumps(row, ensure_ascii=False))
