"""Find runs below a folder, and list them: a row each, with their progress and why they last stopped."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from isobatch.conf.rundir.lock import works
from isobatch.conf.rundir.reading import events
from isobatch.scaling.errors import UserError
from isobatch.scaling.report.grid import Figure, clock, grid, rounded, shortened
from isobatch.scaling.report.measures import Direction
from isobatch.scaling.report.run import Run, read
from isobatch.scaling.report.select import chosen, none_meets
from isobatch.scaling.stopping import EVALUATED

LISTED = ("outcome.json", "events.jsonl")  # mark a run; config.yaml is a common name, and sweeps have submissions, too
OPTIONAL = ("time", "ETA", "job", "stopped last by")  # columns that are left out where no run has a value
SMALL_BYTES = 10_000_000  # of metrics, which one process reads within a fraction of a second
MOST_PROCESSES = 8
DEPTH = 3  # levels below a folder that are searched for runs: runs/<sweep>/<run>


def directories(root: Path, depth: int = DEPTH) -> list[Path]:
    """Return the directories of runs, sorted: ``root`` itself, or those up to ``depth`` levels below it."""
    if any(os.path.lexists(root / name) for name in LISTED):
        return [root]
    inner: list[Path] = []
    with suppress(OSError):  # root isn't a folder, or can't be listed
        inner = [child for child in root.iterdir() if child.is_dir() and not child.is_symlink()] if depth else []
    return sorted(run for child in inner for run in directories(child, depth - 1))


def found_in(roots: Sequence[str]) -> list[Path]:
    """Return the directories of the runs in ``roots``, each once. Raises UserError if a folder doesn't exist."""
    for root in roots:
        if not os.path.exists(os.path.expanduser(root)):
            raise no_runs(root)
    found = {run.absolute(): run for root in roots for run in directories(Path(os.path.expanduser(root)))}
    return list(found.values())


def no_runs(root: str) -> UserError:
    """Return the error that there are no runs in ``root``."""
    missing = not os.path.exists(os.path.expanduser(root))
    problem = f"{root} doesn't exist" if missing else f"there are no runs in {root}"
    return UserError(problem, "name run directories, a sweep, or a folder of runs", "run.dir", root)


def any_in_a_job(roots: Sequence[str]) -> bool:
    """Return whether a run in ``roots`` was ever submitted to Slurm, or started by it."""
    return any(event.get("job") for run in found_in(roots) for event in events(run))


def read_all(
    runs: Sequence[Path], queue: Mapping[str, str] | None, directions: Mapping[str, Direction] | None = None
) -> list[Run]:
    """Read runs, in several processes if there is much to read and this process can be forked."""
    work = partial(_read, queue, directions)
    args = [(run, works(run)) for run in runs]
    processes = min(len(os.sched_getaffinity(0)), MOST_PROCESSES, len(runs))
    may_fork = threading.active_count() == 1 and "torch" not in sys.modules  # whose threads a fork would lack
    if processes == 1 or not may_fork or sum(map(_size, runs)) < SMALL_BYTES:
        return list(map(work, args))
    with ProcessPoolExecutor(processes, get_context("fork")) as pool:
        return list(pool.map(work, args, chunksize=max(1, len(runs) // (4 * processes))))


def _read(queue: Mapping[str, str] | None, directions: Mapping[str, Direction] | None, arg: tuple[Path, bool]) -> Run:
    return read(arg[0], arg[1], queue, directions)


def _size(run: Path) -> int:
    with suppress(OSError):
        return (run / "metrics.jsonl").stat().st_size
    return 0


def listing(
    roots: Sequence[str], queue: Mapping[str, str], output: str, where: str | None = None, sort: str | None = None
) -> str:
    """Return the runs in ``roots`` as a table, or as JSON if ``output`` is ``json``.

    Args:
        queue: Slurm's states of unfinished jobs, by id.
        where, sort: as in ``select.chosen``.

    Raises:
        UserError: there are no runs, or an option isn't valid.
    """
    every = read_all(found_in(roots), queue)
    if not every:
        raise no_runs(roots[0])
    runs = chosen(every, where, sort)
    if output == "json":
        return json.dumps([run.summary() for run in runs], indent=1)
    if where and not runs:
        return str(none_meets(every, where))
    width = shutil.get_terminal_size((0, 0)).columns  # 0 where the output isn't a terminal
    rows = list(map(cells, runs))
    empty = {name for name in OPTIONAL if not any(row[name] for row in rows)}
    shown = [{name: cell for name, cell in row.items() if name not in empty} for row in rows]
    measured = [name for name in dict.fromkeys(name for row in rows for name in row) if name.startswith(EVALUATED)]
    optional = ("job", "ETA", *measured[:1:-1], "peak LR", "time", "samples/s", *measured[1::-1], "batch")
    return grid(shown, width, optional, shortened=("stopped last by", "run"))


def cells(run: Run) -> dict[str, Any]:
    """Return the cells of a run's row by column."""
    recipe, done, total = run.recipe, run.done, run.recipe.steps
    return {
        "run": run.directory,
        "state": f"{run.state}, diverged" if done.diverged else run.state,
        "step": Figure(f"{done.step:,}/{'?' if total is None else f'{total:,}'}"),
        "batch": recipe.global_size,
        "peak LR": recipe.lr_peak,
        "loss": run.loss,
        **run.evaluation,
        "samples/s": rounded(done.samples_per_s),
        "time": None if done.time_s is None else Figure(clock(done.time_s)),
        "ETA": None if done.eta_s is None else Figure(clock(done.eta_s)),
        "job": run.job and f"{run.job} {run.queue or 'over'}",
        "stopped last by": run.cause and shortened(run.cause),
    }
