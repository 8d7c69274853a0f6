"""Compare the weights of the same run by engine and feature with those of DDP on one rank.

python -m benchmarks.same
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.tables import silenced
from isobatch.conf.compose import compose
from isobatch.trainers.engines.make import import_engine
from tests.support.harness import Run, Runs, distance
from tests.support.same import CASES, ENGINES, TASK, overrides, pairs

RANKS = 3
DEADLINE_S = 300.0


def differences(case: str, folder: Path) -> Iterator[str]:
    """Yield the cells of a row: max |Δ| / max |w|, or for unsupported features whether the engine refused them."""
    runs = Runs(folder, DEADLINE_S)
    truth = finished(runs(1, *overrides(case, "DDP")))
    for engine in ENGINES:
        if (case, engine) not in pairs():
            yield "refused" if refused(runs, case, engine) else "not refused"
            continue
        run = finished(runs(RANKS, *overrides(case, engine)))
        yield f"{distance(run.weights(), truth.weights()):.1g}"


def finished(run: Run) -> Run:
    """Return ``run``, or raise RuntimeError if it didn't finish."""
    if any(end.get("state") != "finished" for end in run.ends):
        raise RuntimeError(f"{run.run.path}: {run.ends}")
    return run


def refused(runs: Runs, case: str, engine: str) -> bool:
    return all(end.get("raised") == "UserError" for end in runs(RANKS, *overrides(case, engine)).ends)


def rows() -> list[dict[str, Any]]:
    """Return a row per case with a column per engine."""
    found = []
    with silenced():
        for engine in ENGINES.values():  # imported once, before forking
            import_engine(compose([*TASK, *engine]))
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder, silenced():
            found.append({"feature": case, **dict(zip(ENGINES, differences(case, Path(folder)), strict=True))})
    return found


if __name__ == "__main__":
    for row in rows():
        print(row)
