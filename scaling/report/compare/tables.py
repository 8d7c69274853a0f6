"""Write a report as a table for the terminal, as Markdown and as CSV. Torch-free."""

from __future__ import annotations

import csv
import io
import re
from typing import Any

from isobatch.scaling.geometry import counted
from isobatch.scaling.limits import one_line
from isobatch.scaling.report.compare.colours import note_on, styles_of
from isobatch.scaling.report.compare.comparison import Comparison, Report
from isobatch.scaling.report.compare.forecasts import tables_of
from isobatch.scaling.report.compare.groups import Group
from isobatch.scaling.report.compare.values import Values
from isobatch.scaling.report.compare.words import duration, number, spread
from isobatch.scaling.report.grid import Figure, grid
from isobatch.scaling.tuning.spread import Spread, alike

LOWEST = ("steps to target", "samples to target", "time to target")  # columns whose lowest value is the best
FORMULA = ("=", "+", "-", "@")  # a spreadsheet takes text for a formula that begins with one of them
MOST_FORECASTS = 3  # of a task, in the terminal

Plots = dict[int, list[tuple[str, str]]]
"""Title and file name of each plot, by the index of its task."""


class Best(Figure):
    """The text of the best number of its column, which is to stand out."""


def rows_of(comparison: Comparison) -> list[dict[str, Any]]:
    """Return a row for each group of a comparison, without columns that have no value."""
    name = comparison.metric.name if comparison.metric else "value"
    spreads = [_columns(values, name) for values in comparison.values]
    compared = [one for one, values in zip(spreads, comparison.values, strict=True) if not values.open]
    best = {column: _best([one[column] for one in compared], comparison, column) for column in (name, *LOWEST)}
    rows = []
    for (group, values), columns in zip(comparison.pairs(), spreads, strict=True):
        shape, of = "({})" if values.open else "{}", len(group.counted)
        figures = {c: value and Figure(shape.format(_text(c, value, of))) for c, value in columns.items()}
        for column, place in best.items():
            value = columns[column]
            if (
                place
                and value
                and not values.open
                and (value.mean == place.mean or (column == name and alike(value, place)))
            ):
                figures[column] = Best(_text(column, value, of))
        if comparison.target and values.reached < of:
            figures[LOWEST[0]] = Figure(f"{values.reached} of {of} reached it")
        rows.append(
            {"group": group.label, "runs": _count(group), "peak LR": group.lr_peak, **dict.fromkeys(columns), **figures}
        )
    empty = {column for column in rows[0] if all(row[column] is None for row in rows)} if rows else set()
    if len(rows) == 1 and not comparison.target_from:
        empty |= {*LOWEST}  # the target is the group's own best value
    return [{column: cell for column, cell in row.items() if column not in empty} for row in rows]


def _columns(values: Values, name: str) -> dict[str, Spread | None]:
    return {
        name: values.last, f"best {name}": values.best, "steps to target": values.to_steps,
        "samples to target": values.to_samples, "time to target": values.to_time_s, "samples/s": values.samples_per_s,
        "time": values.time_s, "time/epoch": values.epoch_s, "noise scale": values.noise_scale,
        "gradient variance": values.gradient_variance, "sharpness": values.sharpness, "perturbed": values.perturbed,
    }  # fmt: skip


def _best(spreads: list[Spread | None], comparison: Comparison, column: str) -> Spread | None:
    known = [value for value in spreads if value]
    most = column not in LOWEST and comparison.metric is not None and comparison.metric.direction == "max"
    return (max if most else min)(known, key=lambda value: value.mean) if len(known) > 1 else None


def _text(column: str, value: Spread, runs: int) -> str:
    """Return the text of a cell, which says so if some of the ``runs`` that are averaged have no value."""
    text = duration(value) if column.startswith("time") else spread(value)
    return f"{text} ({value.n} of {runs})" if value.n < runs else text


def _count(group: Group) -> str:
    """Return how many runs are averaged, of how many, and how many of them a stop rule ended early."""
    n = len(group.counted)
    early = sum(bool(run.early) for run in group.counted)
    notes = [*dict.fromkeys(group.left_out.values()), *([f"{early} ended early"] if early else [])]
    return ": ".join(filter(None, [f"{n} of {len(group.runs)}" if group.left_out else f"{n}", ", ".join(notes)]))


def text_of(report: Report, width: int = 0) -> str:
    """Return the report as text for a terminal of ``width`` columns; 0: any width."""
    parts = [one_line(report.chosen)] if report.chosen else []
    for comparison in report.comparisons:
        parts.append(f"{one_line(comparison.task)}: {head(comparison)}")
        rows = [
            {name: Figure(f"{cell} *") if isinstance(cell, Best) else cell for name, cell in row.items()}
            for row in rows_of(comparison)
        ]
        columns = [name for row in rows[:1] for name in row][3:]
        optional = (
            "perturbed",
            "gradient variance",
            "noise scale",
            "time/epoch",
            "time",
            "samples/s",
            *columns[1:2],
            "peak LR",
            *columns[2:],
        )
        parts += [grid(rows, width, optional, shortened=("group",))] if rows else []
        notes = legend(comparison, "*")
        parts += ["; ".join(notes)] if notes else []
        parts += [f"  {one_line(text)}" for text in comparison.findings]
        tables = tables_of(comparison)
        for title, forecasts, note in tables[:MOST_FORECASTS]:
            parts += ["", f"{one_line(title)}:", grid(forecasts, width, ("efficiency", "measured", "time")), note]
        if (more := len(tables) - MOST_FORECASTS) > 0:
            parts += ["", f"(report.md has {counted(more, 'more forecast')})"]
        parts.append("")
    parts += [f"warning: {one_line(text)}" for text in report.warnings]
    return "\n".join(parts).rstrip("\n")


def head(comparison: Comparison) -> str:
    """Return how many runs are compared, and what their values are."""
    runs, groups = len(comparison.runs), len(comparison.groups)
    if not groups:
        points = sum(len(found.points) for found in comparison.fits.values())
        return f"{counted(points, 'batch', 'batches')} with the amount of data to the target"
    parts = [counted(runs, "run")]
    if runs > groups:
        alone = (
            " that differ in the seed alone"
            if len({run.recipe.seed for run in comparison.runs}) > 1
            else " of one seed"
        )
        parts[0] += alone if groups == 1 else f" in {groups} groups"
        name = one_line(comparison.metric.name) if comparison.metric else "values"
        parts.append(f"mean ± standard deviation over seeds of {name} at the end")
    return "; ".join(parts)


def legend(comparison: Comparison, mark: str) -> list[str]:
    """Return how to read the table: what the ``mark`` stands for, what the target is and why, and "(…)"."""
    several = len(comparison.groups) > 1
    ranked = [value for _, value in comparison.ranked()] if several else []
    more = f"; of {comparison.metric.name}, also those that can't be told apart from it" if comparison.metric else ""
    notes = [f"{mark} the best of its column{more * any(alike(value, ranked[0]) for value in ranked[1:])}"] * several
    if comparison.target and (several or comparison.target_from):
        everyone = all(values.reached == len(group.counted) for group, values in comparison.pairs() if not values.open)
        half = "; runs that got less than halfway to the overall best are left out"
        reached = f"the best value that every counted run reached{'' if everyone else half}; report.target sets another"
        why = comparison.target_from or reached
        notes.append(f"target: {one_line(str(comparison.target))} ({why})")
    if any(values.open and values.steps for values in comparison.values):
        notes.append("(…) not finished, so not compared")
    return notes


def markdown_of(report: Report, plots: Plots) -> str:
    """Return the report as Markdown."""
    lines = ["# Report", "", *([f"{escaped(report.chosen)}.", ""] if report.chosen else [])]
    for index, comparison in enumerate(report.comparisons):
        lines += [f"## {escaped(comparison.task)}", "", escaped(head(comparison)) + ".", ""]
        lines += [f"- {escaped(text)}" for text in comparison.findings]
        lines += ["", *([_markdown_table(rows), ""] if (rows := rows_of(comparison)) else [])]
        if notes := "; ".join(legend(comparison, "bold:")):
            lines += [f"{escaped(notes[0].upper() + notes[1:])}.", ""]
        for title, forecasts, note in tables_of(comparison):
            note = escaped(note[0].upper() + note[1:])
            lines += [f"### {escaped(title)}", "", _markdown_table(forecasts), "", f"{note}.", ""]
        for title, file in plots.get(index, []):
            lines += [f"![{escaped(title)}]({file})", ""]
        if index in plots and (note := note_on(styles_of(comparison))):
            lines += [note, ""]
    if report.warnings:
        lines += ["## Warnings", "", *(f"- {escaped(text)}" for text in report.warnings), ""]
    return "\n".join(lines)


def _markdown_table(rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[escaped(name) for name in names]] + [[_markdown_cell(row.get(name)) for name in names] for row in rows]
    lines = [f"| {' | '.join(line)} |" for line in cells]
    return "\n".join([lines[0], f"|{' --- |' * len(names)}", *lines[1:]])


def _markdown_cell(value: Any) -> str:
    if value is None:
        return "—"
    text = escaped(value if isinstance(value, str) else number(value))
    return f"**{text}**" if isinstance(value, Best) else text


def escaped(text: str) -> str:
    """Return ``text`` so that Markdown and HTML show it as it is."""
    text = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", text)


def csv_of(report: Report) -> str:
    """Return a line for each run: its summary, its settings and the last and best value of each measure."""
    rows = []
    for run in report.runs:
        summary = run.summary()
        settings, metrics = summary.pop("settings"), summary.pop("metrics")
        measured = {f"{name}:{kind}": value for name, kinds in metrics.items() for kind, value in kinds.items()}
        texts = {**summary, **settings, **measured}
        rows.append({_csv_cell(name): _csv_cell(value) for name, value in texts.items()})
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _csv_cell(value: Any) -> Any:
    """Return text that a spreadsheet shows as it is; a number stays one."""
    if not isinstance(value, str):
        return value
    return f"'{one_line(value)}" if value.startswith(FORMULA) else one_line(value)
