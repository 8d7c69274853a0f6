"""Make a report: find runs, read, choose and compare them, and write what was found. Torch-free."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from isobatch.conf.rundir.lock import works
from isobatch.conf.schema import Report as Options
from isobatch.scaling.errors import UserError
from isobatch.scaling.report.compare.compare import compare
from isobatch.scaling.report.compare.comparison import Report
from isobatch.scaling.report.compare.measure import directions_asked
from isobatch.scaling.report.compare.tables import text_of
from isobatch.scaling.report.compare.write import folder_of, write
from isobatch.scaling.report.measures import Direction
from isobatch.scaling.report.run import Run, read
from isobatch.scaling.report.runs import directories
from isobatch.scaling.report.select import chosen

SMALL_BYTES = 10_000_000  # of metrics, which one process reads within a fraction of a second
MOST_PROCESSES = 8


def make_report(roots: Sequence[str], options: Options, queue: Mapping[str, str] | None = None) -> Report:
    """Compare the runs in ``roots`` and write the report.

    Args:
        roots: run directories, sweeps, or folders of runs.
        queue: Slurm's states of unfinished jobs, by id.

    Raises:
        UserError: a folder holds no runs, an option isn't valid, or the report can't be written.
    """
    found: dict[Path, Path] = {}
    for root in roots:
        inside = directories(Path(os.path.expanduser(root)))
        if not inside:
            fix = "name run directories, a sweep, or a folder of runs"
            raise UserError(f"there are no runs in {root}", fix, "run.dir", root)
        found |= {run.absolute(): run for run in inside}
    directions = directions_asked(options.metric, options.target)
    every = _read_all(list(found.values()), queue, directions)
    runs = chosen(every, options.where, options.sort)
    if not runs:
        problem = f"none of {len(every)} runs meets report.where={options.where}"
        raise UserError(problem, "action=runs lists them", "report.where", options.where)
    report = compare(runs, options.metric, options.target)
    report = write(report, Path(os.path.expanduser(options.dir)) if options.dir else folder_of(roots))
    return replace(report, text=text_of(report, shutil.get_terminal_size((0, 0)).columns))


def _read_all(runs: Sequence[Path], queue: Mapping[str, str] | None, directions: Mapping[str, Direction]) -> list[Run]:
    """Read runs, in several processes if there is much to read and this process can be forked."""
    work = partial(_read, queue, directions)
    args = [(run, works(run)) for run in runs]
    processes = min(len(os.sched_getaffinity(0)), MOST_PROCESSES, len(runs))
    may_fork = threading.active_count() == 1 and "torch" not in sys.modules  # whose threads a fork would lack
    if processes == 1 or not may_fork or sum(map(_size, runs)) < SMALL_BYTES:
        return list(map(work, args))
    with ProcessPoolExecutor(processes, get_context("fork")) as pool:
        return list(pool.map(work, args, chunksize=max(1, len(runs) // (4 * processes))))


def _read(queue: Mapping[str, str] | None, directions: Mapping[str, Direction], arg: tuple[Path, bool]) -> Run:
    return read(arg[0], arg[1], queue, directions)


def _size(run: Path) -> int:
    with suppress(OSError):
        return (run / "metrics.jsonl").stat().st_size
    return 0
