"""Test that the benchmarks can be imported without the optional packages that they compare with."""

from __future__ import annotations

import sys
from importlib import import_module, metadata
from pathlib import Path

import pytest

from isobatch.trainers.ranks.world import World
from tests.support.harness import in_ranks

EXTRAS = ("accelerate", "deepspeed", "lightning", "transformers")


@pytest.mark.parametrize("module", ["benchmarks.__main__", "tests.faults.__main__"])
def test_benchmarks_are_imported_without_the_extras(tmp_path: Path, module: str) -> None:
    def body(world: World) -> str:
        for name in [name for name in sys.modules if name.partition(".")[0] in ("benchmarks", *EXTRAS)]:
            del sys.modules[name]
        sys.modules.update(dict.fromkeys(EXTRAS))  # type: ignore[arg-type]
        known = metadata.version

        def version(name: str) -> str:
            if name in EXTRAS:
                raise metadata.PackageNotFoundError(name)
            return known(name)

        metadata.version = version
        return import_module(module).__name__

    assert in_ranks(1, body, tmp_path) == [module]
