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

from benchmarks import checkpoints, invariance, sample_order, start, step

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
    "Saving and going on": (
        checkpoints.rows,
        "Weights in layers of 1 MiB with AdamW's state, so three times as much; in the same processes, turn by turn "
        "with what plain torch does. *copy*: what the training waits for; the first one goes to fresh memory. Against "
        "a mere copy of as many bytes, and against `torch.save` of the whole by rank 0 (neither checksums nor fsync), "
        "for which all wait. *write*: what follows in the background, with both. *taken in all*: how much longer that "
        "many steps take with a save than without, where the training has all cores at work already. *resume*: reading "
        "and checking included.",
    ),
    "Going on in the middle of an epoch": (
        checkpoints.far_rows,
        "10^9 samples, from a checkpoint in the middle, against a run from the beginning. Nothing is skipped by going "
        "through it: 1 is the aim.",
    ),
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
