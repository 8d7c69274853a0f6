"""Write the files of a report: tables, JSON, plots and the page. Torch-free."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from isobatch.conf.rundir.files import write_atomic
from isobatch.scaling.errors import UserError
from isobatch.scaling.geometry import counted
from isobatch.scaling.limits import one_line
from isobatch.scaling.reading import Unreadable, read_json
from isobatch.scaling.report.compare.colours import styles_of
from isobatch.scaling.report.compare.compare import as_dict
from isobatch.scaling.report.compare.comparison import Report
from isobatch.scaling.report.compare.pictures import pictures_of
from isobatch.scaling.report.compare.tables import Plots, csv_of, markdown_of

EXTRA = "pip install 'isobatch[report]'"
WITHOUT = {"matplotlib": "there are no plots", "plotly": "there is no report.html"}
TABLES = ("report.md", "report.csv", "report.json")
TABLES_WITHOUT_RUNS = ("report.md", "report.json")
DRAWN = re.compile(r"report\.html|[\w.-]+\.(png|svg)", re.ASCII)  # names of the other files
MOST_CHARS = 60  # of a task in the name of a file

Made = TypeVar("Made")


def write(report: Report, directory: Path) -> Report:
    """Write all files of ``report`` to ``directory``. Return it with their names, and with warnings of what is missing.

    The tables are written before anything is drawn. What can't be drawn is left out, with a warning. Each file is
    written under another name and renamed, so that a reader never sees half of one. Plots of an earlier report there,
    whose names its report.json has, are removed.

    Raises:
        UserError: the folder can't be written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        earlier, before = _earlier(directory)
        report = replace(report, directory=directory, warnings=[*report.warnings, *_replaced(before, report)])
        names = TABLES if report.runs else TABLES_WITHOUT_RUNS
        _write(directory, _tables(replace(report, files=[*names, *earlier]), {}))
        drawn, plots, problems = _draw(report)
        files = [*(name for name in drawn if name == "report.html"), *names]
        files += [name for name in drawn if name not in files]
        report = replace(report, files=files, warnings=[*report.warnings, *problems])
        tables = _tables(report, plots)
        _write(directory, {**drawn, **tables})
        for name in {*earlier} - {*files}:
            with suppress(OSError):
                (directory / name).unlink()
    except OSError as error:
        problem = f"the report can't be written to {directory}: {error.strerror or error}"
        raise UserError(problem, "name another folder by report.dir", "report.dir", str(directory)) from None
    return replace(report, json=tables["report.json"].rstrip("\n"))


def folder_of(roots: Sequence[str]) -> Path:
    """Return where a report goes: ``report/`` in the one folder that was given, else in what all of them share."""
    paths = [os.path.abspath(os.path.expanduser(root)) for root in roots]
    return Path(os.path.commonpath(paths)) / "report"


def _earlier(directory: Path) -> tuple[list[str], list[str]]:
    """Return the plots and the page that the report in ``directory`` says it has, and the names of its runs."""
    content: Any = None
    with suppress(FileNotFoundError, Unreadable):
        content = read_json(directory / "report.json")
    lists = [content.get(name) if isinstance(content, dict) else None for name in ("files", "runs")]
    files, runs = (found if isinstance(found, list) else [] for found in lists)
    directories = [run.get("directory") for run in runs if isinstance(run, dict)]
    return (
        [name for name in files if isinstance(name, str) and DRAWN.fullmatch(name)],
        [Path(name).name for name in directories if isinstance(name, str)],
    )


def _replaced(before: Sequence[str], report: Report) -> list[str]:
    """Return a warning if the report replaces one with runs that it lacks."""
    if not {*before} - {Path(run.directory).name for run in report.runs}:
        return []
    return [f"this report replaces an earlier one of {counted(len(before), 'run')}; report.dir=… keeps both"]


def _write(directory: Path, contents: Mapping[str, str | bytes]) -> None:
    for name, content in contents.items():
        write_atomic(directory / name, content)


def _tables(report: Report, plots: Plots) -> dict[str, str]:
    as_json = json.dumps({**as_dict(report), "files": report.files}, indent=1, allow_nan=False)
    tables = {"report.md": markdown_of(report, plots), "report.csv": csv_of(report), "report.json": f"{as_json}\n"}
    return {name: tables[name] for name in (TABLES if report.runs else TABLES_WITHOUT_RUNS)}


def _draw(report: Report) -> tuple[dict[str, str | bytes], Plots, list[str]]:
    """Return the plots and the page by file name, which plots each task has, and why others are missing."""
    from isobatch.scaling.report.compare.page import page
    from isobatch.scaling.report.compare.plots import draw

    files: dict[str, str | bytes] = {}
    plots: Plots = {}
    problems: list[str] = []
    drawn = [(pictures_of(comparison), styles_of(comparison)) for comparison in report.comparisons]
    prefixes = _prefixes([comparison.task for comparison in report.comparisons])
    for index, (prefix, (pictures, styles)) in enumerate(zip(prefixes, drawn, strict=True)):
        for picture in pictures:
            name = f"{prefix}{picture.name}"
            made = _attempt(name, problems, lambda picture=picture, styles=styles: draw(picture, styles))  # type: ignore[misc]
            if made:
                files |= {f"{name}.{suffix}": content for suffix, content in made.items()}
                plots.setdefault(index, []).append((picture.title, f"{name}.svg"))
    html = _attempt("report.html", problems, lambda: page(report, drawn))
    return files | ({"report.html": html} if html else {}), plots, list(dict.fromkeys(problems))


def _attempt(name: str, problems: list[str], make: Callable[[], Made]) -> Made | None:
    """Return what is made; None if that fails, with the reason in ``problems``: the other files matter more."""
    try:
        return make()
    except ImportError as error:
        package = (error.name or "a package").partition(".")[0]
        problems.append(f"{package} isn't installed, so {WITHOUT.get(package, f'{name} is missing')}: {EXTRA}")
    except Exception as error:
        problems.append(f"{name} can't be drawn: {type(error).__name__}: {one_line(str(error)):.200}")
    return None


def _prefixes(tasks: Sequence[str]) -> list[str]:
    """Return what the names of each task's plots begin with: nothing if there is one task."""
    found: list[str] = []
    for task in tasks if len(tasks) > 1 else ():
        number, name = 1, re.sub(r"[^\w.-]", "_", task, flags=re.ASCII)[:MOST_CHARS]
        prefix = f"{name}-"
        while prefix.lower() in map(str.lower, found):
            number += 1
            prefix = f"{name}-{number}-"
        found.append(prefix)
    return found or [""] * len(tasks)
