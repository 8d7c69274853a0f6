"""Make one recommendation of the results of all parts."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from typing import Any

from isobatch.conf.controllers import NoControl
from isobatch.conf.overrides import key_of
from isobatch.scaling.errors import UserError
from isobatch.scaling.report.grid import grid, rounded
from isobatch.scaling.tuning.recommendation import Prediction, candidates, recommend
from isobatch.scaling.tuning.speed import AGAIN, known_speed, unknown
from isobatch.scaling.tuning.witnesses import stretches_of
from isobatch.trainers.tuning.bench import Bench
from isobatch.trainers.tuning.notes import carried_lr, notes_on, peak_lr
from isobatch.trainers.tuning.parts import Results
from isobatch.trainers.tuning.starts import run_of_config
from isobatch.trainers.tuning.witnesses import witnesses

LEAST = 8  # samples of the smallest candidate, unless the run's own batch is smaller
SHOWN = 12  # rows of the printed table
SAME = 0.01  # relative difference of two durations that doesn't matter
REPLACED = ("action", "output", "batch.global_size", "batch.per_gpu", "batch.accumulation", "batch.schedule", "lr.peak",
            "run.dir", "run.new")  # fmt: skip


def recommended(bench: Bench, parts: Results) -> dict[str, Any] | None:
    """Return the object ``recommendation`` of ``tune.json``; None if nothing was measured that it could rest on.

    Raises:
        UserError: no batch has a step within ``tune.max_step_ms``, or the time of a step isn't known.
    """
    plan, config, world = bench.opened.plan, bench.config, bench.session.world.size
    check(bench, parts)
    speed = known_speed(parts, plan)
    if config.tune.max_step_ms and speed is None:
        problem = f"tune.max_step_ms={config.tune.max_step_ms:g}, but {unknown(parts['speed']['spread'])}"
        raise UserError(problem, AGAIN, "tune.max_step_ms")
    measured = witnesses(bench, parts)
    if not measured and not parts.keys() & {"speed", "noise", "branch"}:
        return None
    batch, quantum = plan.cut.global_size, plan.granule * world
    least, most = min(LEAST, batch), max(batch, len(bench.opened.data) // 2)
    sizes = candidates(max(least, quantum), most, quantum)
    found = recommend(
        stretches_of(plan),
        measured,
        speed,
        sizes,
        lambda size: peak_lr(bench, parts, size),
        config.tune.max_step_ms,
    )
    if found is None:
        problem = f"no batch has a step of at most tune.max_step_ms={config.tune.max_step_ms:g} ms"
        raise UserError(problem, "allow longer steps, or use more or faster GPUs", "tune.max_step_ms")
    notes = notes_on(found, bench, parts, max(sizes))
    return {**found.plain(lambda row: command(bench, row)), "notes": notes}


def check(bench: Bench, parts: Collection[str]) -> None:
    """Raise UserError if ``tune.max_step_ms`` is given, and speed isn't among the measured parts."""
    limit_ms = bench.config.tune.max_step_ms
    if limit_ms and "speed" not in parts:
        problem = f"tune.max_step_ms={limit_ms:g} needs the time of a step, which wasn't measured"
        raise UserError(problem, "add speed to tune.parts", "tune.max_step_ms", limit_ms)


def command(bench: Bench, row: Prediction) -> str:
    """Return the command that trains with a batch: a new run where this command took its config from a run."""
    plan = bench.opened.plan
    per_sample = plan.sized(1)
    words = [word for word in shlex.split(bench.session.start.command) if not _replaced(word)]
    run = bench.run if bench.config.run.directory else run_of_config(bench)
    if run and (run / "config.yaml").exists():
        words = [word for word in words if not word.startswith("init_from=")]
        words += [f"run.dir={run}", "run.new=true"]
    sizes = [f"batch.global_size={row.global_size * per_sample}"]
    planned = plan.samples or 0
    if row.samples is not None and abs(row.samples - planned) > SAME * planned:
        words = [word for word in words if not word.startswith("duration=")]
        sizes.append(f"duration={round(row.samples)}sa")
    per_gpu = row.per_gpu or (None if isinstance(bench.config.control, NoControl) else plan.cut.per_gpu)
    sizes += [f"batch.per_gpu={per_gpu * per_sample}"] if per_gpu else []
    if plan.base_source == "peak" or row.lr != carried_lr(bench, plan.peak.lr, row.global_size):
        sizes.append(f"lr.peak={row.lr:.6g}")
    return shlex.join([*words, *sizes])


def _replaced(word: str) -> bool:
    key = key_of(word)
    return key in REPLACED or key.partition(".")[0] == "tune"


def summary(found: Mapping[str, Any]) -> str:
    """Return what rank 0 prints of a recommendation; "" if there is none."""
    if not found:
        return ""
    rows = found["predictions"]
    marks = {found["global_size"]: "← recommended"}
    for other in found["alternatives"]:
        marks.setdefault(other["global_size"], "← few samples")
    step = max(1, len(rows) // SHOWN)
    shown = [row for index, row in enumerate(rows) if index % step == 0 or row["global_size"] in marks]
    table = grid([{**_cells(row), "": marks.get(row["global_size"], "")} for row in shown])
    return "\n".join(
        [
            table,
            "",
            f"recommended: global batch {found['global_size']:,} ({found['why']})",
            found["agreement"],
            *found["notes"],
            found["command"],
            "",
            "",
        ]
    )


def _cells(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "global batch": row["global_size"],
        "per GPU": row["per_gpu"],
        "passes": row["accumulation"],
        "peak LR": row["lr"],
        "steps": rounded(row["steps"]),
        "samples": rounded(row["samples"]),
        "seconds": row["seconds"],
        "ms per step": row["step_ms"],
    }
