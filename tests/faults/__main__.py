"""`make faults`: every fault of the table for real, in some minutes on two cores; written into trainers/README.md.

    python -m tests.faults [WORD …]

With words, only the rows that have one of them, and nothing is written.
"""

from __future__ import annotations

import platform
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from benchmarks.__main__ import markdown
from tests.faults.case import Broken
from tests.faults.rows import ROWS, References, Row

PAGE = Path(__file__).parents[2] / "trainers/README.md"
BEGIN, END = "<!-- what follows is written by `make faults` -->", "<!-- to here -->"
AT_ONCE = 2


def attempt(folder: Path, references: References, numbered: tuple[int, Row]) -> dict[str, str] | str:
    """The cells of a row, or why it doesn't hold."""
    number, row = numbered
    began = time.monotonic()
    try:
        cells: dict[str, str] | str = row(folder / str(number), references)
    except Broken as error:
        cells = str(error)
    except Exception:
        cells = traceback.format_exc()
    broken = f"\n  BROKEN: {cells}" if isinstance(cells, str) else ""
    print(f"{time.monotonic() - began:5.1f} s  {row.fault} ({row.ranks}){broken}", flush=True)
    return cells


def main(words: list[str]) -> int:
    rows = [row for row in ROWS if not words or any(word in row.fault for word in words)]
    with tempfile.TemporaryDirectory(prefix="isobatch-faults-") as name, ThreadPoolExecutor(AT_ONCE) as pool:
        folder = Path(name)
        found = list(pool.map(partial(attempt, folder, References(folder / "references")), enumerate(rows)))
    good = [cells for cells in found if isinstance(cells, dict)]
    broken = [row.fault for row, cells in zip(rows, found, strict=True) if isinstance(cells, str)]
    about = f"Caused on {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, gloo.\n\n"
    if words or broken:
        print(markdown(good) if good else "")
    else:
        head, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(f"{head}{BEGIN}\n\n{about}{markdown(good)}\n\n{END}{rest.partition(END)[2]}")
    for fault in broken:
        print(f"doesn't hold: {fault}", file=sys.stderr)
    print(f"{len(good)} of {len(rows)} rows hold")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
