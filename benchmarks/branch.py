"""Compare the critical batch that branches tell with that of the measured samples to a target by batch.

python -m benchmarks branch branch-text
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import critical
from benchmarks.cores import on_all_cores
from benchmarks.forecast import measured
from benchmarks.tables import Rows
from benchmarks.trained import CONSTANT, Trained, train_all
from isobatch.scaling.planning.automatic import configured
from isobatch.scaling.report.compare.words import number
from isobatch.scaling.tuning.forecast import Fit, fit
from isobatch.trainers.ranks.world import World
from isobatch.trainers.tuning import branch
from isobatch.trainers.tuning.tune import open_bench
from tests.support.harness import Runs, in_ranks, session_of

TARGET = 0.30  # validation loss
BATCH, SAMPLES = 32, 30_000  # of the run that is branched off, and in which the target is reached
SEEDS = (0, 1, 2)
SWEPT = {16: 60_000, 32: 60_000, 64: 60_000, 128: 100_000, 256: 200_000, 512: 300_000}  # batch -> samples at most
SWEEP_SEEDS = (0, 1)
OPTIMIZERS = {  # the recipe tuned at 32, carried by the rule of `auto`
    "adamw": ("optimizer=adamw", "optimizer.weight_decay=0"),
    "sgd": ("optimizer=sgd", "optimizer.weight_decay=0"),
}
TEXT = (*critical.TEXT.task, "lr.peak=0.008", "data.workers=0", "check.contract=false")
TEXT_SAMPLES = 20_000  # of a run at BATCH, at which 0.008 is the best LR; the target takes 5,400 of them
TASK = ("task=mnist1d", "lr.decay=constant", "data.workers=0", "check.contract=false")


def swept(optimizer: str) -> tuple[Fit, float]:
    """Return the fit of the samples to the target, and all samples that the sweep took."""
    cells = [(batch, seed) for batch in SWEPT for seed in SWEEP_SEEDS]
    runs = train_all(
        [
            (
                *TASK, *OPTIMIZERS[optimizer], f"batch.global_size={batch}", f"seed={seed}",
                f"duration={SWEPT[batch]}sa", f"evaluate.every={max(1024, 2 * batch)}sa", f"stop.at=val/loss<={TARGET}",
            )
            for batch, seed in cells
        ]
    )  # fmt: skip
    points: dict[int, list[float]] = {}
    for (batch, _), run in zip(cells, runs, strict=True):
        points.setdefault(batch, []).append(reached(run))
    means = {batch: statistics.fmean(samples) for batch, samples in points.items()}
    known = {batch: mean for batch, mean in means.items() if math.isfinite(mean)}
    return fit(list(known), list(known.values())), sum(run.lines[-1]["samples"] for run in runs if run.lines)


def reached(run: Trained) -> float:
    """Return the samples of the first evaluation that reached the target; infinite if none did."""
    ends = [line["samples"] for line in run.lines if line.get("val/loss", math.inf) <= TARGET]
    return float(ends[0]) if ends else math.inf


def branched(recipe: Sequence[str], samples: int, seed: int, folder: Path) -> dict[str, Any]:
    """Train one run with kept checkpoints, and branch off three of them."""
    command = (*recipe, f"batch.global_size={BATCH}", f"seed={seed}", f"duration={samples}sa")
    run = Runs(folder, deadline_s=600)(1, *CONSTANT, *command, "checkpoint.keep_every=10%")
    assert run.ends[0].get("state") == "finished", run.log()

    def body(world: World) -> Any:
        bench = open_bench(session_of(configured([*command, "action=tune", f"init_from={run.run.path}"]), world))
        assert bench
        return branch.measure(bench)

    found: dict[str, Any] = in_ranks(1, body, folder / "branches", deadline_s=600)[0]
    return found


def rows() -> Rows:
    """Return a row per optimizer and seed: what its branches tell, beside the fit to samples to a target by batch.

    SGD's batches are those of ``critical``, at the best LR of each: by the linear rule large ones diverge.
    """
    jobs = [(optimizer, seed) for optimizer in OPTIMIZERS for seed in SEEDS]
    recipes = {optimizer: (*TASK, *own) for optimizer, own in OPTIMIZERS.items()}
    calls = [partial(branched, recipes[optimizer], SAMPLES, seed) for optimizer, seed in jobs]
    told = dict(zip(jobs, on_all_cores(calls), strict=True))
    curve, swept_samples = swept("adamw")
    fits: dict[str, tuple[Fit, float | None]] = {"adamw": (curve, swept_samples)}
    by_sgd = next(curve for curve in measured() if curve.name.startswith("mnist1d"))
    fits["sgd"] = fit(by_sgd.batches, by_sgd.amounts), None
    return [_row(optimizer, seed, told[optimizer, seed], *fits[optimizer]) for optimizer, seed in jobs]


def rows_of_text() -> Rows:
    """Return a row per seed of a small language model, beside the fit to ``critical-text``."""
    found = on_all_cores([partial(branched, TEXT, TEXT_SAMPLES, seed) for seed in SEEDS])
    curve = next(curve for curve in measured() if curve.name.startswith("text"))
    by_target = fit(curve.batches, curve.amounts)
    return [_row("adamw", seed, told, by_target, None) for seed, told in zip(SEEDS, found, strict=True)]


def _row(optimizer: str, seed: int, told: dict[str, Any], curve: Fit, swept_samples: float | None) -> dict[str, Any]:
    critical, course = told["critical_batch"], told["course"]
    taken = sum(one["length"] * len(one["branches"]) for one in course)
    limits = sorted({f"{one['lr_limit']:g} ×" for one in course if one["lr_limit"]})
    known = critical and curve.critical_batch
    return {
        "optimizer": optimizer,
        "seed": seed,
        "by branches": _interval(critical, told["interval"]),
        "by checkpoint": ", ".join(
            number(one["critical_batch"]) if one["critical_batch"] else "not known" for one in course
        ),
        "LR limit": ", ".join(limits) or "none",
        "by samples to the target": _interval(curve.critical_batch, curve.interval),
        "ratio": f"{critical / curve.critical_batch:.2f}" if known else "—",
        "samples of the branches, of the sweep's": f"{taken / swept_samples:.0%}" if swept_samples else "—",
    }


def _interval(value: float | None, interval: Sequence[float | None]) -> str:
    low, high = (number(side) if side else "?" for side in interval)
    return f"{number(value) if value else 'not known'} [{low}, {high}]"


if __name__ == "__main__":
    for row in rows():
        print(json.dumps(row))
