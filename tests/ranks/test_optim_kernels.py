"""Test the C kernel of LAMB and LARS, which is optional and built once by the first process."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from isobatch.trainers.optim import kernels
from isobatch.trainers.optim.lamb import LAMB
from isobatch.trainers.optim.lars import LARS
from isobatch.trainers.ranks.world import World
from tests.support.harness import in_ranks
from tests.support.papers import after_steps, weights


@pytest.fixture
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernels.kernels.cache_clear()
    yield tmp_path
    kernels.kernels.cache_clear()


def test_a_missing_compiler_gives_one_warning(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.warns(UserWarning, match="the C kernel of LAMB and LARS couldn't be built.*no-such-compiler"):
        found = after_steps(LAMB)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LARS(weights())
    assert all(torch.equal(a, b) for a, b in zip(found, after_steps(LAMB, native=False), strict=True))


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_all_ranks_use_the_kernel_or_none(empty_cache: Path) -> None:
    def body(world: World, lacking: int) -> list[bool]:
        if world.rank == lacking:
            os.environ |= {"CC": "no-such-compiler", "XDG_CACHE_HOME": str(empty_cache / "other")}
        optimizer = LAMB(weights())
        before = optimizer._native
        optimizer.agree()
        return [before, optimizer._native]

    for lacking, found in ((1, [[True, False], [False, False]]), (2, [[True, True]] * 2)):
        assert in_ranks(2, lambda world, who=lacking: body(world, who), empty_cache / "ranks") == found


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_many_processes_may_build_at_once(empty_cache: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        libraries = list(pool.map(lambda _: kernels._built(), range(4)))
    assert [path.name for path in empty_cache.rglob("*")] == ["isobatch", libraries[0].name]
    assert kernels.kernels() is not None


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_threads_are_torchs_and_change_no_bit(tmp_path: Path) -> None:
    """Run in a rank, since a process that ran threads can't be forked. Its only OpenMP library is torch's."""

    def body(world: World) -> Any:
        found, before = [], libraries()
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append([*after_steps(LAMB), *after_steps(LARS)])
        same = all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        return [same, sorted(libraries() - before)]

    def libraries() -> set[str]:
        mapped = {Path(line.split()[-1]).name for line in Path("/proc/self/maps").read_text().splitlines()}
        return {name for name in mapped if re.match(r"lib(g|i)?omp", name)}

    assert in_ranks(1, body, tmp_path) == [[True, []]]
