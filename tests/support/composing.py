"""Compose each choice of config files once per session: files take Hydra 60 ms, the values of keys almost nothing.

Files that a test writes itself may change, so they are read each time.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import pytest
from hydra import compose
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from isobatch.conf.keys import HERE


@pytest.fixture(autouse=True, scope="session")
def cached_composition() -> Iterator[None]:
    """Replace Hydra's compose by a cached one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("isobatch.conf.layers.hydra_compose", compose_cached)
        yield


def compose_cached(primary: str, overrides: Sequence[str]) -> Any:
    """Return or raise the same as ``hydra.compose``."""
    if any(text.startswith("hydra.searchpath") for text in overrides):
        return compose(primary, list(overrides))
    try:
        parsed = [_parsed(text) for text in overrides]
        choices = tuple(override.input_line for override in parsed if _chooses_a_file(override))
        config = pickle.loads(_of_files(primary, choices))  # noqa: S301
        ConfigLoaderImpl._apply_overrides_to_config([key for key in parsed if not _chooses_a_file(key)], config)
    except Exception:  # compose again for Hydra's own error, whose text may differ
        return compose(primary, list(overrides))
    return config


@cache
def _of_files(primary: str, choices: tuple[str, ...]) -> bytes:
    return pickle.dumps(compose(primary, list(choices)))


@cache
def _parsed(text: str) -> Override:
    return OverridesParser.create().parse_override(text)


def _chooses_a_file(override: Override) -> bool:
    """Return True if the override chooses a file, by the test in ``hydra._internal.defaults_list.Overrides``."""
    group = override.key_or_group
    return group.startswith("hydra") or ((HERE / group).is_dir() and not isinstance(override.value(), dict))
