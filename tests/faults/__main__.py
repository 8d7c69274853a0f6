"""`make faults`: every fault of the table for real, in some minutes on two cores; written into trainers/README.md.

    python -m tests.faults [WORD …]

With words, only the rows that have one of them, and nothing is written.
"""

from __future__ import annotations

import os
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
from tests.faults import crashes, disks, stops  # noqa: F401  they fill the table
from tests.faults.case import Broken
from tests.faults.table import ROWS, References, Row

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
    sys.stdout.write(f"{time.monotonic() - began:5.1f} s  {row.fault} ({row.ranks}){broken}\n")
    sys.stdout.flush()
    return cells


def main(words: list[str]) -> int:
    sections = {
        title: [row for row in rows if not words or any(word in row.fault for word in words)]
        for title, rows in ROWS.items()
    }
    chosen = [row for rows in sections.values() for row in rows]
    with tempfile.TemporaryDirectory(prefix="isobatch-faults-") as name, ThreadPoolExecutor(AT_ONCE) as pool:
        folder = Path(name)
        work = partial(attempt, folder, References(folder / "references"))
        found = dict(zip(chosen, pool.map(work, enumerate(chosen)), strict=True))
    broken = [row.fault for row, cells in found.items() if isinstance(cells, str)]
    tables = []
    for title, rows in sections.items():
        good = [cells for row in rows if isinstance(cells := found[row], dict)]
        tables.append(f"### {title}\n\n{markdown(good)}\n" if good else "")
    text = "\n".join(filter(None, tables))
    if words or broken:
        print(text)
    else:
        head, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(f"{head}{BEGIN}\n\nCaused on {machine()}.\n\n{text}\n{END}{rest.partition(END)[2]}")
    for fault in broken:
        print(f"doesn't hold: {fault}", file=sys.stderr)
    print(f"{len(chosen) - len(broken)} of {len(chosen)} rows hold")
    return int(bool(broken))


def machine() -> str:
    return (
        f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}, "
        f"torch {torch.__version__}, gloo on loopback"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
