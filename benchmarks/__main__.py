"""`make bench`: every measurement in one run, printed and kept in benchmarks/README.md."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy
import torch

from benchmarks import invariance, sample_order, start, step

PAGE = Path(__file__).parent / "README.md"
MARK = "<!-- everything below is written by `make bench` -->"

Rows = list[dict[str, Any]]
PARTS: dict[str, tuple[Callable[[], Rows], str]] = {
    "A training step": (
        step.rows,
        "784-128-10 MLP, 32 samples per process, SGD with Nesterov momentum, clipping, a schedule; against the loop of "
        "[plain.py](plain.py) in the same processes, turn by turn. At most 1.0 is the aim.",
    ),
    "Whole commands": (
        start.rows,
        "From start to exit. Two ranks and two steps against `torchrun` with [plain.py](plain.py) (at most 0.75 is the "
        "aim); a plan against the imports that it can't do without (at most 2). The last column counts runs that "
        "failed, ours / the other's, and weren't timed.",
    ),
    "The sample order": (sample_order.rows, "One core."),
    "One global batch, cut in six ways": (
        invariance.rows,
        "A small model with dropout and unequal numbers of units, SGD, 20 steps, global batch 96: "
        "Δ = max |Δ| / max |w| over all weights, against the first. 1e-6 is the aim.",
    ),
}


def cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def markdown(rows: Rows) -> str:
    """A table of rows with the same keys."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine() -> str:
    """What it was measured on."""
    return (
        f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}, "
        f"torch {torch.__version__}, numpy {numpy.__version__}, hydra-core {version('hydra-core')}, "
        f"pydantic {version('pydantic')}, gloo on loopback"
    )


def main() -> None:
    sections = [f"Measured on {machine()}.\n"]
    for title, (rows, about) in PARTS.items():
        print(f"{title} …", flush=True)
        sections.append(f"## {title}\n\n{about}\n\n{markdown(rows())}\n")
        print(sections[-1], flush=True)
    head = PAGE.read_text().partition(MARK)[0]
    PAGE.write_text(f"{head}{MARK}\n\n" + "\n".join(sections))


if __name__ == "__main__":
    main()
