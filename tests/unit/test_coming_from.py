"""Test that every key in conf/coming_from.md is a key of Isobatch."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from isobatch.scaling.planning.automatic import configured

PAGE = (Path(__file__).parents[2] / "conf/coming_from.md").read_text()
ROWS = [row for row in re.findall(r"^\| (.+?) \| (.+) \|$", PAGE, re.MULTILINE) if row[1] != "here"]
THEIRS = ("split_batches=True",)


def ours(cell: str) -> list[list[str]]:
    """Return the overrides in each piece of code in a cell. Python code has none."""
    codes = [shlex.split(code) for code in re.findall(r"`([^`]+)`", cell) if "return" not in code and '"' not in code]
    found = [[word for word in code if re.match(r"[a-z_.]+=(?!…)", word) and word not in THEIRS] for code in codes]
    return [overrides for overrides in found if overrides]


@pytest.mark.parametrize(("line", "cell"), [row for row in ROWS if ours(row[1])])
def test_the_keys_compose(line: str, cell: str) -> None:
    for overrides in ours(cell):
        task = ["task=digits"] if any(word.startswith("run.dir=") for word in overrides) else []
        configured([*overrides, *task, "action=plan"])


def test_the_page_fits_on_a_few_screens() -> None:
    assert len(ROWS) > 60
    assert len(PAGE.splitlines()) <= 120
