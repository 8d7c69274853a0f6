"""Test the second promise for engines: one plan is the same run, whichever engine trains it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from isobatch.conf.schema import RunConfig
from isobatch.trainers.engines import ddp
from isobatch.trainers.engines.reducer import Parts, Reducer
from tests.support.harness import Run, Runs, distance
from tests.support.same import CASES, ENGINES, TASK, overrides, pairs

# The other engines share their code with these and have their own tests. `python -m benchmarks same` runs all cases.
EVERYWHERE = ("the model is called twice in a pass", "only parts of the model are called, never its forward")
# test_invariance.py covers DDP's other cases in float64, and the test of combined options covers FSDP's.
HERE = {
    "DDP": (
        "a parameter without dimensions", "weights that aren't contiguous", "ghost BatchNorm, ranks without samples",
        "RMSprop", "bf16",
    ),
    "FSDP": (
        "a parameter without dimensions", "weights that aren't contiguous", "a skipped step that isn't finite",
        "LARS", "LAMB", "Muon", "RMSprop", "bf16", "recomputed activations",
    ),
}  # fmt: skip
# A growing batch, at first with ranks without samples, ghosts, an average, the noise scale and evaluations. In float64
# a step rounds by 1e-16, which may be amplified 10,000 times.
COMBINED = (
    "task.args.double=true", "task.args.norm=true", "batchnorm.mode=ghost", "batchnorm.ghost_size=4", "batch.per_gpu=4",
    "batch.schedule=0sa:8 40sa:24", "ema=30sa", "noise.every=1st", "evaluate.every=5st",
)  # fmt: skip
PLAIN = "SGD, dropout, augmentation, unequal units, uneven cuts, clipping"


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that gives the run of a case with DDP, by default on one rank."""
    runs = Runs(tmp_path_factory.mktemp("truth"))
    return cache(lambda case, ranks=1, *more: runs(ranks, *overrides(case, "DDP"), *more))


@pytest.mark.parametrize(
    ("case", "engine"),
    [(case, engine) for case, engine in pairs() if case in EVERYWHERE or case in HERE.get(engine, ())],
)
def test_engines_train_the_same_run(runs: Runs, truth: Any, case: str, engine: str) -> None:
    expected, run = truth(case), runs(3 if engine == "DDP" else 2, *overrides(case, engine))
    assert run.ends[0]["state"] == "finished", run.ends[0]
    same(run, expected, CASES[case].apart)


class Bare(Reducer):
    """The engine that CONTRIBUTING.md shows, which overrides nothing."""

    def __init__(self, parts: Parts, config: RunConfig) -> None:
        parts.model.to(parts.world.device)
        super().__init__(parts, parts.make_optimizer())


def test_a_reducer_that_overrides_nothing_is_an_engine(runs: Runs, truth: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It sums the gradients and the attached values over the ranks."""
    monkeypatch.setattr(ddp, "make_reducer", Bare)
    same(runs(3, *overrides(PLAIN, "DDP")), truth(PLAIN), CASES[PLAIN].apart)


@pytest.mark.parametrize("engine", HERE)
def test_combined_options_give_the_same_run(runs: Runs, engine: str) -> None:
    same(runs(3, *TASK, *COMBINED, *ENGINES[engine]), runs(1, *TASK, *COMBINED), 1e-12)


def same(run: Run, expected: Run, tolerance: float) -> None:
    """Compare weights, their average and every line of metrics."""
    assert distance(run.weights(), expected.weights()) < tolerance
    if (averaged := Path(expected.run.final / "ema.safetensors")).exists():
        assert distance(run.weights(averaged.name), expected.weights(averaged.name)) < tolerance
    lines, other_lines = run.metrics(), expected.metrics()
    assert [line["step"] for line in lines] == [line["step"] for line in other_lines]
    for line, other in zip(lines, other_lines, strict=True):
        for key in ("loss", "grad_norm", "lr", "val/loss", "ema/loss", "noise/scale"):
            if (value := other.get(key)) is not None:
                assert line[key] == pytest.approx(value, rel=max(10 * tolerance, 1e-5)), (line, other)


@pytest.mark.parametrize("engine", ["FSDP", "ZeRO-0", "ZeRO-2", "ZeRO-3", "Accelerate"])
def test_buffer_that_the_forward_changes_is_rank_0s(runs: Runs, truth: Any, engine: str) -> None:
    """This holds however often the run is saved. Its value depends on the samples, so the ranks are as many."""
    moved = ("task.args.moved=true", "duration=6st")
    expected = truth(PLAIN, 2, *moved)
    for more in ((), ("checkpoint.every=1st",)) if engine == "FSDP" else (("checkpoint.every=3st",),):
        same(runs(2, *overrides(PLAIN, engine), *moved, *more), expected, 1e-6)
