"""Test that each folder's README is short, links to what exists, and lists all files and keys."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from isobatch.conf.identity import HOUSEKEEPING
from isobatch.conf.keys import keys

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("*/README.md")), *sorted(ROOT.glob("trainers/*/README.md"))]
LINES = 150
TABLES = ROOT / "benchmarks/README.md"  # written by `make bench`
MAPPED = [page for page in PAGES if "## Files" in page.read_text()]


def names(page: Path) -> set[str]:
    """Return the names at the start of the lines of a page's map."""
    lines = re.findall(r"^    (\S.*)$", page.read_text().partition("## Files")[2], re.MULTILINE)
    return {name.rstrip("/") for line in lines for name in re.split(r" {2,}", line)[0].split()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_work(page: Path) -> None:
    for link in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text()):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if anchor else []
        anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
        assert not anchor or anchor in anchors, link


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page != TABLES], ids=lambda page: str(page.relative_to(ROOT))
)
def test_page_is_short(page: Path) -> None:
    assert len(page.read_text().splitlines()) <= LINES


@pytest.mark.parametrize("page", MAPPED, ids=lambda page: str(page.relative_to(ROOT)))
def test_map_names_every_file(page: Path) -> None:
    files = {path.name for path in page.parent.iterdir() if not path.name.startswith(("__init__", "__pycache__", "."))}
    assert names(page) == files - {"README.md"}


def test_trust_names_every_key_that_runs_code() -> None:
    targets = re.findall(r"`(\w+\._target_)`", (ROOT / "conf/trust.md").read_text())
    assert sorted(targets) == sorted(key for key in keys() if key.endswith("._target_"))


def test_the_config_page_lists_what_a_resume_may_change() -> None:
    listed = re.findall(r"free to change on a resume: `([^`]+)`", (ROOT / "conf/README.md").read_text())
    not_given_by_users = {"given", "chosen"}
    assert {*listed[0].split()} == {*HOUSEKEEPING} - not_given_by_users
