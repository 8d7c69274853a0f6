"""Read and write ``tune/tune.json`` and the files beside it on rank 0, and raise every error on all ranks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from isobatch.scaling.errors import UserError
from isobatch.scaling.tuning.results import Results
from isobatch.trainers.ranks.session import raise_on_all
from isobatch.trainers.ranks.world import World


def read_results(world: World, run: Path, lock: Callable[[], None] = lambda: None) -> Results:
    """Return the stored results of a run, the same on all ranks.

    Args:
        lock: called on rank 0 before it reads.

    Raises:
        UserError: on all ranks; ``lock`` failed, or the file is damaged.
    """
    results = Results(run)

    def work() -> None:
        lock()
        results.read()

    on_rank_0(world, results.folder, work)
    _share(world, results)
    return results


def put_result(
    world: World,
    results: Results,
    part: str,
    found: Mapping[str, Any] | None,
    conditions: Mapping[str, Any] | None = None,
) -> None:
    """Store the result of a part, or remove it; ``results`` are then the same on all ranks.

    Raises:
        UserError: on all ranks.
    """
    on_rank_0(world, results.file, lambda: results.put(part, found, conditions))
    _share(world, results)


def on_rank_0(world: World, path: Path, work: Callable[[], None]) -> None:
    """Call ``work`` on rank 0, which writes ``path``. Raises UserError on all ranks if it fails."""
    error = None
    if world.rank == 0:
        try:
            work()
        except UserError as caught:
            error = caught
        except OSError as caught:
            problem = f"{path} can't be written: {caught.strerror or caught}"
            error = UserError(problem, "free space, or give another run.dir", "run.dir")
    raise_on_all(world, error)


def _share(world: World, results: Results) -> None:
    results.parts = json.loads(world.agree(json.dumps(results.parts)))
