"""Draw the pictures of a comparison by matplotlib, as PNG and SVG. Torch-free; matplotlib is imported on use."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from isobatch.scaling.limits import one_line
from isobatch.scaling.report.compare.colours import Style, note_on, shade
from isobatch.scaling.report.compare.picture import Curve, Heat, Panel, Picture
from isobatch.scaling.report.grid import cut

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT, COLUMNS = 4.9, 3.4, 2  # inches of a panel, and panels beside each other
LEFT, RIGHT, TOP, BOTTOM = 0.72, 0.12, 0.38, 0.55  # inches around its axes
NOTE = 0.2  # inches of a note below the panels
CHAR, MOST_CHARS, SAMPLE = 0.062, 40, 0.45  # inches of a label's character, most of them, and inches of its line
DASHES, MARKERS = ("-", "--", ":", "-."), ("o", "^", "s", "D")
INK, FAINT = "#222222", "#8a8a8a"
SETTINGS: Any = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": FAINT,
    "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK, "axes.grid": True,
    "grid.color": "#e6e6e6", "grid.linewidth": 0.6, "axes.axisbelow": True, "axes.titlesize": 10, "axes.titley": 1.02,
    "axes.titlelocation": "left", "text.parse_math": False, "svg.fonttype": "none",
}  # fmt: skip
LABEL_GAP = 0.06  # between labels at the ends of curves, as a share of the axis
MOST_LABELS = 12


def draw(picture: Picture, styles: Sequence[Style]) -> dict[str, bytes]:
    """Return the files of a picture by suffix. Raises ImportError if matplotlib isn't installed."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(picture.panels))
    rows = math.ceil(len(picture.panels) / columns)
    with rc_context({**SETTINGS, "svg.hashsalt": picture.name}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of missing glyphs and of huge values, which the plot itself shows
        labels = [len(curve.label) for panel in picture.panels for curve in panel.curves]
        beside = min(max(labels, default=0), MOST_CHARS) * CHAR + (SAMPLE if any(labels) else 0)
        note = note_on(styles)
        below = NOTE if note else 0
        width, height = WIDTH * columns + beside, HEIGHT * rows + below
        figure = Figure(figsize=(width, height))
        FigureCanvasAgg(figure)
        figure.text(LEFT / width, 0.08 / height, note, fontsize=7.5)
        for number, panel in enumerate(picture.panels):
            row, column = divmod(number, columns)
            left, bottom = column * WIDTH + LEFT, (rows - 1 - row) * HEIGHT + BOTTOM + below
            size = WIDTH - LEFT - RIGHT, HEIGHT - BOTTOM - TOP
            axes = figure.add_axes((left / width, bottom / height, size[0] / width, size[1] / height))
            _draw_panel(axes, panel, styles, labelled=column == columns - 1 or number == len(picture.panels) - 1)
        return {"png": _saved(figure, "png"), "svg": _saved(figure, "svg")}


def _saved(figure: Figure, suffix: str) -> bytes:
    file = io.BytesIO()
    metadata = {"Date": None} if suffix == "svg" else {"Software": None}
    figure.savefig(file, format=suffix, dpi=130, metadata=metadata, facecolor="white")
    return file.getvalue()


def _draw_panel(axes: Axes, panel: Panel, styles: Sequence[Style], labelled: bool) -> None:
    axes.set_title(one_line(panel.title))
    axes.set_xlabel(one_line(panel.x_label))
    axes.set_ylabel(one_line(panel.y_label))
    if panel.heat:
        _draw_heat(axes, panel.heat)
        return
    if panel.x_log:
        axes.set_xscale("log")
    if panel.y_log:
        axes.set_yscale("log")
    shown = [curve for curve in panel.curves if curve.group is None or styles[curve.group].shown]
    for curve in shown:
        _draw_curve(axes, curve, styles)
    margin = 0.08 if any(curve.texts for curve in shown) else 0.04
    axes.margins(margin, 0.25 if panel.legend else margin)  # room for the legend
    axes.autoscale_view()  # which is put off otherwise, until after the labels are placed
    _readable_ticks(axes, panel)
    if not panel.legend:
        _write_texts(axes, shown)
    else:
        axes.legend(handles=[_handle(curve, styles) for curve in shown], fontsize=7.5, edgecolor="none")
    if labelled:
        _label_ends(axes, [curve for curve in shown if curve.label], styles)


def _draw_curve(axes: Axes, curve: Curve, styles: Sequence[Style]) -> None:
    colour, dash = _look(curve, styles)
    of_group = curve.group is not None
    xs, ys = _finite(curve.x), _finite(curve.y)
    if curve.kind == "band":
        axes.fill(xs, ys, color=colour if of_group else FAINT, alpha=0.18, linewidth=0)
    elif curve.kind == "points":
        shape = MARKERS[curve.dash % len(MARKERS)]
        alpha = 1 if curve.texts else 0.45
        axes.plot(xs, ys, shape, color=colour, markersize=7 if curve.texts else 4, alpha=alpha, markeredgewidth=0)
    else:
        axes.plot(
            xs, ys, color=colour, linestyle=dash, linewidth=1.2, marker="o" if curve.kind == "both" else None,
            markersize=2.6 if of_group else 4.5, alpha=0.85,
            drawstyle="steps-post" if curve.kind == "step" else "default",
        )  # fmt: skip
    if any(curve.errors):
        axes.errorbar(xs, ys, yerr=_finite(curve.errors, 0.0), fmt="none", ecolor=colour, elinewidth=1, capsize=3)
    if curve.mark and (points := _points(curve)):
        axes.plot(*points[-1], "x", color=colour, markersize=7, markeredgewidth=1.8)


def _handle(curve: Curve, styles: Sequence[Style]) -> Any:
    """Return what stands for a curve in a legend."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    look: Any = _look(curve, styles)
    colour, dash = look
    if curve.kind == "band":
        return Patch(facecolor=FAINT, alpha=0.18, label=one_line(curve.name))
    points = curve.kind == "points"
    marker = MARKERS[curve.dash % len(MARKERS)] if points else "o" if curve.kind == "both" else None
    line: Any = "" if points else dash
    return Line2D([], [], color=colour, linestyle=line, marker=marker, markersize=4.5, label=one_line(curve.name))


def _write_texts(axes: Axes, curves: Sequence[Curve]) -> None:
    """Write the texts of points beside them, towards the middle of the axes."""
    places = [(*point, curve.texts[0]) for curve in curves if curve.texts and curve.kind == "points"
              for point in _points(curve)[:1]]  # fmt: skip
    used: list[tuple[float, float]] = []
    for x, y, text in sorted(places):
        at, height = map(float, axes.transAxes.inverted().transform(axes.transData.transform((x, y))))
        taken = any(abs(other - at) < 0.4 and abs(h - height) < LABEL_GAP for other, h in used)
        used.append((at, height))
        late = at > 0.45
        axes.annotate(
            one_line(text), (x, y), xytext=(-7 if late else 7, -9 if taken else 5), textcoords="offset points",
            fontsize=7.5, ha="right" if late else "left", color=INK,
        )  # fmt: skip


def _points(curve: Curve) -> list[tuple[float, float]]:
    """Return the points of a curve that have both values."""
    return [(x, y) for x, y in zip(curve.x, curve.y, strict=True) if x is not None and y is not None]


def _finite(values: Sequence[float | None], missing: float = math.nan) -> list[float]:
    return [missing if value is None else value for value in values]


def _readable_ticks(axes: Axes, panel: Panel) -> None:
    """Write numbers as 2,000 or 20 k, also on logarithmic axes."""
    from matplotlib.ticker import AutoLocator, FixedLocator, FuncFormatter, LogLocator, NullLocator

    for axis, is_log in ((axes.xaxis, panel.x_log), (axes.yaxis, panel.y_log)):
        low, high = axis.get_view_interval()
        one_unit = not is_log or high < 10 * low
        axis.set_major_formatter(FuncFormatter(partial(_tick, max(abs(low), abs(high)) if one_unit else None)))
        if is_log:
            few = AutoLocator() if one_unit else LogLocator(subs=(1, 2, 5), numticks=12)
            axis.set_major_locator(few if high < 100 * low else LogLocator(numticks=12))
            axis.set_minor_locator(NullLocator())
    if panel.x_ticks:
        axes.xaxis.set_major_locator(FixedLocator(panel.x_ticks))


def _tick(most: float | None, value: float, _: int) -> str:
    """Return a number with the unit that suits the largest one of its axis, or itself if that is None."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if (abs(value) if most is None else most) >= 10 * size:
            return f"{value / size:.4g} {unit}" if value else "0"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _label_ends(axes: Axes, curves: Sequence[Curve], styles: Sequence[Style]) -> None:
    """Write the label of each curve beside the axes, at the height of its end, moved apart where they would overlap."""
    ends = sorted(end for curve in curves if (end := _end(axes, curve, styles)))[:MOST_LABELS]
    heights: list[float] = []
    for end in ends:
        heights.append(max(end.height, heights[-1] + LABEL_GAP) if heights else end.height)
    over = max(0.0, heights[-1] - 1.0) if heights else 0.0
    inch = 1 / (WIDTH - LEFT - RIGHT)
    for height, end in zip(heights, ends, strict=True):
        place, y = 1 + 0.08 * inch, height - over
        axes.plot(
            [place, place + (SAMPLE - 0.15) * inch], [y, y], color=end.colour, linestyle=end.dash, linewidth=1.4,
            transform=axes.transAxes, clip_on=False,
        )  # fmt: skip
        text = cut(one_line(end.label), MOST_CHARS)
        axes.text(
            place + (SAMPLE - 0.08) * inch, y, text, fontsize=7.5, color=INK, va="center", transform=axes.transAxes
        )


class _End(NamedTuple):
    """How high a curve ends on the axes, from 0 to 1, and what it looks like."""

    height: float
    label: str
    colour: str
    dash: str


def _end(axes: Axes, curve: Curve, styles: Sequence[Style]) -> _End | None:
    points = _points(curve)
    if not points:
        return None
    height = axes.transAxes.inverted().transform(axes.transData.transform(points[-1]))[1]
    return _End(min(1.0, max(0.0, float(height))), curve.label, *_look(curve, styles))


def _look(curve: Curve, styles: Sequence[Style]) -> tuple[str, str]:
    """Return the colour and the dashes of a curve."""
    if curve.kind == "guide":
        return FAINT, (0, (1, 1.5))  # type: ignore[return-value]
    style = styles[curve.group] if curve.group is not None else None
    return (style.colour.light, DASHES[style.dash % len(DASHES)]) if style else (INK, DASHES[curve.dash % len(DASHES)])


def _draw_heat(axes: Axes, heat: Heat) -> None:
    from matplotlib.colors import to_rgb

    shades = [[shade(value) for value in row] for row in heat.goodness()]
    axes.grid(visible=False)
    papers: Any = [[to_rgb(paper or "white") for paper, _ in row] for row in shades]
    axes.imshow(papers, aspect="auto", origin="lower")
    axes.set_xticks(range(len(heat.columns)), heat.columns)
    axes.set_yticks(range(len(heat.rows)), heat.rows)
    for row, texts in enumerate(heat.texts):
        for column, text in enumerate(texts):
            axes.text(
                column, row, text.replace(" ± ", "\n± "), ha="center", va="center", fontsize=8,
                fontweight="bold" if (row, column) == heat.best else "normal", color=shades[row][column][1] or INK,
            )  # fmt: skip
