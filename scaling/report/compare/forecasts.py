"""Forecast what a target takes at other batches, from the runs of a sweep or from given points. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from isobatch.scaling.errors import UserError
from isobatch.scaling.report.compare.comparison import Comparison
from isobatch.scaling.report.compare.picture import Column, Curve, Panel, Picture
from isobatch.scaling.report.compare.words import duration, in_digits_of, number
from isobatch.scaling.report.grid import Figure
from isobatch.scaling.tuning.forecast import LARGEST, Fit, Forecast, Predicted, SpeedCurve, fit, forecast

APART = 3.0  # factor between neighbouring batches from which on the batch halfway is forecast, too
BESIDE = 2, 4  # times as large as the largest batch, and as small as the smallest one
MOST_TRIED = 12  # batches up to which those halfway are forecast
LONGEST = 1e12  # batches from here on are rounded
SHADE = "The shade is the 95 % interval for one more run."
CURVE = 48  # points of a drawn curve


def forecasts_of(found: Fit, speed: SpeedCurve | None = None) -> list[Forecast]:
    """Return forecasts for the batches of a fit, for some between and beyond them, by batch; none without a fit."""
    made = [forecast(found, batch, speed) for batch in _batches(found)]
    return [one for one in made if one]


def _batches(found: Fit) -> list[float]:
    tried = sorted({batch for batch, _ in found.points})
    if not tried:
        return []
    pairs = pairwise(tried) if len(tried) <= MOST_TRIED else ()
    between = [math.sqrt(low * high) for low, high in pairs if high >= APART * low]
    beyond = [tried[-1] * times for times in BESIDE] + [tried[0] / times for times in BESIDE]
    if all(batch == round(batch) for batch in tried):
        return sorted({*tried, *(float(round(batch)) for batch in (*between, *beyond) if batch >= 1)})
    return sorted({*tried, *between, *beyond})


def forecast_rows(found: Fit, made: Sequence[Forecast], of_points: bool) -> list[dict[str, Any]]:
    """Return a table of the forecasts.

    Args:
        of_points: amounts may have any unit, so the steps are relative to those of the smallest given batch.
    """
    took: dict[float, list[float]] = {}
    for batch, amount in found.points:
        took.setdefault(batch, []).append(amount)
    smallest = next(one for one in made if one.batch in took)
    rows: list[dict[str, Any]] = []
    for one in made:
        measured = took.get(one.batch)
        row: dict[str, Any] = {
            "batch": _batch(one.batch),
            "measured": measured and Figure(number(sum(measured) / len(measured))),
            "amount" if of_points else "samples": Figure(_text(one.samples)),
        }
        if of_points:
            row["speed-up in steps"] = Figure(f"{smallest.steps.value / one.steps.value:.3g} ×")
        else:
            row |= {"steps": Figure(_text(one.steps)), "time": one.seconds and Figure(_time(one.seconds))}
        rows.append({**row, "efficiency": Figure(f"{one.efficiency:.0%}")})
    empty = {name for name in ("time",) if all(row.get(name) is None for row in rows)}
    return [{name: cell for name, cell in row.items() if name not in empty} for row in rows]


def _batch(batch: float) -> Figure:
    return Figure(f"{batch:,.0f}" if batch == round(batch) < LONGEST else number(batch))


def _text(value: Predicted) -> str:
    if not value.high > value.low:
        return number(value.value)
    middle, interval = in_digits_of((value.high - value.low) / 2, value.value, value.low, value.high)
    return f"{middle} ({interval})"


def _time(value: Predicted) -> str:
    return f"{duration(value.value)} ({duration(value.low)} to {duration(value.high)})"


def tables_of(comparison: Comparison) -> list[tuple[str, list[dict[str, Any]], str]]:
    """Return title, rows and note of each family's forecast."""
    tables = []
    for family, made in comparison.forecasts.items():
        if not made:
            continue
        found = comparison.fits[family]
        of = f"Forecast to {comparison.target}" if comparison.target else "Forecast of the amount to the target"
        low, high = _batch(found.points[0][0]), _batch(found.points[-1][0])
        notes = [
            "(…) 95 % interval for one more run, if the law of the fit holds",
            f"extrapolated below {low} and above {high}",
            "efficiency: what a small batch takes, as a share of it",
            *(["time: at measured speeds, interpolated"] if any(one.seconds for one in made) else []),
        ]
        rows = forecast_rows(found, made, of_points=not comparison.groups)
        tables.append((f"{of}, {family}" if family else of, rows, "; ".join(notes)))
    return tables


def curves_of(comparison: Comparison) -> list[Curve]:
    """Return the fit of each family over its forecasts, its interval, and a line at the critical batch."""
    curves = []
    for family, made in comparison.forecasts.items():
        found = comparison.fits[family]
        if found.critical_batch is None or not made:
            continue
        low, high = made[0].batch, made[-1].batch
        course = [forecast(found, low * (high / low) ** (i / CURVE)) for i in range(CURVE + 1)]
        known = [one for one in course if one]
        xs: Column = [one.batch for one in known]
        ys: Column = [one.samples.value for one in known]
        lows, highs = ([getattr(one.samples, side) for one in known] for side in ("low", "high"))
        name = f"{family}: fit" if family else "fit"
        curves.append(Curve([*xs, *xs[::-1]], [*lows, *highs[::-1]], f"{name}, 95 % interval", None, kind="band"))
        curves.append(Curve(xs, ys, name, None, name, "guide"))
        if low <= found.critical_batch <= high:
            label = f"critical batch {number(found.critical_batch)}"
            curves.append(Curve([found.critical_batch] * 2, [min(lows), max(highs)], label, None, label, "guide"))
    return curves


def picture_of_points(comparison: Comparison) -> Picture:
    """Return the picture of given points, with their fit."""
    points = [point for found in comparison.fits.values() for point in found.points]
    given = Curve([batch for batch, _ in points], [amount for _, amount in points], "given", None, kind="both")
    curves = [given, *curves_of(comparison)]
    title = "Amount to the target by batch"
    panel = Panel(title, "global batch", "amount to the target", True, True, curves)
    return Picture("forecast", title, SHADE, [panel])


def comparison_of_points(text: str) -> Comparison:
    """Return the fit and the forecasts of ``report.points`` as a comparison without runs.

    Args:
        text: ``batch:amount`` for each batch, separated by spaces; amounts to the target in any one unit.

    Raises:
        UserError: it can't be read, or the amounts are steps.
    """
    pairs = [_pair(word, text) for word in text.split() or [""]]
    _refuse_steps(sorted(pairs), text)
    found = fit([batch for batch, _ in pairs], [amount for _, amount in pairs], given=True)
    return Comparison("points", None, None, "", [], [], {"": found}, {"": forecasts_of(found)})


def _refuse_steps(points: Sequence[tuple[float, float]], text: str) -> None:
    """Raise UserError if the amounts fall from batch to batch as steps do; data to a target never falls like that."""
    (batch, first), (largest, last) = points[0], points[-1]
    if first > 2 * last and all(one[1] > other[1] for one, other in pairwise(points)):
        falls = f"fall from {number(first)} at batch {batch:,g} to {number(last)} at batch {largest:,g}, as steps do"
        samples = " ".join(f"{batch:g}:{float(f'{batch * steps:.6g}'):.15g}" for batch, steps in points)
        fix = f"give data, which is batch x steps: report.points='{samples}'"
        raise UserError(f"the amounts of report.points {falls}", fix, "report.points", text)


def _pair(word: str, text: str) -> tuple[float, float]:
    try:
        batch, amount = map(float, word.split(":"))
    except ValueError:
        batch = amount = math.nan
    if not (0 < batch <= LARGEST and 0 < amount <= LARGEST):
        problem = f"report.points has {word!r:.60}, which isn't a batch and the amount of data that it took"
        fix = "write positive numbers, as in report.points='1632:35 4096:40 8192:42 32768:56'"
        raise UserError(problem, fix, "report.points", text)
    return batch, amount
