"""Thin the lines of ``metrics.jsonl`` to curves that can be drawn. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from isobatch.conf.rundir.reading import MEASURES

MOST = 100  # points of a curve
PLACES = ("step", "samples", "time_s")
AVERAGED = ("loss", "samples_per_s")  # over the lines of a point; of the others the last line counts
LAST = ("lr", "global_size", "noise/scale", "noise/low", "noise/high")

Columns = dict[str, list[float | None]]
"""Values by name, those of one point at one index."""


@dataclass(frozen=True, slots=True)
class Curves:
    """The curves of a run: values at its logged steps, and at its evaluations."""

    steps: Columns
    evaluations: Columns


def curves_of(lines: Sequence[dict[str, Any]]) -> Curves:
    """Return the curves of the lines of a run; each point stands for as many consecutive lines."""
    logged = [line for line in lines if "loss" in line]
    measured = [line for line in lines if "loss" not in line]
    names = dict.fromkeys(name for line in measured for name in line if name.startswith(MEASURES))
    return Curves(
        _columns(logged, (*PLACES, *LAST), AVERAGED),
        _columns(measured, (*PLACES, *names), ()),
    )


def _columns(lines: Sequence[dict[str, Any]], last: Sequence[str], averaged: Sequence[str]) -> Columns:
    ends = _ends(len(lines))
    found: Columns = {name: [lines[end - 1].get(name) for end in ends] for name in last}
    for name in averaged:
        values = [line.get(name) for line in lines]
        starts = [0, *ends][: len(ends)]
        found[name] = [_mean(values[start:end]) for start, end in zip(starts, ends, strict=True)]
    return {name: column for name, column in found.items() if any(value is not None for value in column)}


def _ends(count: int) -> list[int]:
    """Return where the lines of each point end: each of them if they are few, else fewer per point at the start.

    A loss changes most at the start, which a logarithmic axis shows at length. Later, more lines average out noise.
    """
    if count <= MOST:
        return list(range(1, count + 1))
    return sorted({max(1, round(count * (point / MOST) ** 2)) for point in range(1, MOST + 1)})


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean; None if a value wasn't finite, so that a curve shows where its run diverged."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None
