"""Tell what bounds a recommendation or stands beside it: the limit of the LR, a law, a schedule, the last candidate."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from isobatch.scaling.plan import Plan
from isobatch.scaling.planning.advice import untuned_base
from isobatch.scaling.report.grid import rounded
from isobatch.scaling.rules import OutOfRange
from isobatch.scaling.tuning.recommendation import Prediction, Recommendation, mean_batch, moving
from isobatch.scaling.tuning.speed import AGAIN, known_speed, unknown
from isobatch.scaling.tuning.witnesses import law_compared, stretches_of, unknowns
from isobatch.trainers.tuning.bench import Bench
from isobatch.trainers.tuning.parts import Results

MUCH_LARGER = 2.0  # times the run's LR


def notes_on(found: Recommendation, bench: Bench, parts: Results, most: int) -> list[str]:
    """Return sentences that belong to a recommendation.

    Args:
        most: the largest candidate.
    """
    plan = bench.opened.plan
    notes = (untuned_base(plan), larger_lr(plan, parts), of_speed(parts), lr_limit(bench, parts, found.best),
             beside_law(parts, found), of_schedule(plan, parts), edge(bench, parts, found, most),
             moving(plan, found.rows))  # fmt: skip
    return [note for note in notes if note] + unknowns(parts.get("noise", {}), parts.get("branch", {}))


def of_speed(parts: Results) -> str:
    """Return that the speed was measured, but isn't known; "" otherwise."""
    text = unknown(parts["speed"]["spread"]) if "speed" in parts else ""
    return f"{text}; {AGAIN}" if text else ""


def peak_lr(bench: Bench, parts: Results, size: int) -> float | None:
    """Return the peak LR at a global batch: by the run's rule, and at most the largest stable one, if that was tested.

    Returns:
        None where the rule can't hold.
    """
    carried = carried_lr(bench, bench.opened.plan.peak.lr, size)
    limit = stable_lr(bench, parts, size)
    return carried if carried is None or limit is None else min(carried, limit)


def stable_lr(bench: Bench, parts: Results, size: int) -> float | None:
    """Return the largest stable LR of the range test, carried by the rule as the LR is; None without such a test."""
    tested = parts.get("lr", {}).get("largest_stable")
    return carried_lr(bench, tested, size) if tested else None


def carried_lr(bench: Bench, lr: float, size: int) -> float | None:
    """Return an LR of the run's batch at another one, by the run's rule, also of a given lr.peak."""
    plan = bench.opened.plan
    rule = plan.segments[0].rule
    rule = replace(rule, fixed=tuple(part for part in rule.fixed if part != "lr"))
    try:
        return rule.apply(replace(plan.peak, lr=lr), plan.cut.global_size, size).lr
    except OutOfRange:
        return None


def lr_limit(bench: Bench, parts: Results, row: Prediction) -> str:
    """Return how the recommended LR compares with the largest stable one of the range test.

    Without such a test: that the LR is larger than the run's, if no branch tried it; else "".
    """
    plan, size = bench.opened.plan, row.global_size
    limit, carried = stable_lr(bench, parts, size), carried_lr(bench, plan.peak.lr, size)
    again = f"tune.parts=[lr] batch.global_size={plan.sized(size)} tests it at this batch"
    if carried is None:
        return ""
    if limit is None:
        tried = any(one["stable"] and one["lr"] >= row.lr for one in branches_of(parts))
        if row.lr <= plan.peak.lr or tried:
            return ""
        return f"peak LR {row.lr:.3g} is {row.lr / plan.peak.lr:.3g} × the run's, and wasn't tried: {again}"
    tested, batch = parts["lr"]["largest_stable"], plan.cut.global_size
    rule = "" if size == batch else f", which lr.rule={plan.segments[0].rule.name} carries to {limit:.3g} here"
    test = f"the range test was stable up to {tested:.3g} at a batch of {batch:,}{rule}"
    if carried > limit:
        return f"peak LR {limit:.3g}, not {carried:.3g}: {test}"
    if row.lr <= tested:
        return f"peak LR {row.lr:.3g}: {test}"
    return f"peak LR {row.lr:.3g}: {test}; {again}"


def larger_lr(plan: Plan, parts: Results) -> str:
    """Return that the range test suggests a much larger LR than the run's; "" if it doesn't, or without a test."""
    suggested, own = parts.get("lr", {}).get("suggestion") or 0.0, plan.peak.lr
    if suggested < MUCH_LARGER * own:
        return ""
    return (
        f"the range test suggests an LR of {suggested:.3g} at a batch of {plan.cut.global_size:,}, and the run has "
        f"{own:.3g}: tune the LR first, since noise and critical batch depend on it"
    )


def branches_of(parts: Results) -> list[dict[str, Any]]:
    """Return the branches of all checkpoints."""
    return [one for course in parts.get("branch", {}).get("course", ()) for one in course["branches"]]


def beside_law(parts: Results, found: Recommendation) -> str:
    """Return how the law's batch compares with the recommended one; "" if it wasn't asked, or isn't of tuned data."""
    law = parts.get("law", {})
    if not law.get("tuned"):
        return ""
    return law_compared(law["batch"], law["low"], law["high"], found.frugal.global_size if found.frugal else None)


def of_schedule(plan: Plan, parts: Results) -> str:
    """Return what the run's batch schedule is predicted to take, which the recommended batch replaces; "" without."""
    stretches = stretches_of(plan)
    if len(stretches) == 1:
        return ""
    speed = known_speed(parts, plan)
    low, high = (pick(batch for batch, _ in stretches) for pick in (min, max))
    said = f"batch.schedule takes {low:,} to {high:,} samples, {mean_batch(stretches):,.0f} on average"
    times = {batch: way[2] for batch, _ in stretches if speed and (way := speed.fastest(batch))}
    if len(times) == len({batch for batch, _ in stretches}):
        seconds = sum(samples / batch * times[batch] / 1000 for batch, samples in stretches)
        said += f", in {rounded(seconds)} s"
    return f"{said}; the recommended batch replaces it"


def edge(bench: Bench, parts: Results, found: Recommendation, most: int) -> str:
    """Return that a better batch may lie beyond those that were compared, and how to compare more; "" if none may.

    Args:
        most: the largest candidate.
    """
    rows, best, plan, limit_ms = found.rows, found.best, bench.opened.plan, bench.config.tune.max_step_ms
    if found.frugal is None:
        return ""
    fastest = min(rows, key=lambda row: row.seconds or math.inf) if best.seconds is not None else best
    ends = {best.global_size, fastest.global_size}
    if rows[-1].global_size in ends and len(rows) > 1:
        at, rule = rows[-1].global_size, plan.segments[0].rule.name
        why = f"batch.global_size={plan.sized(2 * at)} compares more"
        if at < most:
            why = f"tune.max_step_ms={limit_ms:g} allows no longer step" if limit_ms else f"lr.rule={rule} ends there"
        return f"the best may lie beyond {at:,}, the largest batch compared: {why}"
    if rows[0].global_size in ends and rows[0].global_size > 1:
        fewer = plan.granule * bench.session.world.size == rows[0].global_size
        why = "fewer ranks compare" if fewer else f"batch.global_size={plan.sized(rows[0].global_size // 2)} compares"
        return f"the best may lie below {rows[0].global_size:,}, the smallest batch compared: {why} smaller ones"
    timed = parts["speed"]["sizes"][-1]["per_gpu"] if "speed" in parts else None
    if timed is not None and best.per_gpu == timed != parts.get("memory", {}).get("per_gpu"):
        slower = "the last ones were slower, on a busy machine by chance"
        why = slower if "memory" in parts else "add memory to tune.parts"
        return f"larger passes than {timed:,} samples weren't timed: {why}"
    return ""
