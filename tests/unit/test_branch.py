"""Test what branches tell of the critical batch, on curves that follow the law and on curves that don't."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence

import pytest

from isobatch.scaling.tuning.branch import (
    Branch,
    Branching,
    LeftOut,
    Point,
    expected,
    fit_efficiencies,
    judged,
    overall,
)

LENGTH, BATCH, POINTS = 16_384, 32, 16
KS = (0.5, 1, 2, 4, 8)


def learned(samples: float) -> float:
    """Return the loss of the smallest batch after some samples."""
    return 0.2 + 2 / (1 + samples / 4_000)


def branches(efficiency: Callable[[float], float], ks: Sequence[float] = KS) -> list[Branch]:
    """Return branches that take 1/efficiency as many samples as the smallest to any loss."""
    at = [LENGTH * i // POINTS for i in range(POINTS + 1)]
    made = [(k, round(k * BATCH)) for k in ks]
    return [Branch(k, size, 0.1, tuple(Point(x, learned(x * efficiency(size))) for x in at)) for k, size in made]


def follows(critical: float) -> Callable[[float], float]:
    return lambda size: expected(KS[0] * BATCH, critical, size)


def told(*found: Branch) -> Branching:
    return judged(10_000, LENGTH, BATCH, found)


@pytest.mark.parametrize("critical", [20, 60, 200])
@pytest.mark.parametrize("ks", [KS, (0.5, 2, 8)])
def test_the_critical_batch_of_the_law_is_found(critical: float, ks: Sequence[float]) -> None:
    """The curve is read between its points, which is off by up to an eighth of a point's distance squared."""
    found = told(*branches(follows(critical), ks))
    assert found.critical_batch == pytest.approx(critical, rel=0.05)
    low, high = found.interval
    assert low
    assert high
    assert low < critical < high
    assert [branch.admissible for branch in found.branches] == [
        follows(critical)(b.batch) >= 0.5 for b in found.branches
    ]
    assert (found.lr_limit, found.note) == (None, "")


def test_the_interval_covers_the_critical_batch_as_often_as_it_says() -> None:
    """Errors of ERROR in each efficiency: 95 % of 400 draws, within three standard deviations of that share."""
    draw, inside = random.Random(0), 0
    for _ in range(400):
        points = [(size, expected(16, 60, size) * draw.lognormvariate(0, 0.2)) for size in (32, 64, 128, 256)]
        low, high = fit_efficiencies(16, points)[1]
        inside += (low or 0) <= 60 <= (high or 1e9)
    assert inside / 400 >= 0.95 - 3 * (0.95 * 0.05 / 400) ** 0.5


def test_branches_that_do_not_differ_bound_it_from_below() -> None:
    found = told(*branches(lambda size: 1.0))
    assert found.critical_batch is None
    assert found.interval[0]
    assert found.interval[0] > 256
    assert found.interval[1] is None
    assert "don't differ enough: it is" in found.note
    assert all(branch.efficiency == 1 for branch in found.branches)


def test_branches_in_proportion_to_the_batch_bound_it_from_above() -> None:
    found = told(*branches(lambda size: 16 / size))
    assert found.critical_batch is None
    assert found.interval[0] is None
    assert found.interval[1]
    assert found.interval[1] < 32
    assert "in proportion" in found.note


def diverging(branch: Branch) -> Branch:
    return Branch(branch.k, branch.batch, branch.lr, branch.curve[:2], stable=False)


def test_a_jump_out_of_stability_is_a_limit_of_the_lr() -> None:
    """From 4 × on nothing is told; the smaller ones still tell the critical batch."""
    made = branches(follows(24))
    rising = Branch(8, 256, 0.1, (made[4].curve[0], Point(LENGTH, made[4].curve[0].loss + 0.01)))
    found = told(*made[:3], diverging(made[3]), rising)
    assert found.lr_limit == 4
    assert found.critical_batch == pytest.approx(24, rel=0.05)
    assert [branch.efficiency is None for branch in found.branches] == [False, False, False, True, True]
    equal = told(*branches(lambda size: 1.0)[:3], diverging(made[3]))
    assert equal.note.startswith(
        "the LR leaves stability at 4 × the batch, and branches up to there don't differ enough: it"
    )
    alone = told(made[0], *map(diverging, made[1:]))
    assert (alone.lr_limit, alone.critical_batch) == (1, None)
    assert alone.note == "the LR leaves stability at 1 × the batch"


def test_an_unstable_branch_below_a_stable_one_is_no_limit() -> None:
    made = branches(follows(60))
    found = told(*made[:2], diverging(made[2]), *made[3:])
    assert found.lr_limit is None
    assert found.critical_batch == pytest.approx(60, rel=0.05)


def test_too_little_data_is_said() -> None:
    assert "needs two" in told(branches(follows(60))[0]).note


def converged(k: float, draw: random.Random, scatter: float = 0.01, fall: float = 0.005) -> Branch:
    """Return a branch whose loss falls little, and scatters."""
    losses = [0.1 - fall * i / POINTS + scatter * draw.gauss() for i in range(1, POINTS + 1)]
    return Branch(k, round(k * BATCH), 0.1, (Point(0, 0.1), *(Point(LENGTH * i // POINTS, loss)
                                                              for i, loss in enumerate(losses, 1))))  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_a_loss_that_hardly_falls_tells_no_batch_and_no_limit_of_the_lr(seed: int) -> None:
    draw = random.Random(seed)
    found = told(*(converged(k, draw) for k in KS))
    assert (found.critical_batch, found.interval, found.lr_limit) == (None, (None, None), None)
    assert all(branch.efficiency is None and not branch.admissible for branch in found.branches)
    assert "the loss hardly falls here: from 0.1 to 0." in found.note
    assert "16,384 samples of the smallest batch, and it scatters by 0.0" in found.note
    assert found.note.endswith("an earlier checkpoint, or more tune.samples, tells more")
    rising = Branch(0.5, 16, 0.1, (Point(0, 1.0), Point(LENGTH, 1.0)))
    assert "hardly falls" in told(rising, *branches(follows(60))[1:]).note


def test_a_batch_without_a_branch_is_named() -> None:
    found = judged(10_000, LENGTH, BATCH, branches(follows(60)), [LeftOut(4096, "too large")])
    assert json.loads(json.dumps(found.plain()))["left_out"] == [{"batch": 4096, "why": "too large"}]


def test_all_checkpoints_have_one_critical_batch() -> None:
    course = [told(*branches(follows(critical))) for critical in (20.0, 80.0)]
    unknown = told(*branches(lambda size: 1.0))
    critical, (low, high), note = overall([*course, unknown])
    assert critical == pytest.approx(40, rel=0.05)
    assert low
    assert high
    assert low < 40 < high
    assert note == "the mean of 2 of 3 checkpoints"
    assert overall([unknown]) == (None, (None, None), unknown.note)


def test_branches_are_plain_json() -> None:
    found = told(*branches(follows(60)))
    plain = json.loads(json.dumps(found.plain(), allow_nan=False))
    assert plain["branches"][1]["curve"][1] == [1024, found.branches[1].curve[1].loss]
