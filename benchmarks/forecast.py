"""Fit data to a target by batch, and predict batches that were left out: published, measured, simulated curves."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.tables import Rows
from isobatch.scaling.report.compare.words import number
from isobatch.scaling.tuning.forecast import Fit, fit
from isobatch.scaling.tuning.quadratic import Optimizer, Quadratic

PAGE = Path(__file__).parent / "results.md"
MEASURED = {  # curves, and the titles of their tables in results.md, which critical.py measures
    "mnist1d, SGD (samples)": "Steps to a target, by batch",
    "text, AdamW (samples)": "Steps to a target, by batch, of a language model",
}
BEYOND = 4  # times the largest batch, where a simulated curve is predicted


class Curve(NamedTuple):
    """Data to a target by batch; ``true``: its critical batch; ``beyond``: batch and data further out."""

    name: str
    batches: list[float]
    amounts: list[float]
    true: float | None = None
    beyond: tuple[float, float] | None = None


PUBLISHED = [
    Curve("ResNet-50, LARS (epochs)", [1632, 4096, 8192, 32768, 65536], [35, 40, 42, 56, 84.5]),
    Curve("BERT, LAMB (million samples)", [448, 4096, 8192, 16384], [2.41, 2.84, 4.19, 5.50]),
]
SIMULATED = {
    "plain": Optimizer(),
    "momentum .9": Optimizer(0.9),
    "Nesterov .9": Optimizer(0.9, nesterov=True),
}
TARGETS = (0.1, 0.03)  # of the first loss
CHOICES = ((8, 2), (5, 4), (4, 4))  # batches of a curve, and the factor between them


def measured() -> list[Curve]:
    """Return the curves that ``python -m benchmarks critical critical-text`` measured, as far as the page has them."""
    curves = []
    for name, title in MEASURED.items():
        table = PAGE.read_text().partition(f"## {title}\n")[2].partition("\n## ")[0]
        lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
        columns = [lines[0].index(column) for column in ("batch", "samples")] if lines else []
        points = [[float(cells[column].replace(",", "")) for column in columns] for cells in lines[2:]]
        if points:
            curves.append(Curve(name, [batch for batch, _ in points], [samples for _, samples in points]))
    return curves


def simulated() -> list[Curve]:
    """Return curves of the noisy quadratic, whose critical batch is known, around that batch."""
    model, curves = Quadratic.power_law(50), list[Curve]()
    for name, optimizer in SIMULATED.items():
        for share in TARGETS:
            target = share * float(model.loss(model.start))
            true = model.critical_batch(target, optimizer)
            assert true
            found: dict[int, float] = {}
            for count, factor in CHOICES:
                first = 2 ** round(math.log2(true / factor ** ((count - 1) / 2)))
                batches = [first * factor**place for place in range(count)]
                missing = [batch for batch in (*batches, BEYOND * batches[-1]) if batch not in found]
                reached = model.samples_to(target, missing, optimizer)
                found |= {batch: one.samples for batch, one in zip(missing, reached, strict=True) if one}
                last = BEYOND * batches[-1]
                amounts = [found[batch] for batch in batches]
                title = f"quadratic, {name}, to {share:.0%}"
                curves.append(Curve(title, [*map(float, batches)], amounts, true, (last, found[last])))
    return curves


class Checked(NamedTuple):
    """What a fit predicts of its own curve.

    Attributes:
        errors: of each point, predicted from the others, if they can be fitted; ``inside``: how many of these lay in
            their intervals; ``none``: how many couldn't be predicted.
        off: how much larger the critical batch is than the true one; ``within``: whether its interval has that.
        far: the error at BEYOND times the largest batch.
    """

    curve: Curve
    fit: Fit
    errors: list[float]
    inside: int
    none: int
    off: float | None
    within: bool
    far: float | None


def check(curve: Curve) -> Checked:
    found = fit(curve.batches, curve.amounts)
    errors, inside, none = list[float](), 0, 0
    for place, (batch, amount) in enumerate(zip(curve.batches, curve.amounts, strict=True)):
        rest = fit(_without(curve.batches, place), _without(curve.amounts, place))
        predicted, between = rest.predict(batch), rest.expected(batch)
        if predicted is None or between is None:
            none += 1
            continue
        errors.append(predicted / amount - 1)
        inside += between[0] <= amount <= between[1]
    low, high = (low or 0 for low in found.interval)
    critical, far = found.critical_batch, curve.beyond and found.predict(curve.beyond[0])
    off = critical / curve.true - 1 if critical and curve.true else None
    error = far / curve.beyond[1] - 1 if far and curve.beyond else None
    return Checked(curve, found, errors, inside, none, off, low <= (curve.true or 0) <= high, error)


def row(checked: Checked) -> dict[str, object]:
    curve, found, errors = checked.curve, checked.fit, checked.errors
    low, high = (number(bound or 0) for bound in found.interval)
    critical = f"{number(found.critical_batch)} ({low} to {high})" if found.critical_batch else "not known"
    return {
        "curve": curve.name,
        "batches": f"{len(curve.batches)} from {curve.batches[0]:,.0f} to {curve.batches[-1]:,.0f}",
        "p": f"{found.power:.2g}",
        "critical batch (95 % interval)": critical,
        "true": f"{number(curve.true)} ({_signed([checked.off])})" if curve.true else "not known",
        "left out: median error": _median(errors),
        "largest": _signed(errors),
        "in their intervals": f"{checked.inside} of {len(errors)}"
        + f", {checked.none} without a fit" * bool(checked.none),
        f"at {BEYOND} × the largest": _signed([checked.far]),
    }


def together(of: list[Checked]) -> dict[str, object]:
    """Return a row on all simulated curves."""
    errors = [error for one in of for error in one.errors]
    none = sum(one.none for one in of)
    return {
        "curve": "all quadratics",
        "batches": f"{len(of)} curves",
        "p": "",
        "critical batch (95 % interval)": f"the true one in {sum(one.within for one in of)} of {len(of)} intervals",
        "true": f"median {_median([one.off for one in of])}, largest {_signed([one.off for one in of])}",
        "left out: median error": _median(errors),
        "largest": _signed(errors),
        "in their intervals": f"{sum(one.inside for one in of)} of {len(errors)}, {none} without a fit",
        f"at {BEYOND} × the largest": f"median {_median([one.far for one in of])}, "
        f"largest {_signed([one.far for one in of])}",
    }


def _median(errors: Sequence[float | None]) -> str:
    known = [abs(error) for error in errors if error is not None]
    return f"{statistics.median(known):.0%}" if known else "—"


def _signed(errors: Sequence[float | None]) -> str:
    """Return the largest error, with its sign."""
    known = [error for error in errors if error is not None]
    return f"{max(known, key=abs):+.0%}" if known else "—"


def _without(values: list[float], place: int) -> list[float]:
    return values[:place] + values[place + 1 :]


def rows() -> Rows:
    of_models = [check(curve) for curve in simulated()]
    return [*(row(check(curve)) for curve in (*PUBLISHED, *measured())), *map(row, of_models), together(of_models)]


if __name__ == "__main__":
    for one in rows():
        print(json.dumps(one, ensure_ascii=False))
