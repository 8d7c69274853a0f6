"""Test that each recipe of the cookbook passes the trial of its contract and is the same run on any cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import sklearn.datasets  # noqa: F401  imported once, before ranks are forked

from isobatch.trainers.tasks import cookbook
from tests.support.harness import ROUNDING, Runs, distance

FOLDER = Path(cookbook.__file__).parent
FILES = {file.stem: file for file in sorted(FOLDER.glob("*.py")) if file.name != "__init__.py"}
CUTS = {"one rank": (1, []), "two ranks": (2, []), "uneven micro-batches": (2, ["batch.per_gpu=5"])}


def command(name: str) -> list[str]:
    """Return the overrides of the command in a recipe's docstring."""
    (line,) = [line.strip() for line in FILES[name].read_text().splitlines() if line.startswith("    python launch.py")]
    return line.split()[2:]


@pytest.mark.parametrize("name", FILES)
def test_recipe_is_short(name: str) -> None:
    assert len(FILES[name].read_text().splitlines()) <= 40


@pytest.mark.parametrize("name", FILES)
def test_recipe_is_the_same_run_on_any_cut(name: str, tmp_path: Path) -> None:
    runs, made = Runs(tmp_path, trial=True), {}
    for cut, (ranks, overrides) in CUTS.items():
        made[cut] = runs(ranks, *command(name), "batch.global_size=32", "duration=5st", *overrides)
        events = {event["event"] for event in made[cut].events()}
        assert "finished" in events, made[cut].ends
        assert not events & {"depends_on_cut", "trial_skipped", "warning"}
    first = made["one rank"].weights()
    assert {cut: distance(first, run.weights()) for cut, run in made.items()} == pytest.approx(
        dict.fromkeys(CUTS, 0.0), abs=ROUNDING
    )
