"""Compose each choice of files once per session: Hydra takes 60 ms for one, of which values of keys take next to none.

Files of a test's own, which may change, are read each time.
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
def composed_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("isobatch.conf.layers.hydra_compose", remembered)
        yield


def remembered(primary: str, overrides: Sequence[str]) -> Any:
    """Return what ``hydra.compose`` returns, and raise what it raises."""
    if any(text.startswith("hydra.searchpath") for text in overrides):
        return compose(primary, list(overrides))
    try:
        parsed = [_parsed(text) for text in overrides]
        config = pickle.loads(_of_files(primary, tuple(one.input_line for one in parsed if _chooses_a_file(one))))  # noqa: S301
        ConfigLoaderImpl._apply_overrides_to_config([one for one in parsed if not _chooses_a_file(one)], config)
    except Exception:  # whose text is Hydra's, and may name what wasn't looked at here
        return compose(primary, list(overrides))
    return config


@cache
def _of_files(primary: str, choices: tuple[str, ...]) -> bytes:
    return pickle.dumps(compose(primary, list(choices)))


@cache
def _parsed(text: str) -> Override:
    return OverridesParser.create().parse_override(text)


def _chooses_a_file(override: Override) -> bool:
    """Tell them as ``hydra._internal.defaults_list.Overrides`` does."""
    group = override.key_or_group
    return group.startswith("hydra") or ((HERE / group).is_dir() and not isinstance(override.value(), dict))
