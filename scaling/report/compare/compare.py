"""Compare runs: group them, choose a measure and a target, fit, and say what was found. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from isobatch.scaling.report.compare.comparison import Comparison, Report
from isobatch.scaling.report.compare.findings import findings_of, rejected_before_training, warnings_of
from isobatch.scaling.report.compare.groups import Group, grouped, never_planned, task_of
from isobatch.scaling.report.compare.measure import (
    easiest_target,
    metric_of,
    parse_metric,
    parse_target,
    refuse_unknown,
)
from isobatch.scaling.report.compare.values import Values, values_of
from isobatch.scaling.report.run import Run
from isobatch.scaling.tuning.forecast import Fit, fit


def compare(runs: Sequence[Run], metric: str | None = None, target: str | None = None) -> Report:
    """Compare runs, those of each task by themselves.

    Args:
        metric: the measure to compare by, ``name`` or ``name:min|max``; None chooses one.
        target: what to reach, such as ``val/accuracy>=0.97``; None: what every counted run reached.

    Raises:
        UserError: no run has the measure, or it isn't known which direction of it is better.
    """
    refuse_unknown(runs, metric, target)
    tasks: dict[tuple[str, str], list[Run]] = {}
    rejected = [run for run in runs if never_planned(run)]
    for run in runs:
        if not never_planned(run):
            tasks.setdefault(task_of(run), []).append(run)
    names = [name for name, _ in tasks]
    comparisons = [
        _comparison(name if names.count(name) == 1 else f"{name} ({of})", members, metric, target)
        for (name, of), members in tasks.items()
    ]
    several = len(comparisons) > 1
    warnings = [f"{one.task}: {text}" if several else text for one in comparisons for text in one.warnings]
    return Report(list(runs), comparisons, [*warnings, *rejected_before_training(rejected)])


def _comparison(task: str, runs: Sequence[Run], metric: str | None, target: str | None) -> Comparison:
    wanted = parse_target(target) if target else None
    chosen = metric_of(runs, parse_metric(metric)[0] if metric else wanted and wanted.name)
    given = wanted is not None and any(wanted.name in run.measures for run in runs)
    groups = grouped(runs)
    if not given:
        wanted = easiest_target([run for group in groups for run in group.counted], chosen) if chosen else None
    values = [values_of(group, chosen, wanted) for group in groups]
    found = Comparison(task, chosen, wanted, given, groups, values, _fits(groups, values))
    return replace(found, findings=findings_of(found), warnings=warnings_of(found))


def _fits(groups: Sequence[Group], values: Sequence[Values]) -> dict[str, Fit]:
    """Return the fit of each family with several batches, each at the LR with which it took the fewest samples."""
    fewest: dict[str, dict[int, float]] = {}
    tried: dict[str, set[int | None]] = {}
    for group, value in zip(groups, values, strict=True):
        batches = fewest.setdefault(group.family, {})
        tried.setdefault(group.family, set()).add(group.global_size)
        if group.global_size and value.to_samples and value.to_samples.mean > 0:
            before = batches.get(group.global_size, value.to_samples.mean)
            batches[group.global_size] = min(before, value.to_samples.mean)
    several = [family for family, batches in tried.items() if len(batches) > 1]
    return {family: fit(list(fewest[family]), list(fewest[family].values())) for family in several}


def as_dict(report: Report) -> dict[str, Any]:
    """Return the content of ``report.json``."""
    of_tasks = report.comparisons
    fits = [(one, family, found) for one in of_tasks for family, found in one.fits.items()]
    return {
        "runs": [run.summary() for run in report.runs],
        "groups": [entry for one in of_tasks for entry in _entries(one)],
        "fit": [
            {"task": one.task, "family": family, "target": str(one.target), **asdict(found)}
            for one, family, found in fits
        ],
        "findings": [{"task": one.task, "text": text} for one in of_tasks for text in one.findings],
        "warnings": report.warnings,
    }


def _entries(comparison: Comparison) -> list[dict[str, Any]]:
    """Return the groups of a comparison as plain values."""
    metric, target = comparison.metric, comparison.target
    return [
        {
            "task": comparison.task,
            "label": group.label,
            "optimizer": group.optimizer,
            "global_size": group.global_size,
            "lr_peak": group.lr_peak,
            "n": len(group.counted),
            "runs": [run.directory for run in group.runs],
            "left_out": {run.directory: why for run in group.runs if (why := group.left_out(run))},
            "metric": metric and metric.name,
            "direction": metric and metric.direction,
            "target": None if target is None else str(target),
            **asdict(values),
        }
        for group, values in comparison.pairs()
    ]
