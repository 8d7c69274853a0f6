"""Rules that end a run early: pure functions of its evaluations."""

from __future__ import annotations

import math

import pytest

from isobatch.conf.compose import compose
from isobatch.conf.identity import identity
from isobatch.scaling.errors import UserError
from isobatch.scaling.stopping import Plateau, Target, rules_of
from isobatch.scaling.tally import Interval, Tally

SCORES = [3.0, 2.0, 2.5, 1.0, None, 1.5, 1.25, 0.5, 2.0, 2.0, 2.0, 2.0]
EVALUATIONS = [{"step": 5 * number, "val/score": score} for number, score in enumerate(SCORES, 1)]


def first(rule: Plateau | Target) -> int | None:
    """Return the number of the first evaluation, from 1, at which the run ends."""
    counts = range(1, len(EVALUATIONS) + 1)
    return next((count for count in counts if rule.cause(EVALUATIONS[:count])), None)


@pytest.mark.parametrize(
    ("best", "patience", "min_delta", "ends_at"),
    [
        ("min", 1, 0.0, 3),
        ("min", 2, 0.0, 6),  # after 1.0 a value that isn't finite and a worse one
        ("min", 3, 0.0, 7),
        ("min", 4, 0.0, 12),  # 0.5 is better, four at 2.0 aren't
        ("min", 5, 0.0, None),
        ("min", 3, 0.75, 7),
        ("min", 2, 1.0, 3),  # 2.0 is better by 1, not by more
        ("max", 3, 0.0, 4),
        ("max", 11, 0.0, 12),
        ("max", 12, 0.0, None),
    ],
)
def test_a_plateau_ends_the_run(best: str, patience: int, min_delta: float, ends_at: int | None) -> None:
    assert first(Plateau("val/score", best, patience, min_delta)) == ends_at  # type: ignore[arg-type]


def test_evaluations_without_the_value_arent_counted() -> None:
    lines = [{"val/score": 1.0}, {"val/other": 5.0}, {"val/other": 5.0}, {"val/score": 1.0}]
    rule = Plateau("val/score", "min", 2, 0.0)
    assert [bool(rule.cause(lines[:count])) for count in range(5)] == [False] * 5
    assert rule.cause([*lines, {"val/score": 2.0}])
    assert not Plateau("val/absent", "min", 1, 0.0).cause(lines)


def test_a_value_that_never_was_finite() -> None:
    cause = Plateau("val/score", "min", 2, 0.0).cause([{"val/score": None}] * 2)
    assert "val/score" in cause
    assert "2 evaluations" in cause


@pytest.mark.parametrize(
    ("text", "ends_at"),
    [
        ("val/score<=1", 4),
        ("val/score<1", 8),
        ("val/score>=3", 1),
        ("val/score>3", None),
        ("val/score<=-1e3", None),
        ("val/other<=9", None),
    ],
)
def test_a_target_ends_the_run(text: str, ends_at: int | None) -> None:
    (rule,) = rules_of(None, 1, 0.0, text)
    assert first(rule) == ends_at


def test_a_target_needs_no_quotes_on_the_command_line() -> None:
    assert compose(["stop.at=val/accuracy>=0.97"]).stop.at == "val/accuracy>=0.97"
    assert compose(["stop.at='val/loss<.5'"]).stop.at == "val/loss<.5"
    assert compose(["stop.when=ema/loss:min", "ema=1ep"]).stop.when == "ema/loss:min"


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("stop.at=val/accuracy", "stop.at"),
        ("stop.at=loss<=0.1", "stop.at"),
        ("stop.when=val/loss", "stop.when"),
        ("stop.when=loss:min", "stop.when"),
        ("stop.patience=0", "stop.patience"),
        ("stop.min_delta=-1", "stop.min_delta"),
        ("stop.after=90", "stop.after"),
        ("stop.after=5ep", "stop.after"),
        ("stop.after=0min", "stop.after"),
        ("stop.when=ema/loss:min", "stop.when"),
    ],
)
def test_rejected(override: str, key: str) -> None:
    with pytest.raises(UserError) as rejection:
        compose([override])
    assert rejection.value.key == key


def test_values_need_evaluations_during_the_run() -> None:
    with pytest.raises(UserError) as rejection:
        compose(["evaluate.every=null", "stop.at=val/loss<1"])
    assert rejection.value.key == "stop.at"
    assert "evaluate.every" in f"{rejection.value}"


def test_stop_keys_belong_to_no_identity() -> None:
    keys = ["stop.when=val/loss:min", "stop.patience=5", "stop.min_delta=0.1", "stop.at=val/loss<1", "stop.after=9min"]
    assert identity(compose(keys)) == identity(compose([]))


def test_the_tally_adds_up() -> None:
    tally = Tally().after(4, 8.0, 16.0, {"a": (1.0, 2.0)}, 2.0, 0.5).after(4, 8.0, 8.0, {"a": (2.0, 2.0)}, 2.0, 0.5)
    values = tally.values()
    assert values == {
        "loss": 1.5, "samples_per_s": 2.0, "time_s": 4.0, "units": 16.0, "units_per_s": 4.0, "data_wait": 0.25,
        "train/a": 0.75,
    }  # fmt: skip
    after = tally.logged()
    assert (after.time_s, after.units, after.interval) == (4.0, 16.0, Interval())


def test_the_tally_leaves_out_what_isnt_finite() -> None:
    nan, inf = float("nan"), float("inf")
    tally = Tally().after(4, 8.0, nan, {"a": (inf, 1.0), "b": (0.0, 0.0)}, 1.0, 0.0)
    assert all(math.isnan(tally.values()[name]) for name in ("loss", "train/b"))
    assert tally.units == 8.0
    assert tally.after(4, 8.0, 4.0, {"a": (3.0, 1.0)}, 1.0, 0.0).values()["loss"] == 0.5
    for bad in ({"time_s": -1.0}, {"units": nan}):
        with pytest.raises(ValueError, match="valid"):
            Tally(**bad)
    for wrong in ({"samples": -1}, {"loss": (inf, 1.0)}, {"measures": {"a": (nan, 1.0)}}):
        with pytest.raises(ValueError, match="valid"):
            Interval(**wrong)  # type: ignore[arg-type]
