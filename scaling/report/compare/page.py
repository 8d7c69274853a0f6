"""Write a report as one HTML page that needs no network. Torch-free; plotly, whose script it holds, is read on use."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from isobatch.scaling.geometry import counted
from isobatch.scaling.limits import one_line
from isobatch.scaling.report.compare.colours import Style, note_on, shade
from isobatch.scaling.report.compare.comparison import Comparison, Report
from isobatch.scaling.report.compare.forecasts import tables_of
from isobatch.scaling.report.compare.picture import Curve, Heat, Picture
from isobatch.scaling.report.compare.tables import Best, head, legend, rows_of
from isobatch.scaling.report.compare.words import duration, number

HERE = Path(__file__).parent
DIGITS = 6  # significant digits of the numbers in the page


def page(report: Report, drawn: Sequence[tuple[list[Picture], list[Style]]]) -> str:
    """Return the page.

    Args:
        drawn: the pictures of each comparison, and the styles of its groups.

    Raises:
        ImportError: plotly isn't installed.
    """
    from plotly.offline import get_plotlyjs

    tasks = [
        {"groups": _groups(comparison, styles), "pictures": list(map(_picture, pictures))}
        for comparison, (pictures, styles) in zip(report.comparisons, drawn, strict=True)
    ]
    names = ", ".join(comparison.task for comparison in report.comparisons) or "report"
    title = _text(f"{names}: {counted(len(report.runs), 'run')}" if report.runs else "Forecast")
    chosen = f'<p class="soft">{_text(report.chosen)}</p>' if report.chosen else ""
    body = [f"<h1>{title}</h1>", chosen, _warnings(report.warnings)]
    for index, (comparison, (pictures, styles)) in enumerate(zip(report.comparisons, drawn, strict=True)):
        body += _section(comparison, pictures, styles, index, several=len(tasks) > 1)
    parts = {
        "TITLE": title,
        "BODY": "\n".join(body),
        # Within a script, only "<" can end it or start a comment.
        "DATA": json.dumps(tasks, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
        "PLOTLY": get_plotlyjs(),
        "SCRIPT": (HERE / "page.js").read_text(),
    }
    pieces = (HERE / "page.html").read_text().split("{{")
    filled = [parts[name] + rest for name, rest in (piece.split("}}", 1) for piece in pieces[1:])]
    return pieces[0] + "".join(filled)


def _text(text: str) -> str:
    """Return text for HTML, with control characters made visible."""
    return escape(one_line(text))


def _warnings(warnings: Sequence[str]) -> str:
    items = "".join(f"<li>{_text(text)}</li>" for text in warnings)
    return f'<div class="warnings" role="note"><ul>{items}</ul></div>' if items else ""


def _section(
    comparison: Comparison, pictures: Sequence[Picture], styles: Sequence[Style], index: int, several: bool
) -> list[str]:
    """Return the HTML of one task: findings, table, and a place for each panel."""
    findings = "".join(f"<li>{_text(text)}</li>" for text in comparison.findings)
    parts = [f'<section data-task="{index}">', f"<h2>{_text(comparison.task)}</h2>" if several else ""]
    parts += [
        f'<p class="soft">{_text(head(comparison))}</p>',
        f'<ul class="findings">{findings}</ul>',
        _table(rows) if (rows := rows_of(comparison)) else "",
    ]
    if notes := "; ".join(legend(comparison, "bold:")):
        parts.append(f'<p class="soft">{_text(notes[0].upper() + notes[1:])}.</p>')
    for title, forecasts, note in tables_of(comparison):
        parts += [f"<h3>{_text(title)}</h3>", _table(forecasts), f'<p class="soft">{_text(note)}.</p>']
    parts.append('<div class="chips" role="group" aria-label="groups of runs, shown or hidden"></div>')
    if note := note_on(styles):
        parts.append(f'<p class="soft">{note} The buttons show the others.</p>')
    for number_of_picture, picture in enumerate(pictures):
        parts += [
            f"<h3>{_text(picture.title)}</h3>",
            f'<p class="soft">{_text(picture.about)}</p>' if picture.about else "",
            '<div class="grid">',
        ]
        for number_of_panel, panel in enumerate(picture.panels):
            plot = (
                f'<div class="plot" data-picture="{number_of_picture}" data-panel="{number_of_panel}"></div>'
                if panel.heat is None
                else f'<div class="scroll">{_heat(panel.heat, panel.x_label, panel.y_label)}</div>'
            )
            title = f'<header>{_text(panel.title)}<span class="axes"></span></header><div class="legend"></div>'
            parts.append(f'<div class="panel">{title}{plot}</div>')
        parts.append("</div>")
    return [*parts, _all_runs(comparison) if comparison.groups else "", "</section>"]


def _all_runs(comparison: Comparison) -> str:
    """Return a table of all runs, closed at first."""
    name = comparison.metric.name if comparison.metric else "value"
    rows = []
    for group in comparison.groups:
        for run in group.runs:
            measure, done = run.measures.get(name), run.done
            best = measure.best if measure else None
            rows.append(
                {
                    "run": run.directory, "group": group.label, "seed": str(run.recipe.seed),
                    "state": "diverged" if done.diverged else run.state, name: measure.last if measure else None,
                    f"best {name}": best and best.value, "steps": done.step, "samples": done.samples,
                    "time": None if done.time_s is None else duration(done.time_s), "stopped last by": run.cause,
                }
            )  # fmt: skip
    title = "1 run" if len(rows) == 1 else f"All {len(rows):,} runs"
    return f"<details><summary>{title}</summary>{_table(rows)}</details>"


def _table(rows: Sequence[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    header = "".join(f"<th>{_text(name)}</th>" for name in names)
    lines = "".join("<tr>" + "".join(f"<td>{_cell(row.get(name))}</td>" for name in names) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{header}</tr></thead><tbody>{lines}</tbody></table></div>'


def _cell(value: Any) -> str:
    if value is None:
        return "—"
    text = _text(value if isinstance(value, str) else number(value))
    return f"<b>{text}</b>" if isinstance(value, Best) else text


def _heat(heat: Heat, x_label: str, y_label: str) -> str:
    """Return a table by batch and learning rate, whose cells are coloured by value."""
    header = "".join(f"<th>{_text(name)}</th>" for name in heat.columns)
    shades, lines = heat.goodness(), []
    for row, name in reversed(list(enumerate(heat.rows))):
        cells = []
        for column, text in enumerate(heat.texts[row]):
            best = ' class="best"' if (row, column) == heat.best else ""
            paper, ink = shade(shades[row][column])
            look = f' style="background:{paper};color:{ink}"' if paper else ""
            cells.append(f"<td{best}{look}>{_text(text) or '—'}</td>")
        lines.append(f"<tr><th>{_text(name)}</th>{''.join(cells)}</tr>")
    corner = f"<th>{_text(y_label)} \\ {_text(x_label)}</th>"
    return f'<table class="heat"><thead><tr>{corner}{header}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def _groups(comparison: Comparison, styles: Sequence[Style]) -> list[dict[str, Any]]:
    return [
        {"label": one_line(group.label), "light": style.colour.light, "dark": style.colour.dark,
         "dash": style.dash, "shown": style.shown}
        for group, style in zip(comparison.groups, styles, strict=True)
    ]  # fmt: skip


def _picture(picture: Picture) -> dict[str, Any]:
    panels = [
        {
            "x_label": one_line(panel.x_label), "y_label": one_line(panel.y_label),
            "x_log": panel.x_log, "y_log": panel.y_log, "x_ticks": panel.x_ticks,
            "curves": list(map(_curve, panel.curves)),
        }
        for panel in picture.panels
    ]  # fmt: skip
    return {"panels": panels}


def _curve(curve: Curve) -> dict[str, Any]:
    columns = {name: list(map(_rounded, getattr(curve, name))) for name in ("x", "y", "errors")}
    look = {"group": curve.group, "kind": curve.kind, "dash": curve.dash, "mark": curve.mark}
    texts = list(map(one_line, curve.texts)) if curve.kind == "points" else []
    return {"name": one_line(curve.name), "label": one_line(curve.label), **look, "texts": texts, **columns}


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.{DIGITS}g}")
