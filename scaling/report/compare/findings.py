"""Say in sentences what a comparison found and how sure it is, and what to be careful about. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from isobatch.scaling.geometry import counted
from isobatch.scaling.report.compare.comparison import Comparison
from isobatch.scaling.report.compare.flatness import flatness_of
from isobatch.scaling.report.compare.groups import STILL_GOING, Group, never_planned, run_label, why_not_counted
from isobatch.scaling.report.compare.pictures import MOST_MEASURES, evaluated_in
from isobatch.scaling.report.compare.values import Values
from isobatch.scaling.report.compare.words import duration, in_digits_of, listed, number, spread
from isobatch.scaling.report.run import Run
from isobatch.scaling.tuning.forecast import Fit
from isobatch.scaling.tuning.spread import Spread, alike, half_width


def findings_of(comparison: Comparison) -> list[str]:
    """Return sentences on what the comparison found."""
    metric = comparison.metric
    if not metric:
        return ["no run has logged a loss or an evaluation yet"]
    if len(comparison.runs) == 1:
        return [_alone(comparison.runs[0], metric.name), *_recommended(comparison)]
    ranked = comparison.ranked()
    if not ranked:
        return [f"no run has finished with a finite {metric.name}, so nothing is compared"]
    if len(comparison.groups) == 1:
        value = ranked[0][1]
        of = f"mean ± standard deviation of {value.n} seeds" if value.n > 1 else "1 seed, so no spread is known"
        return [f"{metric.name} {spread(value)} at the end ({of})"]
    alone = f"only {ranked[0][0].label} has finished with a finite {metric.name}, so nothing is compared"
    sentences = [_best(comparison, ranked) if len(ranked) > 1 else alone]
    to_target = list(_to_target(comparison))
    if comparison.target_from == "stop.at":  # then values at the end are those at the target
        sentences, to_target = to_target, sentences
    more = [*_fitted(comparison), *flatness_of(comparison), *_recommended(comparison)]
    return [*sentences, *to_target, *more]


def _recommended(comparison: Comparison) -> Iterator[str]:
    """Yield a sentence for each run that action=tune recommended a batch for."""
    for run in comparison.runs:
        found = run.tuned.get("recommendation")
        if isinstance(found, dict) and isinstance(size := found.get("global_size"), int):
            rest = "; ".join(str(found[name]) for name in ("why", "agreement") if found.get(name))
            yield f"{run.directory}: action=tune recommends a global batch of {size:,} ({rest})"


def _alone(run: Run, name: str) -> str:
    measure = run.measures[name]
    value = "isn't finite" if measure.last is None else number(measure.last)
    best = f", best {number(measure.best.value)} at step {measure.best.step:,}" if measure.best else ""
    why, early = why_not_counted(run), f" (early: {run.early})" if run.early else ""
    when = f"at the end{early}" if why is None else f"so far ({why} after step {run.done.step:,})"
    return f"{name} {value} {when}{best}"


def _best(comparison: Comparison, ranked: list[tuple[Group, Spread]]) -> str:
    """Return a sentence on the best group against the second, with the interval of their difference."""
    assert comparison.metric
    (best, value), (second, other) = ranked[:2]
    found = f"best {comparison.metric.name} at the end: {best.label} with {spread(value)}"
    then = f"{second.label} with {spread(other)}"
    half, ahead = half_width(value, other), abs(value.mean - other.mean)
    if half is None:
        equal = [group.label for group, one in ranked if one.mean == value.mean]
        if len(equal) > 1:
            return f"{found.partition(':')[0]}: {listed(equal)}, all with {spread(value)}"
        if value.n == other.n == 1:
            return f"{found}, then {then}; 1 seed each: no spread is known, so this order may be chance"
        few = "one of them has 1 seed" if min(value.n, other.n) == 1 else "their seeds show no spread"
        return f"{found}, then {then}; {few}, so how sure this order is isn't known"
    how = f"Welch's t-test, {value.n} and {other.n} seeds"
    difference, interval = in_digits_of(min(half, max(ahead, half / 10)), ahead, ahead - half, ahead + half)
    if equals := [group.label for group, one in ranked[1:] if alike(value, one)]:
        against = f"its lead of {difference} over the second has the 95 % interval {interval} ({how})"
        return f"{found}, which can't be told apart from {listed(equals)}: {against}"
    picked = f"; it was picked among {len(ranked)} groups, which flatters it" if len(ranked) > 2 else ""
    return f"{found}, ahead of {then} by {difference} (95 % interval {interval}, {how}{picked})"


def _to_target(comparison: Comparison) -> Iterator[str]:
    """Yield a sentence on which groups needed the fewest steps, samples and seconds to the target."""
    parts: dict[str, tuple[Callable[[Values], Spread | None], Callable[[float], str]]] = {
        "fewest steps": (lambda values: values.to_steps, lambda steps: counted(round(steps), "step")),
        "fewest samples": (lambda values: values.to_samples, lambda samples: f"{number(round(samples))} samples"),
        "least time": (lambda values: values.to_time_s, duration),
    }
    found = []
    for name, (get, write) in parts.items():
        known = [(group, value) for group, values in comparison.pairs() if (value := get(values))]
        if len(known) > 1:
            least = min(value.mean for _, value in known)
            labels = [group.label for group, value in known if value.mean == least]
            found.append(f"{name} {listed(labels)} ({write(least)})")
    if found:
        yield f"to {comparison.target}: {', '.join(found)}; these may be chance, which isn't tested"


def _fitted(comparison: Comparison) -> Iterator[str]:
    for family, fit in comparison.fits.items():
        of = f"{family}: " if family else ""
        if fit.points:  # else a warning says that no run reached the target
            yield f"{of}{fitted(fit)}"


def fitted(fit: Fit) -> str:
    """Return a fit as a sentence."""
    if fit.critical_batch is None:
        other = f"; with p = 1 it would be {number(plain)}" if fit.plain and (plain := fit.plain.critical_batch) else ""
        return f"critical batch not known: {fit.note}{other}"
    low, high = fit.interval
    other = f"; with p = 1: {number(plain)}" if fit.plain and (plain := fit.plain.critical_batch) else ""
    shape = f", p = {fit.power:.2g}{other}" if fit.plain else ""
    interval = f"95 % interval {number(low or 0)} to {number(high or 0)}, from {fit.batches} batches{shape}"
    dearer = f"{2 ** (1 / fit.power):.2g} times the data of a small batch"
    return f"fitted critical batch {number(fit.critical_batch)} ({interval}), where the target takes {dearer}"


def not_compared(runs: Sequence[Run]) -> Iterator[str]:
    """Yield warnings that name the runs that were rejected, or whose task isn't known, with their causes."""
    why: dict[str, list[str]] = {}
    for run in runs:
        unknown = "left out, because neither plan.json nor config.yaml names a task"
        reason = "rejected before training" if never_planned(run) else unknown
        why.setdefault(reason, []).append(f"{run.directory} ({run.cause})" if run.cause else run.directory)
    for reason, names in why.items():
        were = "was" if len(names) == 1 else "were"
        yield f"{counted(len(names), 'run')} {were} {reason}: {listed(names)}"


def warnings_of(comparison: Comparison) -> list[str]:
    """Return what to be careful about in a comparison."""
    looks = _left_out, _unmeasured, _early, _edges, _unreached, _hardware, _undrawn
    return [text for look in looks for text in look(comparison)]


def _left_out(comparison: Comparison) -> Iterator[str]:
    """Yield a warning for each reason why runs aren't counted."""
    reasons: dict[str, list[str]] = {}
    if len(comparison.runs) == 1 and comparison.runs[0].state in STILL_GOING:
        return  # the finding says so
    for group in comparison.groups:
        for run in group.runs:
            if why := group.left_out.get(run.directory):
                cause = f" ({run.cause})" if run.cause and why in ("damaged", "crashed", "oom", "died") else ""
                reasons.setdefault(why, []).append(run_label(group, run) + cause)
    for why, names in reasons.items():
        why = why.replace("repeats", "repeat") if len(names) > 1 else why
        yield f"{counted(len(names), 'run')} {why}, not averaged: {listed(names)}"


def _unmeasured(comparison: Comparison) -> Iterator[str]:
    """Yield a warning that names the groups of which a run has no value of the metric at the end."""
    pairs = [
        (group.label, values.last.n if values.last else 0, len(group.counted)) for group, values in comparison.pairs()
    ]
    lacking = [f"{label} ({n} of {of})" for label, n, of in pairs if n < of]
    if comparison.metric and lacking:
        known = f"only some runs have a finite {comparison.metric.name} at the end"
        yield f"{known}, and its means leave out the others: {listed(lacking)}"


def _early(comparison: Comparison) -> Iterator[str]:
    """Yield a warning that names the runs that a stop rule ended, and that are compared with whole ones."""
    names = [run_label(group, run) for group in comparison.groups for run in group.counted if run.early]
    if names and len(comparison.runs) > 1:
        end = "so values at the end aren't all at the same number of samples"
        fix = "" if comparison.target_from else "; compare them by report.target"
        yield f"{counted(len(names), 'run')} ended early by a stop rule, {end}: {listed(names)}{fix}"


def _edges(comparison: Comparison) -> Iterator[str]:
    """Yield a warning where the best value lies on the edge of the tried batches or learning rates."""
    ranked, by = comparison.ranked(), f"by {comparison.metric.name}" if comparison.metric else ""
    for family in dict.fromkeys(group.family for group, _ in ranked):
        members = [(group, value) for group, value in ranked if group.family == family]
        named = f"{family}: " if family else ""
        batches: dict[float, Spread] = {}
        for group, value in members:
            if group.global_size:
                batches.setdefault(group.global_size, value)
        if side := _edge(batches):
            tried = listed([f"{batch:,}" for batch in sorted(batches)], 6)
            found = f"the best batch {by}, {next(iter(batches)):,}, is the {side} of {tried}"
            yield f"{named}{found}: a {side.replace('est', 'er')} one may be better"
        at_edge = []
        for batch in sorted(batches):
            lrs = {group.lr_peak: value for group, value in members if group.lr_peak and group.global_size == batch}
            if side := _edge(lrs):
                at_edge.append(f"{next(iter(lrs)):.4g} (the {side}) at batch {batch:,}")
        if at_edge:
            where = listed(at_edge)
            yield f"{named}the best LR {by} lies on the edge of the tried ones, so a better one may lie beyond: {where}"


def _edge(ranked: Mapping[float, Spread]) -> str | None:
    """Return at which end the best of ranked settings lies.

    None if it lies inside, if its neighbour may be as good, or if too few seeds tell about chance.
    """
    tried = sorted(ranked)
    if len(tried) < 2 or (best := next(iter(ranked))) not in (tried[0], tried[-1]):
        return None
    side, neighbour = ("smallest", tried[1]) if best == tried[0] else ("largest", tried[-2])
    one, other = ranked[best], ranked[neighbour]
    half = half_width(one, other)
    return None if half is None or abs(one.mean - other.mean) <= half else side


def _unreached(comparison: Comparison) -> Iterator[str]:
    if not comparison.target_from:
        return  # the table says so
    counts = [(group.label, values.reached, len(group.counted)) for group, values in comparison.pairs()]
    none = [label for label, reached, n in counts if n and not reached]
    some = [f"{label} ({reached} of {n})" for label, reached, n in counts if 0 < reached < n]
    if none and len(none) == sum(n > 0 for _, _, n in counts):
        best = _nearest(comparison)
        yield f"no run reached {comparison.target}{best}, so steps to it aren't known, and no batch is fitted"
    elif none or some:
        parts = [f"no run of {listed(none)}"] if none else []
        parts += [f"not all runs of {listed(some)}"] if some else []
        without = f"{' and '.join(parts)} reached {comparison.target}"
        yield f"{without}: a group in which a run missed it has no steps to the target, and fits leave it out"


def _nearest(comparison: Comparison) -> str:
    """Return the best value of the target's measure, in brackets; "" if no run has any."""
    target = comparison.target
    assert target
    measured = [(group, run.measures[target.name].best) for group in comparison.groups for run in group.counted
                if target.name in run.measures]  # fmt: skip
    known = [(best.value, group.label) for group, best in measured if best]
    if not known:
        return ""
    value, label = max(known) if target.direction == "max" else min(known)
    return f" (the best was {number(value)}, {label})"


def _undrawn(comparison: Comparison) -> Iterator[str]:
    if names := evaluated_in(comparison)[MOST_MEASURES:]:
        fix = f"report.metric={names[0]}:max draws the first of them"
        yield f"{counted(len(names), 'measure')} not drawn: {listed(names)}; {fix}"


def _hardware(comparison: Comparison) -> Iterator[str]:
    worlds = sorted({run.recipe.world_size for run in comparison.runs if run.recipe.world_size})
    if len(worlds) > 1:
        sizes = listed([f"{size:,}" for size in worlds])
        yield f"the runs had {sizes} ranks, so their times compare hardware as well as batches"
