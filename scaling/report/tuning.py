"""Draw the results of action=tune. Torch-free; matplotlib is imported on use."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from isobatch.conf.rundir.files import write_atomic
from isobatch.scaling.limits import one_line
from isobatch.scaling.report.compare.picture import Curve, Panel, Picture
from isobatch.scaling.report.compare.plots import draw
from isobatch.scaling.tuning.speed import KNEE, unknown

NAME = "tune"
FAR = 4.0  # times the peaks, from which a limit needs a logarithmic axis
LR_MARKS = {
    "suggestion": "suggested", "steepest": "steepest", "largest_stable": "largest stable", "run_lr": "the run's LR",
}  # fmt: skip
Part = Mapping[str, Any]


def write_picture(folder: Path, parts: Mapping[str, Part]) -> str:
    """Write ``tune.png`` and ``tune.svg`` to ``folder``; return why they are missing, or "".

    Raises:
        OSError: the folder can't be written to.
    """
    if (picture := picture_of(parts)) is None:
        return ""
    try:
        files = draw(picture, ())
    except ImportError:
        return "matplotlib isn't installed, so there is no plot: pip install 'isobatch[report]'"
    except Exception as error:  # the results matter more than their picture
        return f"the plot can't be drawn: {type(error).__name__}: {one_line(str(error)):.200}"
    for suffix, content in files.items():
        write_atomic(folder / f"{NAME}.{suffix}", content)
    return ""


def picture_of(parts: Mapping[str, Part]) -> Picture | None:
    """Return the picture of the parts that have curves; None if none has any."""
    panels = list[Panel]()
    for name, make in PANELS.items():
        with suppress(KeyError, TypeError, ValueError):  # a part that an edited file or another version has changed
            panels += make(parts[name])
    if not panels:
        return None
    return Picture(NAME, "Which batch", "What action=tune has measured, and what it predicts.", panels)


def _memory(part: Part) -> list[Panel]:
    probes = sorted((row["per_gpu"], row["peak_gb"]) for row in part["probes"] if row["peak_gb"] is not None)
    if not probes:
        return []
    sizes, peaks = zip(*probes, strict=True)
    ends, limit, share = [sizes[0], sizes[-1]], part["limit_gb"], 1 - part["margin"]
    curves = [_line(sizes, peaks, "peak of a step", kind="both")]
    curves.append(_line(ends, [share * limit] * 2, f"{share:.0%} of the limit, {share * limit:.3g} GB", dash=2))
    curves.append(_line(ends, [limit] * 2, f"limit, {limit:.3g} GB: {part['limit_from']}", dash=1))
    far = limit > FAR * peaks[-1]  # on a linear axis the peaks would be flat
    return [Panel("Memory", "samples per GPU and pass", "GB", False, far, curves, legend=True)]


def _speed(part: Part) -> list[Panel]:
    sizes = [row["per_gpu"] for row in part["sizes"]]
    rates = [row["samples_per_s"] for row in part["sizes"]]
    within = f"smallest within {max(KNEE, part['spread']):.0%}"
    curves = [_line(sizes, rates, "speed", kind="both")]
    curves += [] if unknown(part["spread"]) else [_mark(part["knee"], sizes, rates, within)]
    return [Panel("Speed", "samples per GPU and pass", "samples per second", True, True, curves, legend=True)]


def _noise(part: Part) -> list[Panel]:
    course = [row for row in part["course"] if row["scale"] is not None]
    if not course:
        return []
    samples = [row["samples"] for row in course]
    lows, highs = ([row[bound] for row in course] for bound in ("low", "high"))
    curves = [Curve([*samples, *samples[::-1]], [*lows, *highs[::-1]], "interval", None, kind="band")]
    curves.append(_line(samples, [row["scale"] for row in course], "noise scale", kind="both"))
    for dash, (name, text) in enumerate({"over_run": "φ, over the run", "batch": "B₀, the run's batch"}.items(), 1):
        if part.get(name):
            curves.append(
                _line([0, part["course"][-1]["samples"]], [part[name]] * 2, f"{text}: {part[name]:,.0f}", dash=dash)
            )
    return [Panel("Gradient noise scale", "samples trained", "samples", False, True, curves, legend=True)]


def _branch(part: Part) -> list[Panel]:
    panels = []
    for branching in part["course"]:
        curves = []
        for number, branch in enumerate(branching["branches"]):
            samples, losses = zip(*branch["curve"], strict=True)
            label = f"{branch['batch']:,} samples" + ("" if branch["stable"] else ", unstable")
            curves.append(_line(samples, losses, label, dash=number))
        title = f"Branches at {branching['samples']:,} samples"
        panels.append(Panel(title, "samples of a branch", "validation loss", False, False, curves, legend=True))
    return panels


def _lr(part: Part) -> list[Panel]:
    if not part["curve"]:
        return []
    _, _, rates, losses = zip(*part["curve"], strict=True)
    curves = [_line(rates, losses, "smoothed loss")]
    marked: dict[float, list[str]] = {}
    for name, text in LR_MARKS.items():
        if part[name] and rates[0] <= part[name] <= rates[-1]:
            marked.setdefault(min(rates, key=lambda rate: abs(math.log(rate / part[name]))), []).append(text)
    curves += [_mark(at, rates, losses, ", ".join(texts), dash) for dash, (at, texts) in enumerate(marked.items())]
    return [Panel("Range test", "learning rate", "training loss, smoothed", True, False, curves, legend=True)]


def _recommendation(part: Part) -> list[Panel]:
    rows, panels = part["predictions"], []
    for name, title in (("samples", "Predicted samples to the target"), ("seconds", "Predicted seconds to the target")):
        known = [row for row in rows if row[name] is not None]
        if not known:
            continue
        sizes, values = [row["global_size"] for row in known], [row[name] for row in known]
        curves = [_line(sizes, values, name, kind="both"), _mark(part["global_size"], sizes, values, "recommended")]
        curves += [_mark(one["global_size"], sizes, values, "few samples", 2) for one in part["alternatives"]]
        panels.append(Panel(title, "global batch", name, True, True, curves, legend=True))
    return panels


PANELS = {
    "memory": _memory,
    "speed": _speed,
    "noise": _noise,
    "branch": _branch,
    "lr": _lr,
    "recommendation": _recommendation,
}


def _line(x: Sequence[float], y: Sequence[float], name: str, kind: Any = "line", dash: int = 0) -> Curve:
    return Curve(list(x), list(y), name, None, kind=kind, dash=dash)


def _mark(x: float, sizes: Sequence[float], values: Sequence[float], text: str, dash: int = 1) -> Curve:
    """Return a marked point at ``x``, one of ``sizes``."""
    return Curve([x], [values[list(sizes).index(x)]], text, None, kind="points", texts=[text], dash=dash)
