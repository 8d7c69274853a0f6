"""The second promise over engines: one plan, the same run, whoever reduces the gradients and holds the weights."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401  once, for all ranks that are forked
import deepspeed  # noqa: F401
import pytest

import trainers.engines.fsdp  # noqa: F401
from tests.ranks.harness import Run, Runs, distance
from tests.same import CASES, overrides, pairs

# The others share their code with these, and have tests of their own; `python -m benchmarks same` has all on all.
THROUGHOUT = ("DDP", "FSDP")
SOMETIMES = ("the model is called twice in a pass", "its forward is never called, only parts of it")
PLAIN = "SGD, dropout, augmentation, unequal units, uneven cuts, clipping"


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The run of a case by DDP on one rank, made once."""
    runs = Runs(tmp_path_factory.mktemp("truth"))
    return cache(lambda case: runs(1, *overrides(case, "DDP")))


@pytest.mark.parametrize(
    ("case", "engine"), [(case, engine) for case, engine in pairs() if engine in THROUGHOUT or case in SOMETIMES]
)
def test_the_same_run(runs: Runs, truth: Any, case: str, engine: str) -> None:
    expected, run = truth(case), runs(3, *overrides(case, engine))
    assert run.ends[0]["state"] == "finished", run.ends[0]
    same(run, expected, CASES[case].apart)


def same(run: Run, expected: Run, apart: float) -> None:
    """Weights, their average and every line of metrics."""
    assert distance(run.weights(), expected.weights()) < apart
    if (averaged := Path(expected.run.final / "ema.safetensors")).exists():
        assert distance(run.weights(averaged.name), expected.weights(averaged.name)) < apart
    lines, wanted = run.metrics(), expected.metrics()
    assert [line["step"] for line in lines] == [line["step"] for line in wanted]
    for line, there in zip(lines, wanted, strict=True):
        for key in ("loss", "grad_norm", "lr", "val/loss", "ema/loss", "noise/scale"):
            if (value := there.get(key)) is not None:
                assert line[key] == pytest.approx(value, rel=max(10 * apart, 1e-5)), (line, there)


@pytest.mark.parametrize("engine", ["FSDP", "ZeRO-0", "ZeRO-2", "ZeRO-3", "Accelerate"])
def test_a_buffer_that_the_forward_moves_is_rank_0_s(runs: Runs, engine: str) -> None:
    """On every engine alike, and however often it is saved: on the same number of ranks, as each sees other samples."""
    moved = ("task.args.moved=true", "duration=6st")
    expected = runs(2, *overrides(PLAIN, "DDP"), *moved)
    for more in ((), ("checkpoint.every=1st",)):
        same(runs(2, *overrides(PLAIN, engine), *moved, *more), expected, 1e-6)
