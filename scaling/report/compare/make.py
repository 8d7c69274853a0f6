"""Make a report: find runs, read, choose and compare them, and write what was found. Torch-free."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from isobatch.conf.schema import Report as Options
from isobatch.scaling.errors import UserError
from isobatch.scaling.geometry import counted
from isobatch.scaling.report.compare.compare import compare
from isobatch.scaling.report.compare.comparison import Report
from isobatch.scaling.report.compare.findings import fitted
from isobatch.scaling.report.compare.forecasts import comparison_of_points
from isobatch.scaling.report.compare.measure import asked
from isobatch.scaling.report.compare.tables import text_of
from isobatch.scaling.report.compare.write import folder_of, write
from isobatch.scaling.report.runs import found_in, no_runs, read_all
from isobatch.scaling.report.select import chosen, none_meets


def make_report(roots: Sequence[str], options: Options, queue: Mapping[str, str] | None = None) -> Report:
    """Compare the runs in ``roots`` and write the report.

    Args:
        roots: run directories, sweeps, or folders of runs; none with ``report.points``.
        queue: Slurm's states of unfinished jobs, by id.

    Raises:
        UserError: a folder holds no runs, an option isn't valid, or the report can't be written.
    """
    if options.points is not None:
        return _forecast(roots, options, options.points)
    wanted, found = asked(options.metric, options.target), found_in(roots)
    wanted = wanted._replace(in_order=options.sort is not None)
    for root in roots:
        if not any(run.absolute().is_relative_to(Path(os.path.expanduser(root)).absolute()) for run in found):
            raise no_runs(root)
    every = read_all(found, queue, wanted.directions)
    runs = chosen(every, options.where, options.sort)
    if options.where and not runs:
        raise none_meets(every, options.where)
    part = f"{len(runs)} of {counted(len(every), 'run')}: report.where={options.where}"
    report = replace(compare(runs, wanted), chosen=part if len(runs) < len(every) else "")
    return _written(report, options, roots)


def _forecast(roots: Sequence[str], options: Options, points: str) -> Report:
    """Write a report on points that were given without runs."""
    others = {f"report.{name}": getattr(options, name) for name in ("metric", "target", "where", "sort")}
    given = [name for name, value in {"run.dir": roots, **others}.items() if value]
    if given:
        problem = f"report.points has amounts of data of its own, so it takes no {' or '.join(given)}"
        raise UserError(problem, "leave out one of them", "report.points", points)
    comparison = comparison_of_points(points)
    found = [fitted(fit) for fit in comparison.fits.values()]
    return _written(Report([], [replace(comparison, findings=found)], []), options, ["."])


def _written(report: Report, options: Options, roots: Sequence[str]) -> Report:
    report = write(report, Path(os.path.expanduser(options.dir)) if options.dir else folder_of(roots))
    return replace(report, text=text_of(report, shutil.get_terminal_size((0, 0)).columns))
