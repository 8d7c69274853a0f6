"""Test that the installed torch has the internals that we use."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest

from isobatch.trainers.ranks.internals import MEMBERS

TRAINERS = Path(__file__).parents[2] / "trainers"


@pytest.mark.parametrize("name", MEMBERS)
def test_internal_members_exist(name: str) -> None:
    module, _, owner = name.rpartition(".")
    found = getattr(import_module(module), owner)
    assert [member for member in MEMBERS[name].split() if not has(found, member)] == []


def has(owner: type, member: str) -> bool:
    """Return whether a class has ``member``, or declares or sets it for its instances."""
    declared = re.compile(rf"^ +(self\.)?{member}(: | = )", re.M)
    return hasattr(owner, member) or declared.search(inspect.getsource(owner)) is not None


def test_only_one_module_imports_internals() -> None:
    private = re.compile(
        r"^\s*(from torch[\w.]* import .*\b_\w+|(from|import) torch\S*\._\S*.*|.*\btorch(\.\w+)*\._[a-zA-Z]\w*)", re.M
    )
    users = {path.name for path in TRAINERS.rglob("*.py") if private.search(path.read_text())}
    assert users == {"internals.py"}
