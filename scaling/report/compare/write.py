"""Write the files of a report: tables, JSON, plots and the page. Torch-free."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from isobatch.conf.rundir.files import write_atomic
from isobatch.scaling.errors import UserError
from isobatch.scaling.report.compare.compare import as_dict
from isobatch.scaling.report.compare.comparison import Report
from isobatch.scaling.report.compare.pictures import Picture, Style, pictures_of, styles_of
from isobatch.scaling.report.compare.tables import csv_of, markdown_of

EXTRA = "pip install 'isobatch[report]'"
Drawn = tuple[list[Picture], list[Style]]


def write(report: Report, directory: Path) -> Report:
    """Write all files of ``report`` to ``directory``. Return it with their names, and with warnings of what is missing.

    Each file is written under another name and renamed, so that a reader never sees half of one. Without matplotlib or
    plotly, the plots or the page are missing, with a warning that names the extra.

    Raises:
        UserError: the folder can't be written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        drawn = [(pictures_of(comparison), styles_of(comparison)) for comparison in report.comparisons]
        files, missing = list[str](), list[str]()
        pictures: dict[str, list[tuple[str, str]]] = {}
        try:
            for comparison, title, name, content in _plots(report, drawn):
                write_atomic(directory / name, content)
                files.append(name)
                if name.endswith(".svg"):
                    pictures.setdefault(comparison, []).append((title, name))
        except ImportError:
            missing.append(f"matplotlib isn't installed, so there are no plots: {EXTRA}")
        try:
            from isobatch.scaling.report.compare.page import page

            texts = {"report.html": page(report, drawn)}
        except ImportError:
            texts = {}
            missing.append(f"plotly isn't installed, so there is no report.html: {EXTRA}")
        report = replace(report, warnings=[*report.warnings, *missing], directory=directory)
        texts["report.md"] = markdown_of(report, pictures)
        texts["report.csv"] = csv_of(report)
        as_json = json.dumps(as_dict(report), indent=1, allow_nan=False)
        texts["report.json"] = as_json + "\n"
        for name, text in texts.items():
            write_atomic(directory / name, text)
    except OSError as error:
        problem = f"the report can't be written to {directory}: {error.strerror or error}"
        raise UserError(problem, "name another folder by report.dir", "report.dir", str(directory)) from None
    return replace(report, json=as_json, files=[*texts, *files])


def folder_of(roots: Sequence[str]) -> Path:
    """Return where a report goes: ``report/`` in the one folder that was given, else in what all of them share."""
    paths = [os.path.abspath(os.path.expanduser(root)) for root in roots]
    return Path(os.path.commonpath(paths)) / "report"


def _plots(report: Report, drawn: Sequence[Drawn]) -> Iterator[tuple[str, str, str, bytes]]:
    """Yield task, title, file name and content of each plot. Raises ImportError."""
    from isobatch.scaling.report.compare.plots import draw

    for comparison, (pictures, styles) in zip(report.comparisons, drawn, strict=True):
        task = re.sub(r"[^\w.-]", "_", comparison.task, flags=re.ASCII)[:60]
        prefix = f"{task}-" if len(drawn) > 1 else ""
        for picture in pictures:
            for suffix, content in draw(picture, styles).items():
                yield comparison.task, picture.title, f"{prefix}{picture.name}.{suffix}", content
