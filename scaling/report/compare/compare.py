"""Compare runs: group them, choose a measure and a target, fit, and say what was found. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from isobatch.scaling.report.compare.comparison import Comparison, Report
from isobatch.scaling.report.compare.findings import findings_of, not_compared, warnings_of
from isobatch.scaling.report.compare.forecasts import forecasts_of
from isobatch.scaling.report.compare.groups import grouped, never_planned, task_of
from isobatch.scaling.report.compare.measure import Asked, common_stop, metric_of, refuse_unknown, usual_target
from isobatch.scaling.report.compare.values import values_of
from isobatch.scaling.report.run import Run
from isobatch.scaling.tuning.forecast import Fit, Forecast, SpeedCurve, fit


def compare(runs: Sequence[Run], wanted: Asked) -> Report:
    """Compare runs, those of each task by themselves.

    Raises:
        UserError: no run has the measure that is wanted, or it isn't known which direction of it is better.
    """
    refuse_unknown(runs, wanted)
    left_out: list[Run] = []
    tasks: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        members = left_out if never_planned(run) or run.recipe.task is None else tasks.setdefault(task_of(run), [])
        members.append(run)
    names = [name for name, _ in tasks]
    comparisons = [
        _comparison(name if names.count(name) == 1 or not of else f"{name} ({of})", members, wanted)
        for (name, of), members in tasks.items()
    ]
    several = len(comparisons) > 1
    warnings = [f"{one.task}: {text}" if several else text for one in comparisons for text in one.warnings]
    return Report(list(runs), comparisons, [*warnings, *not_compared(left_out)])


def _comparison(task: str, runs: Sequence[Run], wanted: Asked) -> Comparison:
    target, key = wanted.target, "report.target"
    if not target or not any(target.name in run.measures for run in runs):
        target, key = common_stop(runs), "stop.at"
    metric = metric_of(runs, wanted.metric or (wanted.target.name if wanted.target else None))
    groups = grouped(runs, wanted.in_order)
    if metric and not target:
        target, key = usual_target([run for group in groups for run in group.counted], metric), ""
    values = [values_of(group, metric, target) for group in groups]
    found = Comparison(task, metric, target, key, groups, values, {})
    found = replace(found, fits=_fits(found))
    found = replace(found, forecasts=_forecasts(found))
    return replace(found, findings=findings_of(found), warnings=warnings_of(found))


def _fits(comparison: Comparison) -> dict[str, Fit]:
    """Return the fit of each family with several batches, each at the LR with which it took the fewest samples."""
    tried: dict[str, set[int | None]] = {}
    for group in comparison.groups:
        tried.setdefault(group.family, set()).add(group.global_size)
    quickest = [
        (group.family, group.global_size, values.to_samples.mean)
        for group, values in comparison.quickest()
        if values.to_samples
    ]
    fits = {}
    for family in (family for family, batches in tried.items() if len(batches) > 1):
        points = [(batch, samples) for of, batch, samples in quickest if of == family and batch and samples > 0]
        fits[family] = fit([batch for batch, _ in points], [samples for _, samples in points])
    return fits


def _forecasts(comparison: Comparison) -> dict[str, list[Forecast]]:
    """Return the forecasts of each fit, with the speeds of the groups that it is from."""
    speeds: dict[str, list[tuple[float, float]]] = {family: [] for family in comparison.fits}
    for group, values in comparison.quickest():
        if group.family in speeds and group.global_size and values.samples_per_s:
            speeds[group.family].append((group.global_size, values.samples_per_s.mean))
    return {family: forecasts_of(found, SpeedCurve(speeds[family])) for family, found in comparison.fits.items()}


def as_dict(report: Report) -> dict[str, Any]:
    """Return the content of ``report.json``."""
    of_tasks = report.comparisons
    fits = [(one, family, found) for one in of_tasks for family, found in one.fits.items()]
    return {
        "chosen": report.chosen,
        "runs": [run.summary() for run in report.runs],
        "groups": [entry for one in of_tasks for entry in _entries(one)],
        "fit": [
            {
                "task": one.task,
                "family": family,
                "target": one.target and str(one.target),
                **asdict(found),
                "predictions": [asdict(forecast) for forecast in one.forecasts.get(family, [])],
            }
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
            "left_out": group.left_out,
            "metric": metric and metric.name,
            "direction": metric and metric.direction,
            "target": None if target is None else str(target),
            **asdict(values),
        }
        for group, values in comparison.pairs()
    ]
