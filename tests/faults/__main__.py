"""`make faults`: cause every fault of the table, and write benchmarks/faults.md. Takes some minutes on two cores.

    python -m tests.faults [--whole] [--engine NAME …] [WORD …]

All rows run on DDP, and some on the other engines; with ``--whole`` all rows run on all engines. Words select the rows
that contain one of them. ``--engine`` runs all rows on that engine only. With either, nothing is written.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from benchmarks.tables import markdown
from tests.faults import crashes, disks, stops  # noqa: F401  they fill the table
from tests.faults.case import APART, Broken
from tests.faults.table import ROWS, References, Row
from tests.support.same import ENGINES

PAGE = Path(__file__).parents[2] / "benchmarks/faults.md"
MARK = "<!-- everything below is written by `make faults` -->"
AT_ONCE = 2
DETAILED = "DDP"  # the engine whose rows are shown with all cells
ABOUT = f"""{APART} of the rows that hold, checked as above. Each engine is compared with an uninterrupted run of its
own. `python -m tests.faults --whole` causes all rows on all engines."""

Cells = dict[str, str]
Found = dict[tuple[str, Row], Cells | str]  # by engine and row: the cells, or the reason why the row doesn't hold


def attempt(folder: Path, references: dict[str, References], numbered: tuple[int, tuple[str, Row]]) -> Cells | str:
    """Return the cells of a row on an engine, or the reason why it doesn't hold."""
    number, (engine, row) = numbered
    began = time.monotonic()
    try:
        cells: Cells | str = row(folder / str(number), references[engine])
    except Broken as error:
        cells = str(error)
    except Exception:
        cells = traceback.format_exc()
    broken = f"\n  BROKEN: {cells}" if isinstance(cells, str) else ""
    sys.stdout.write(f"{time.monotonic() - began:5.1f} s  {engine}  {row.fault} ({row.ranks}){broken}\n")
    sys.stdout.flush()
    return cells


def cause(chosen: list[tuple[str, Row]]) -> Found:
    """Run the chosen rows, ``AT_ONCE`` at a time."""
    with tempfile.TemporaryDirectory(prefix="isobatch-faults-") as name, ThreadPoolExecutor(AT_ONCE) as pool:
        references = {engine: References(Path(name) / engine, words) for engine, words in ENGINES.items()}
        work = partial(attempt, Path(name), references)
        return dict(zip(chosen, pool.map(work, enumerate(chosen)), strict=True))


def main(arguments: argparse.Namespace) -> int:
    words, engines = arguments.words, arguments.engine or list(ENGINES)
    rows = [row for rows in ROWS.values() for row in rows if not words or any(word in row.fault for word in words)]
    whole = {*(arguments.engine or [DETAILED]), *(ENGINES if arguments.whole else [])}
    found = cause([(engine, row) for engine in engines for row in rows if engine in whole or row.everywhere])
    broken = [f"{row.fault}, on {engine}" for (engine, row), cells in found.items() if isinstance(cells, str)]
    text = "\n".join([*details(found), *compact(found, engines)])
    if words or arguments.engine or broken:
        print(text)
    else:
        head = PAGE.read_text().partition(MARK)[0]
        PAGE.write_text(f"{head}{MARK}\n\nCaused on {machine()}.\n\n{text}")
    for fault in broken:
        print(f"doesn't hold: {fault}", file=sys.stderr)
    print(f"{len(found) - len(broken)} of {len(found)} rows hold")
    return int(bool(broken))


def details(found: Found) -> Iterable[str]:
    """Yield a table for each section, for one engine."""
    for title, rows in ROWS.items():
        if good := [cells for row in rows if isinstance(cells := found.get((DETAILED, row)), dict)]:
            yield f"## {title}\n\n{markdown(good)}\n"


def compact(found: Found, engines: list[str]) -> Iterable[str]:
    """Yield one table for all engines."""
    others = {row: None for engine, row in found if engine != DETAILED}
    lines = [
        {"fault": row.fault, "ranks": row.ranks} | {engine: distance(found.get((engine, row))) for engine in engines}
        for row in others
    ]
    if lines:
        yield f"## On every engine\n\n{ABOUT}\n\n{markdown(lines)}\n"


def distance(cells: Cells | str | None) -> str:
    return cells[APART] if isinstance(cells, dict) else "doesn't hold" if cells else ""


def machine() -> str:
    return (
        f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}, "
        f"torch {torch.__version__}, gloo on loopback"
    )


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("words", nargs="*", metavar="WORD", help="only rows that contain one of these words")
    found.add_argument("--engine", action="append", choices=ENGINES, help="only this engine, with all rows on it")
    found.add_argument("--whole", action="store_true", help="all rows on all engines")
    return found


if __name__ == "__main__":
    sys.exit(main(parser().parse_args()))
