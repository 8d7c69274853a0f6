"""Describe the pictures of a comparison, for whoever draws them. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from isobatch.scaling.report.compare.comparison import Comparison
from isobatch.scaling.report.compare.forecasts import SHADE, curves_of, picture_of_points
from isobatch.scaling.report.compare.groups import Group, failure_of, run_label
from isobatch.scaling.report.compare.picture import Column, Curve, Heat, Kind, Panel, Picture
from isobatch.scaling.report.compare.values import Values
from isobatch.scaling.report.compare.words import spread
from isobatch.scaling.report.tuning import picture_of
from isobatch.scaling.tuning.spread import Spread

AXES = {"step": "steps", "samples": "samples", "time_s": "time in seconds"}
COURSE = {  # title and unit of the curves that aren't measures
    "lr": ("Learning rate", "learning rate"),
    "global_size": ("Global batch", "samples per step"),
    "samples_per_s": ("Throughput", "samples per second"),
    "noise/scale": ("Gradient noise scale", "samples"),
}
TO_TARGET: dict[str, Callable[[Values], Spread | None]] = {
    "steps": lambda values: values.to_steps,
    "samples": lambda values: values.to_samples,
    "seconds": lambda values: values.to_time_s,
}
RANGE_FOR_LOG = 12.0  # an axis is logarithmic where its values span more than this factor
SHADE_OF_NOISE = "The shade is the 95 % interval of the noise scale, where its ends are within a factor of 20."
MOST_INTERVALS, MOST_WIDE = 6, 20.0  # runs whose intervals are drawn, and the largest ratio of an interval's ends
MOST_MEASURES = 16  # that are drawn


def pictures_of(comparison: Comparison) -> list[Picture]:
    """Return the pictures that the runs have values for; of given points, the one with their fit."""
    if not comparison.groups and comparison.fits:
        return [picture_of_points(comparison)]
    several = len({group.global_size for group in comparison.groups}) > 1
    both = "The same runs twice: look for where small and large batches change places." if several else ""
    evaluated = evaluated_in(comparison)[:MOST_MEASURES]
    shade_of_noise = SHADE_OF_NOISE if any(_intervals(comparison)) else ""
    made = [
        Picture("loss", "Training loss by steps and by samples", both, _panels(comparison, ["loss"], "step samples")),
        Picture(
            "evaluations", "Evaluations by steps and by samples", "Each point is one evaluation.",
            _panels(comparison, evaluated, "step samples"),
        ),
        Picture(
            "time", "By time", "Seconds of training, without evaluations.",
            _panels(comparison, ["loss", *evaluated[:1]], "time_s"),
        ),
        Picture("course", "Schedule, throughput and noise", shade_of_noise, _course(comparison)),
    ]  # fmt: skip
    if len(comparison.groups) > 1:
        over_seeds = "Mean and standard deviation over seeds, and each seed."
        made.append(Picture("by-batch", "By batch", over_seeds, _by_batch(comparison)))
        in_cells = "Mean ± standard deviation over seeds."
        made.append(Picture("batch-by-lr", "Batch and learning rate", in_cells, _grids(comparison)))
    if several:
        choice = "a group is worth choosing if no other is both left of it and below it"
        shade = f" {SHADE}" if any(comparison.forecasts.values()) else ""
        about = f"Down is better. In the last panel, {choice}.{shade}"
        made.append(Picture("target", f"To {comparison.target}", about, _targets(comparison)))
    made += list(_tuned(comparison))
    return [picture for picture in made if picture.panels]


def _tuned(comparison: Comparison) -> Iterator[Picture]:
    """Yield the picture of action=tune for the first run that was tuned."""
    for run in comparison.runs:
        if picture := picture_of(run.tuned):
            yield replace(picture, about=f"action=tune of {run.directory}: what it has measured, and what it predicts.")
            return


# ---- curves of runs


def evaluated_in(comparison: Comparison) -> list[str]:
    """Return the names of the measures of the evaluations, the compared one first."""
    names = dict.fromkeys(name for run in comparison.runs for name in run.curves.evaluations if "/" in name)
    first = comparison.metric.name if comparison.metric else ""
    return sorted(names, key=lambda name: (name != first, not name.startswith("val/")))


def _panels(comparison: Comparison, names: Sequence[str], axes: str) -> list[Panel]:
    """Return a panel for each measure and axis that the runs have."""
    panels = []
    for name in names:
        title, label = ("Training loss", "training loss") if name == "loss" else (name, name)
        for axis in axes.split():
            if curves := list(_curves(comparison, axis, name, evaluations=name != "loss")):
                by = AXES[axis].partition(" ")[0]
                panels.append(Panel(f"{title} by {by}", AXES[axis], label, *_log(curves), curves))
    return panels


def _course(comparison: Comparison) -> list[Panel]:
    return [
        Panel(title, "samples", label, *_log(curves), curves)
        for name, (title, label) in COURSE.items()
        if (
            curves := [
                *(_intervals(comparison) if name == "noise/scale" else ()),
                *_curves(comparison, "samples", name, evaluations=False),
            ]
        )
    ]


def _intervals(comparison: Comparison) -> Iterator[Curve]:
    """Yield the outline of the noise scale's interval for each run, where it says something, if the runs are few."""
    if len(comparison.runs) > MOST_INTERVALS:
        return
    for index, group in enumerate(comparison.groups):
        for run in group.runs:
            steps = run.curves.steps
            ends = zip(*(steps.get(name, []) for name in ("samples", "noise/low", "noise/high")), strict=False)
            for known, points in groupby(ends, lambda end: all(end) and end[2] < MOST_WIDE * end[1]):
                if known and len(outline := list(points)) > 1:
                    xs, lows, highs = map(list, zip(*outline, strict=True))
                    name = f"{run_label(group, run)}, 95 % interval"
                    yield Curve([*xs, *xs[::-1]], [*lows, *highs[::-1]], name, index, kind="band")


def _curves(comparison: Comparison, axis: str, name: str, evaluations: bool) -> Iterator[Curve]:
    """Yield the curve of each run that has both columns; the first run of a group carries its label."""
    for index, group in enumerate(comparison.groups):
        label = group.label if len(comparison.groups) > 1 else ""
        for run in group.runs:
            columns = run.curves.evaluations if evaluations else run.curves.steps
            if axis in columns and name in columns:
                kind: Kind = "both" if evaluations else "step" if name == "global_size" else "line"
                mark = failure_of(run)
                yield Curve(columns[axis], columns[name], run_label(group, run), index, label, kind, mark=mark)
                label = ""


def _log(curves: Sequence[Curve]) -> tuple[bool, bool]:
    """Return whether each axis of these curves spans so much that it should be logarithmic."""
    ends = [curve.x[-1] for curve in curves if curve.x and curve.x[-1]]
    ys = [y for curve in curves for y in curve.y if y is not None]
    x_log = len(ends) > 1 and max(ends) > RANGE_FOR_LOG * min(ends)  # type: ignore[type-var, operator]
    return x_log, bool(ys) and min(ys) > 0 and max(ys) > RANGE_FOR_LOG * min(ys)


# ---- values of groups, by batch


def _by_batch(comparison: Comparison) -> list[Panel]:
    """Return the measure at the end by batch, a curve for each family, at the best learning rate."""
    name = comparison.metric.name if comparison.metric else ""
    curves = list(_by(comparison, comparison.best_lrs(), lambda values: values.last))
    if not curves:
        return []
    for index, group in enumerate(comparison.groups):
        values: Column = [run.measures[name].last for run in group.counted if name in run.measures]
        if len(values) > 1:
            curves.append(Curve([group.global_size] * len(values), values, group.label, index, kind="points"))
    return [_over_batches(f"{name} at the end, by batch", name, False, curves)]


def _over_batches(title: str, y_label: str, y_log: bool, curves: list[Curve]) -> Panel:
    """Return a panel whose ticks are the batches."""
    ticks = sorted({x for curve in curves for x in curve.x if x is not None and curve.kind in ("both", "points")})
    return Panel(title, "global batch in samples", y_label, True, y_log, curves, ticks)


def _by(
    comparison: Comparison, pairs: Sequence[tuple[Group, Values]], get: Callable[[Values], Spread | None]
) -> Iterator[Curve]:
    """Yield a curve for each family through those of its groups in ``pairs``, which differ in batch."""
    families = dict.fromkeys(group.family for group in comparison.groups)
    for number, family in enumerate(families):
        points = [
            (group.global_size, value, group.label)
            for group, values in pairs
            if group.family == family and group.global_size and (value := get(values))
        ]
        if len(points) > 1 or (points and len(families) > 1):
            yield Curve(
                [x for x, _, _ in points],
                [value.mean for _, value, _ in points],
                family or "mean",
                None,
                family if len(families) > 1 else "",
                "both",
                [value.deviation for _, value, _ in points],
                [label for _, _, label in points],
                number,
            )


def _grids(comparison: Comparison) -> list[Panel]:
    """Return a table by batch and learning rate for each family that has several of both."""
    name, panels = comparison.metric.name if comparison.metric else "", []
    for family in dict.fromkeys(group.family for group in comparison.groups):
        cells = {
            (group.global_size, group.lr_peak): values
            for group, values in comparison.pairs()
            if group.family == family and group.lr_peak and group.global_size
        }
        batches = [batch for batch, _ in cells]
        if sum(batches.count(batch) > 1 for batch in {*batches}) > 1:
            more_is_better = comparison.metric is not None and comparison.metric.direction == "max"
            title = f"{name} {family}".strip()
            panels.append(Panel(title, "learning rate", "global batch", heat=_heat(cells, more_is_better)))
    return panels


def _heat(cells: dict[tuple[int, float], Values], more_is_better: bool) -> Heat:
    """Return a table of the values in ``cells``, by batch and learning rate."""
    batches, lrs = sorted({batch for batch, _ in cells}), sorted({lr for _, lr in cells})
    found = [[cells.get((batch, lr)) for lr in lrs] for batch in batches]
    means: list[Column] = [[cell.last.mean if cell and cell.last else None for cell in row] for row in found]
    known = [mean for row in means for mean in row if mean is not None]
    top = (max if more_is_better else min)(known, default=None)
    bests = [(r, c) for r, row in enumerate(means) for c, mean in enumerate(row) if mean is not None and mean == top]
    return Heat(
        [f"{lr:.4g}" for lr in lrs],
        [f"{batch:,}" for batch in batches],
        means,
        [[_cell(cell) for cell in row] for row in found],
        bests[0] if len(bests) == 1 else None,
        more_is_better,
    )


def _cell(values: Values | None) -> str:
    if values is None:
        return ""
    return spread(values.last) if values.last else "no finished run"


# ---- what the target took


def _targets(comparison: Comparison) -> list[Panel]:
    """Return what the target took by batch, at its quickest learning rate, with the fit, and time against samples."""
    panels = []
    for unit, get in TO_TARGET.items():
        if curves := list(_by(comparison, comparison.quickest(), get)):
            curves += curves_of(comparison) if unit == "samples" else []
            title = f"{unit.capitalize()} to {comparison.target}"
            panels.append(_over_batches(title, f"{unit} to the target", True, curves))
    if points := _time_against_samples(comparison):
        labels = "samples to the target", "seconds to the target"
        panels.append(Panel("Time against samples", *labels, True, True, points))
    return panels


def _time_against_samples(comparison: Comparison) -> list[Curve]:
    """Return a point for the quickest group of each batch, and a line through those that no other group beats."""
    families = list(dict.fromkeys(group.family for group in comparison.groups))
    found = [
        (values.to_samples.mean, values.to_time_s.mean, group)
        for group, values in comparison.quickest()
        if values.to_samples and values.to_time_s
    ]
    if len(found) < 2:
        return []
    indices = {id(group): index for index, group in enumerate(comparison.groups)}
    curves = [
        Curve([x], [y], group.label, indices[id(group)], "", "points", [], [group.label], families.index(group.family))
        for x, y, group in found
    ]
    best = sorted((x, y) for x, y, _ in found if not any(a <= x and b <= y and (a, b) != (x, y) for a, b, _ in found))
    front: tuple[Column, Column] = [x for x, _ in best], [y for _, y in best]
    return [*curves, Curve(*front, "not beaten in both", None, kind="guide")]
