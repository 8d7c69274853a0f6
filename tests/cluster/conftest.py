"""One lab for all tests here."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.cluster.jobs import AT_ONCE, Cluster
from tests.cluster.lab import running


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A Slurm on which all acts of the session are being done, in the order of their tests."""
    functions = [item.function for item in request.session.items if isinstance(item, pytest.Function)]
    acts = [(function.act, function.nodes) for function in functions if hasattr(function, "act")]
    with running() as lab:
        pool = ThreadPoolExecutor(AT_ONCE)
        cluster = Cluster(lab, tmp_path_factory.mktemp("cluster"), pool)
        cluster.begin(acts)
        yield cluster
        pool.shutdown(cancel_futures=True)
