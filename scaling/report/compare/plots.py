"""Draw the pictures of a comparison by matplotlib, as PNG and SVG. Torch-free; matplotlib is imported on use."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from isobatch.scaling.limits import one_line
from isobatch.scaling.report.compare.pictures import Curve, Heat, Panel, Picture, Style
from isobatch.scaling.report.result import cut

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 5.2, 3.5  # inches of a panel, without the labels at the ends of its curves
LEFT, RIGHT, TOP, BOTTOM = 0.75, 0.15, 0.35, 0.55  # inches around its axes
CHAR, MOST_CHARS = 0.062, 34  # inches of a label's character, and characters of a label
DASHES = ("-", "--", ":", "-.")
INK, FAINT = "#222222", "#8a8a8a"
LABEL_GAP = 0.055  # between labels at the ends of curves, as a share of the axis
MOST_LABELS = 12


def draw(picture: Picture, styles: Sequence[Style]) -> dict[str, bytes]:
    """Return the files of a picture by suffix. Raises ImportError if matplotlib isn't installed."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = len(picture.panels) if len(picture.panels) <= 3 else 2
    rows = math.ceil(len(picture.panels) / columns)
    settings: Any = {
        "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": FAINT,
        "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK, "axes.grid": True,
        "grid.color": "#e6e6e6", "grid.linewidth": 0.6, "axes.axisbelow": True, "svg.hashsalt": picture.name,
        "axes.titlesize": 10, "axes.titlelocation": "left", "text.parse_math": False, "svg.fonttype": "none",
    }  # fmt: skip
    with rc_context(settings):
        labels = [len(curve.label) for panel in picture.panels for curve in panel.curves]
        inches = WIDTH + min(max(labels, default=0), MOST_CHARS) * CHAR, HEIGHT
        figure = Figure(figsize=(inches[0] * columns, inches[1] * rows))
        FigureCanvasAgg(figure)
        for number, panel in enumerate(picture.panels):
            row, column = divmod(number, columns)
            x, y = column * inches[0] + LEFT, (rows - 1 - row) * HEIGHT + BOTTOM
            box = (x / inches[0] / columns, y / HEIGHT / rows, (WIDTH - LEFT - RIGHT) / inches[0] / columns)
            _draw_panel(figure.add_axes((*box, (HEIGHT - BOTTOM - TOP) / HEIGHT / rows)), panel, styles)
        return {"png": _saved(figure, "png"), "svg": _saved(figure, "svg")}


def _saved(figure: Figure, suffix: str) -> bytes:
    file = io.BytesIO()
    metadata = {"Date": None} if suffix == "svg" else {"Software": None}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a box is drawn in its place
        figure.savefig(file, format=suffix, dpi=130, metadata=metadata, facecolor="white")
    return file.getvalue()


def _draw_panel(axes: Axes, panel: Panel, styles: Sequence[Style]) -> None:
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
    for number, curve in enumerate(shown):
        _draw_curve(axes, curve, styles, number)
    _readable_ticks(axes, panel)
    _label_ends(axes, [curve for curve in shown if curve.label], styles)


def _draw_curve(axes: Axes, curve: Curve, styles: Sequence[Style], number: int) -> None:
    style = styles[curve.group] if curve.group is not None else None
    colour, dash = (
        (style.colour.light, DASHES[style.dash % len(DASHES)]) if style else (INK, DASHES[number % len(DASHES)])
    )
    xs, ys = _finite(curve.x), _finite(curve.y)
    if curve.kind == "guide":
        axes.plot(xs, ys, color=FAINT, linestyle="--", linewidth=1)
        return
    if curve.kind == "points":
        axes.plot(
            xs, ys, "o", color=colour, markersize=4 if style else 6, alpha=0.45 if style else 1, markeredgewidth=0
        )
    else:
        drawn = "steps-post" if curve.kind == "step" else "default"
        marker = "o" if curve.kind == "both" else None
        axes.plot(
            xs, ys, color=colour, linestyle=dash, linewidth=1.2, marker=marker, markersize=2.6 if style else 4.5,
            drawstyle=drawn, alpha=0.85, solid_capstyle="round",
        )  # fmt: skip
    if any(curve.errors):
        axes.errorbar(xs, ys, yerr=_finite(curve.errors, 0.0), fmt="none", ecolor=colour, elinewidth=1, capsize=3)
    for x, y, text in zip(xs, ys, curve.texts if curve.kind == "points" else [], strict=False):
        axes.annotate(one_line(text), (x, y), xytext=(6, 3), textcoords="offset points", fontsize=8)


def _finite(values: Sequence[float | None], missing: float = math.nan) -> list[float]:
    return [missing if value is None else value for value in values]


def _readable_ticks(axes: Axes, panel: Panel) -> None:
    """Write numbers as 2,000 or 20 k, also on logarithmic axes."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis, is_log in ((axes.xaxis, panel.x_log), (axes.yaxis, panel.y_log)):
        axis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
        if is_log:
            low, high = axis.get_view_interval()
            narrow = low > 0 and high / low < 30
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,), numticks=12))
            axis.set_minor_formatter(NullFormatter())


def _tick(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * size or (abs(value) >= size and value % size == 0):
            return f"{value / size:.4g} {unit}"
    return f"{value:.4g}"


def _label_ends(axes: Axes, curves: Sequence[Curve], styles: Sequence[Style]) -> None:
    """Write the label of each curve at its end, moved apart where they would overlap."""
    ends = sorted(end for curve in curves if (end := _end(axes, curve, styles)))[:MOST_LABELS]
    heights: list[float] = []
    for end in ends:
        heights.append(max(end.height, heights[-1] + LABEL_GAP) if heights else end.height)
    over = max(0.0, heights[-1] - 1.0) if heights else 0.0
    for height, end in zip(heights, ends, strict=True):
        line = {"arrowstyle": "-", "color": end.colour, "linewidth": 0.4, "alpha": 0.5, "shrinkA": 0, "shrinkB": 1}
        axes.annotate(
            cut(one_line(end.label), MOST_CHARS), (end.x, end.y), xytext=(1.015, height - over),
            textcoords="axes fraction", fontsize=7.5, color=end.colour, va="center", annotation_clip=False,
            arrowprops=line,
        )  # fmt: skip


class _End(NamedTuple):
    """The last point of a curve, and how high it is on the axes, from 0 to 1."""

    height: float
    x: float
    y: float
    label: str
    colour: str


def _end(axes: Axes, curve: Curve, styles: Sequence[Style]) -> _End | None:
    points = [(x, y) for x, y in zip(curve.x, curve.y, strict=True) if x is not None and y is not None]
    if not points:
        return None
    colour = INK if curve.group is None else styles[curve.group].colour.light
    height = axes.transAxes.inverted().transform(axes.transData.transform(points[-1]))[1]
    return _End(float(height), *points[-1], curve.label, colour)


def _draw_heat(axes: Axes, heat: Heat) -> None:
    values = [[math.nan if value is None else value for value in row] for row in heat.values]
    axes.grid(visible=False)
    image: Any = axes.imshow(
        values, cmap="cividis" if heat.more_is_better else "cividis_r", aspect="auto", origin="lower"
    )
    axes.set_xticks(range(len(heat.columns)), heat.columns)
    axes.set_yticks(range(len(heat.rows)), heat.rows)
    for row, texts in enumerate(heat.texts):
        for column, text in enumerate(texts):
            best = (row, column) == heat.best
            value = values[row][column]
            light = not math.isnan(value) and sum(image.cmap(image.norm(value))[:3]) > 1.5
            axes.text(
                column, row, text.replace(" ± ", "\n± "), ha="center", va="center", fontsize=8,
                fontweight="bold" if best else "normal", color=INK if light or math.isnan(value) else "white",
            )  # fmt: skip
