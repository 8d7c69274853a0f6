"""Compose each command line once: Hydra takes 50 ms for one, and many tests ask for the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

import isobatch.conf.layers


@pytest.fixture(autouse=True, scope="session")
def composed_once() -> Iterator[None]:
    """Remember what Hydra made of overrides alone; YAML of a test's own, which may change, is composed each time."""
    made: dict[tuple[str, ...], Any] = {}
    fresh = isobatch.conf.layers.hydra_compose

    def remembered(primary: str, overrides: Sequence[str]) -> Any:
        if any(one.startswith("hydra.searchpath") for one in overrides):
            return fresh(primary, list(overrides))
        if (key := (primary, *overrides)) not in made:
            made[key] = fresh(primary, list(overrides))
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("isobatch.conf.layers.hydra_compose", remembered)
        yield
