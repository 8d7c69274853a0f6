"""Start one Slurm cluster for all tests of this folder."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from tests.cluster.jobs import AT_ONCE, Cluster
from tests.cluster.lab import running


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Start a Slurm cluster, and start all acts of the session on it in the order of their tests."""
    functions = [item.function for item in request.session.items if isinstance(item, pytest.Function)]
    acts = [(function.act, function.nodes) for function in functions if hasattr(function, "act")]
    with ExitStack() as stack:
        try:
            lab = stack.enter_context(running())
        except (OSError, subprocess.SubprocessError) as error:
            pytest.exit(f"can't start Slurm: {error}", 1)
        pool = ThreadPoolExecutor(AT_ONCE)
        stack.callback(pool.shutdown, cancel_futures=True)
        cluster = Cluster(lab, tmp_path_factory.mktemp("cluster"), pool)
        cluster.start(acts)
        yield cluster
