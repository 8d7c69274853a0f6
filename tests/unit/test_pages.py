"""Test that pages are short, link to what exists, and list all keys, and that each folder's map lists its files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from isobatch.conf.identity import HOUSEKEEPING
from isobatch.conf.keys import keys

ROOT = Path(__file__).parents[2]
TOP = ("benchmarks", "conf", "isobatch", "scaling", "slurm", "tests", "trainers")
PAGES = [*sorted(ROOT.glob("*.md")), *(page for folder in TOP for page in sorted((ROOT / folder).rglob("*.md")))]
LINES = 150
LINES_OF = {"README.md": 200, "conf/coming_from.md": 120}
WRITTEN = ("benchmarks/results.md", "benchmarks/faults.md", "benchmarks/gpu.md")  # by make bench, faults and bench-gpu
FOLDERS = sorted({file.parent for folder in TOP for file in (ROOT / folder).rglob("*.py")})


def name(path: Path) -> str:
    """Return a path relative to the root."""
    return str(path.relative_to(ROOT))


def maps(page: Path) -> dict[Path, set[str]]:
    """Return each folder that a page maps, with the names at the start of the lines.

    A page may also map folders inside its own: their files follow the folder's line, indented by two more spaces.
    """
    lines = re.findall(r"^    ( *)(\S.*)$", page.read_text().partition("## Files")[2], re.MULTILINE)
    found = {page.parent: set[str]()}
    folder = page.parent
    for indent, line in lines:
        listed = re.split(r" {2,}", line)[0].split()
        if not indent:
            folder = page.parent / listed[0]
        found.setdefault(folder if indent else page.parent, set()).update(one.rstrip("/") for one in listed)
    return found


MAPS = [(folder, names) for page in PAGES if "## Files" in page.read_text() for folder, names in maps(page).items()]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_work(page: Path) -> None:
    for link in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text()):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if anchor else []
        anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
        assert not anchor or anchor in anchors, link


@pytest.mark.parametrize("page", [page for page in PAGES if name(page) not in WRITTEN], ids=name)
def test_page_is_short(page: Path) -> None:
    assert len(page.read_text().splitlines()) <= LINES_OF.get(name(page), LINES)


@pytest.mark.parametrize(("folder", "names"), MAPS, ids=[name(folder) for folder, _ in MAPS])
def test_map_names_every_file(folder: Path, names: set[str]) -> None:
    def named(path: Path) -> bool:
        return not path.name.startswith(("__init__", "__pycache__", ".", "test_")) and path.name != "README.md"

    assert names - {"__init__.py"} == {path.name for path in folder.iterdir() if named(path)}


@pytest.mark.parametrize("folder", FOLDERS, ids=name)
def test_every_folder_has_one_map(folder: Path) -> None:
    """Files ``test_*.py`` and ``conftest.py`` need no line: tests/README.md says what each folder of tests is."""
    files = [file for file in folder.glob("*.py") if not file.name.startswith(("__init__", "test_", "conftest"))]
    assert len([mapped for mapped, _ in MAPS if mapped == folder]) == bool(files)


def test_trust_names_every_key_that_runs_code() -> None:
    targets = re.findall(r"`(\w+\._target_)`", (ROOT / "conf/trust.md").read_text())
    assert sorted(targets) == sorted(key for key in keys() if key.endswith("._target_"))


def test_the_config_page_lists_what_a_resume_may_change() -> None:
    listed = re.findall(r"free to change on a resume: `([^`]+)`", (ROOT / "conf/README.md").read_text())
    not_given_by_users = {"given", "chosen"}
    assert {*listed[0].split()} == {*HOUSEKEEPING} - not_given_by_users
