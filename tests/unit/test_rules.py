"""Rules against numbers worked out by hand, and what they must not touch."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling.rules import LAWS, Recipe, Rule, automatic

quick = settings(max_examples=50, deadline=None)
kappas = st.floats(1e-3, 1e5)
SGD = Recipe(lr=0.1, betas=(0.9,), eps=None, weight_decay=1e-4)
ADAM = Recipe(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, ema=0.999)


def rule(name: str, exponent: float = 0.7) -> Rule:
    return Rule(name, exponent if name == "power" else None)


@pytest.mark.parametrize(
    ("rule", "base", "batch", "base_batch", "peak"),
    [
        (Rule("linear"), 0.1, 1024, 256, 0.4),
        (Rule("linear"), 0.1, 8192, 256, 3.2),  # Goyal et al.'s ResNet-50
        (Rule("linear"), 0.1, 64, 256, 0.025),
        (Rule("sqrt"), 6.25e-4, 32768, 512, 5e-3),  # LAMB's BERT
        (Rule("sqrt"), 0.1, 64, 256, 0.05),
        (Rule("power", 0.75), 0.1, 4096, 256, 0.8),
        (Rule("power", -0.5), 0.1, 1024, 256, 0.05),
        (Rule("power", 0.0), 0.1, 1024, 256, 0.1),
        (Rule("none"), 0.1, 1024, 256, 0.1),
    ],
)
def test_the_peak_by_hand(rule: Rule, base: float, batch: int, base_batch: int, peak: float) -> None:
    tuned = Recipe(lr=base, betas=(0.9,), eps=None, weight_decay=None)
    assert rule.apply(tuned, batch / base_batch).lr == pytest.approx(peak, rel=1e-12)


@pytest.mark.parametrize("name", LAWS)
@given(kappa=kappas, recipe=st.sampled_from([SGD, ADAM]))
@quick
def test_a_rule_moves_the_lr_and_the_ema_and_nothing_at_the_tuned_batch(
    name: str, kappa: float, recipe: Recipe
) -> None:
    carried = rule(name).apply(recipe, kappa)
    assert (carried.betas, carried.eps, carried.weight_decay) == (recipe.betas, recipe.eps, recipe.weight_decay)
    assert carried.ema == (None if recipe.ema is None else recipe.ema**kappa)
    assert rule(name).apply(recipe, 1.0) == recipe


@given(kappas, kappas)
@quick
def test_two_moves_are_one(first: float, second: float) -> None:
    for name in LAWS:
        once, twice = rule(name).apply(SGD, first * second), rule(name).apply(rule(name).apply(SGD, first), second)
        assert once.lr == pytest.approx(twice.lr, rel=1e-9)


@given(kappas)
@quick
def test_power_contains_linear_sqrt_and_none(kappa: float) -> None:
    for exponent, name in ((1.0, "linear"), (0.5, "sqrt"), (0.0, "none")):
        assert Rule("power", exponent).apply(SGD, kappa).lr == pytest.approx(Rule(name).apply(SGD, kappa).lr, rel=1e-12)


def test_auto_is_linear_for_sgd_and_sqrt_for_the_rest() -> None:
    assert automatic("sgd") == Rule("linear")
    assert automatic("adam") == Rule("sqrt")
    assert automatic(None) == Rule("sqrt")


def test_an_unknown_rule_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"lr\.rule=cubic: known rules are linear, sqrt, power, none"):
        Rule("cubic")


@pytest.mark.parametrize(("name", "exponent"), [("power", None), ("linear", 0.5), ("none", 0.0)])
def test_power_and_no_other_has_an_exponent(name: str, exponent: float | None) -> None:
    with pytest.raises(ValueError, match=f"lr.rule={name} with lr.power={exponent}"):
        Rule(name, exponent)


@pytest.mark.parametrize(
    ("rule", "lr", "kappa", "found"),
    [
        (Rule("power", 1e5), 0.1, 4.0, "inf"),  # Python's ** overflows by an exception,
        (Rule("linear"), 1e308, 32.0, "inf"),  # its product doesn't
        (Rule("power", 1e5), 0.1, 0.5, "0"),
        (Rule("linear"), math.nan, 2.0, "nan"),
    ],
)
def test_an_lr_of_zero_or_without_end_is_refused(rule: Rule, lr: float, kappa: float, found: str) -> None:
    with pytest.raises(ValueError, match=rf"lr\.rule={rule.name}.* into {found} at .*lr\.peak"):
        rule.apply(Recipe(lr=lr, betas=(), eps=None, weight_decay=None), kappa)


def test_what_is_claimed_of_a_rule_has_a_source_and_a_limit() -> None:
    assert LAWS["linear"].batch_tested == LAWS["linear"].kappa_tested * 256 == 8192
    assert LAWS["sqrt"].batch_tested == LAWS["sqrt"].kappa_tested * 512 == 32768
    for law in LAWS.values():
        assert law.source
        assert bool(law.beyond) is (law.kappa_tested < math.inf)
        assert law.factor.format(ratio="4/2", power=0.5)
