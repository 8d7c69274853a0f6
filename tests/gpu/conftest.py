"""Run these tests on GPUs; with `--on-cpu`, on the CPU what can be, to check the tests themselves."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from isobatch.conf.hardware import visible_gpus
from tests.support.harness import Runs

PINNED = re.search(r"^torch==(\S+)", (Path(__file__).parents[2] / "constraints.txt").read_text(), re.MULTILINE)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--on-cpu", action="store_true", help="run on the CPU the GPU tests that a CPU can run")


def pytest_report_header(config: pytest.Config) -> str:
    """Return what is tested, since another torch than the pinned one may be installed where the GPU is."""
    pinned = PINNED[1] if PINNED else "no version"
    same = torch.__version__.partition("+")[0] == pinned
    return f"{_device(config) or 'no GPU'}, torch {torch.__version__}{'' if same else f' ({pinned} is pinned)'}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    device = _device(config)
    # it uses CUDA in this process, so it comes last
    items.sort(key=lambda item: item.path == Path(__file__).with_name("test_trial.py"))
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        needs_cuda = item.get_closest_marker("cuda")
        item.add_marker("gpu")
        if device is None:
            item.add_marker(pytest.mark.skip(reason="no GPU is visible; --on-cpu runs what a CPU can"))
        elif device == "cpu" and needs_cuda:
            item.add_marker(pytest.mark.skip(reason="a CPU can't run it"))


def _device(config: pytest.Config) -> str | None:
    if config.getoption("on_cpu", False):
        return "cpu"
    return "cuda" if visible_gpus() else None  # torch might initialise CUDA, which doesn't survive the forks of ranks


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    found = _device(request.config)
    assert found
    return found


@pytest.fixture
def runs(tmp_path: Path, device: str) -> Runs:
    """Return a function that trains on ranks that share the GPUs."""
    return Runs(tmp_path / "gpu", deadline_s=120, device=device)  # a compiler may take a minute


@pytest.fixture
def cpu_runs(tmp_path: Path) -> Runs:
    """Return a function that trains on the CPU."""
    return Runs(tmp_path / "cpu")
