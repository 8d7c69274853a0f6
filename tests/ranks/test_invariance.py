"""The second promise: for one global batch, the trajectory doesn't depend on how it is cut."""

from __future__ import annotations

import pytest

from tests.ranks.harness import Runs, distance

COUNTED = (
    "task=custom", "task._target_=tests.tasks.Counted", "batch.global_size=96", "duration=20st", "lr.peak=0.05",
    "evaluate.every=null", "log.every=1st",
)  # fmt: skip
CUTS = [(1, 96), (1, 32), (2, 16), (2, 7), (3, 32), (3, 7), (4, 25), (4, 1)]  # ranks, per-GPU batch at most


def cut(per_gpu: int) -> tuple[str, ...]:
    return (*COUNTED, f"batch.per_gpu={per_gpu}")


def test_weights_are_the_same_over_all_cuts(runs: Runs) -> None:
    """Dropout, unequal units, uneven shares: 1e-6 with SGD after 20 steps."""
    first = runs(1, *cut(96))
    assert first.ends[0]["step"] == 20
    for world, per_gpu in CUTS[1:]:
        other = runs(world, *cut(per_gpu))
        assert distance(first.weights(), other.weights()) < 1e-6, (world, per_gpu)
        assert other.losses() == pytest.approx(first.losses(), rel=1e-5)
        assert other.metrics()[-1]["val/loss"] == pytest.approx(first.metrics()[-1]["val/loss"], rel=1e-5)


def test_clipping_sees_the_whole_gradient(runs: Runs) -> None:
    """Clipping that bites at every step changes the run, and not with the cut."""
    whole = runs(1, *cut(96), "clip_norm=0.05")
    parts = runs(3, *cut(7), "clip_norm=0.05")
    assert distance(whole.weights(), runs(1, *cut(96)).weights()) > 1e-2
    assert all(line["grad_norm"] > 0.05 for line in whole.metrics() if "grad_norm" in line)
    assert distance(whole.weights(), parts.weights()) < 1e-6


def test_more_ranks_than_samples(runs: Runs) -> None:
    """Ranks without a sample take part by stand-ins; the weights are those of one rank."""
    two = ("batch.global_size=2", "task.args.samples=50", "duration=10st")
    assert distance(runs(1, *COUNTED, *two).weights(), runs(4, *COUNTED, *two).weights()) < 1e-6


def test_a_dataset_shorter_than_a_batch_wraps(runs: Runs) -> None:
    short = ("task.args.samples=40", "duration=7st")
    one, three = runs(1, *cut(96), *short), runs(3, *cut(7), *short)
    assert distance(one.weights(), three.weights()) < 1e-6


@pytest.mark.parametrize("many", [False, True])
def test_loading_by_other_processes_changes_nothing(runs: Runs, many: bool) -> None:
    """Augmentation is keyed by the sample: the same from workers, on two ranks, by single or by many samples."""
    slow = (*COUNTED, "task._target_=tests.tasks.Slow", "duration=8st")
    here = runs(1, *slow, "batch.per_gpu=50")
    there = runs(2, *slow, "batch.per_gpu=9", "data.workers=2", f"task.args.many={many}")
    assert distance(here.weights(), there.weights()) < 1e-6


def test_adamw(runs: Runs) -> None:
    """Adam divides by the gradient's own size, and so amplifies rounding."""
    adamw = ("optimizer=adamw", "lr.peak=0.003")
    assert distance(runs(1, *cut(96), *adamw).weights(), runs(3, *cut(7), *adamw).weights()) < 1e-4
