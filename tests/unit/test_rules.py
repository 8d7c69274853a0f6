"""Compare rules with numbers computed by hand, and test that they change no other values."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isobatch.scaling.errors import UserError
from isobatch.scaling.rules import LAWS, OutOfRange, Recipe, Rule, make_rule
from tests.support.examples import examples

quick = examples(50)
batches = st.integers(1, 100_000)
SGD = Recipe(lr=0.1, betas=(0.9,), eps=None, weight_decay=1e-4)
ADAM = Recipe(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, ema=0.999)
BY_BETAS = tuple(name for name, law in LAWS.items() if "betas" in law.moves)
WITH_POWER = ", ".join(name for name, law in LAWS.items() if law.powers)
WITH_SCALE = ", ".join(name for name, law in LAWS.items() if law.measured)


def rule(name: str, **own: Any) -> Rule:
    """Return a rule with valid numbers, some replaced by ``own``."""
    law = LAWS[name]
    power = {"power": min(max(0.7, law.powers[0]), law.powers[1])} if law.powers else {}
    return Rule(name, **{**power, **({"noise_scale": 500.0} if law.measured else {}), **own})


@pytest.mark.parametrize(
    ("rule", "base", "batch", "base_batch", "peak"),
    [
        (Rule("linear"), 0.1, 1024, 256, 0.4),
        (Rule("linear"), 0.1, 8192, 256, 3.2),  # Goyal et al.'s ResNet-50
        (Rule("linear"), 0.1, 64, 256, 0.025),
        (Rule("sqrt"), 6.25e-4, 32768, 512, 5e-3),  # LAMB's BERT
        (Rule("sqrt"), 0.1, 64, 256, 0.05),
        (Rule("legw"), 0.1, 4096, 256, 0.4),
        (Rule("power", 0.75), 0.1, 4096, 256, 0.8),
        (Rule("power", -0.5), 0.1, 1024, 256, 0.05),
        (Rule("power", 0.0), 0.1, 1024, 256, 0.1),
        (Rule("half-life", 0.5), 0.1, 1024, 256, 0.2),
        (Rule("half-life", 0.0), 0.1, 1024, 256, 0.1),
        (Rule("noise", 1.0, 1000.0), 0.1, 1000, 250, 0.25),  # η_max = 0.5, half of it at B = B_noise
        (Rule("noise", 0.5, 1000.0), 0.1, 1000, 250, 0.1 * math.sqrt(2.5)),
        (Rule("surge", None, 1000.0), 0.1, 1000, 250, 0.125),  # the peak is at B_noise, ½(√4 + √¼) = 1.25 × higher
        (Rule("surge", None, 1000.0), 0.1, 4000, 250, 0.1),  # as far above B_noise as below
        (Rule("none"), 0.1, 1024, 256, 0.1),
    ],
)
def test_the_peak_by_hand(rule: Rule, base: float, batch: int, base_batch: int, peak: float) -> None:
    tuned = Recipe(lr=base, betas=(0.9,), eps=None, weight_decay=None)
    assert rule.apply(tuned, base_batch, batch).lr == pytest.approx(peak, rel=1e-12)


def test_the_sde_rule_equals_the_papers_by_hand() -> None:
    """Malladi et al. scale by √κ, 1 − κ(1 − β) and ε/√κ."""
    tuned = Recipe(lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    assert rule("sde").apply(tuned, 64, 256) == Recipe(lr=2e-3, betas=(0.6, 0.96), eps=5e-9, weight_decay=0.1)
    smaller = rule("sde").apply(tuned, 64, 16)
    assert smaller.betas == (0.975, 0.9975)
    assert smaller.eps == pytest.approx(2e-8)


@pytest.mark.parametrize(("beta", "before", "largest"), [(0.9, 256, 2559), (0.95, 4, 79), (0.5, 10, 19), (0.1, 10, 11)])
def test_the_sde_rule_names_the_largest_valid_batch(beta: float, before: int, largest: int) -> None:
    tuned = replace(ADAM, betas=(beta, 0.999))
    assert min(rule("sde").apply(tuned, before, largest).betas) > 0
    with pytest.raises(OutOfRange, match=rf"1 − {beta:g}\), which isn't below 1") as refusal:
        rule("sde").apply(tuned, before, largest + 1)
    assert refusal.value.largest == largest


@pytest.mark.parametrize("name", BY_BETAS)
def test_betas_that_round_to_1_are_rejected(name: str) -> None:
    tuned = replace(ADAM, betas=(0.9999999999999, 0.9999999999999))
    with pytest.raises(UserError, match=r"1\.0, 1\.0") as error:
        rule(name).apply(tuned, 10**9, 1)
    assert (error.value.key, error.value.value) == ("lr.rule", name)


def test_a_half_life_stays_the_same_number_of_samples() -> None:
    for batch in (1, 16, 4096):
        carried = rule("half-life").apply(ADAM, 256, batch)
        for beta, was in zip(carried.betas, ADAM.betas, strict=True):
            assert batch / math.log2(beta) == pytest.approx(256 / math.log2(was))


@pytest.mark.parametrize("name", LAWS)
@given(before=batches, after=batches, recipe=st.sampled_from([SGD, ADAM]))
@quick
def test_a_rule_changes_only_its_own_values_and_nothing_at_the_tuned_batch(
    name: str, before: int, after: int, recipe: Recipe
) -> None:
    assert rule(name).apply(recipe, before, before) == recipe
    if name in BY_BETAS:
        return
    carried = rule(name).apply(recipe, before, after)
    assert (carried.betas, carried.eps, carried.weight_decay) == (recipe.betas, recipe.eps, recipe.weight_decay)
    assert carried.ema == (None if recipe.ema is None else recipe.ema ** (after / before))


@given(*[st.integers(1, 1000)] * 3)  # rounding makes betas near 0 irreversible
@quick
def test_two_moves_equal_one(first: int, second: int, third: int) -> None:
    for name in LAWS:
        if name != "sde":
            once = rule(name).apply(SGD, first, third)
            twice = rule(name).apply(rule(name).apply(SGD, first, second), second, third)
            assert once.lr == pytest.approx(twice.lr, rel=1e-9)
            assert once.betas == pytest.approx(twice.betas, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "kappa", "decay"), [("sqrt", 4, 0.02), ("none", 4, 0.04), ("linear", 4, 0.01), ("sde", 4, 0.02)]
)
def test_weight_decay_keeps_its_timescale_on_request(name: str, kappa: int, decay: float) -> None:
    """B/(ηλ) stays constant (Bergsma et al. 2025): λ ∝ √B if η ∝ √B, and λ ∝ B at a fixed η."""
    scaled = rule(name, scale_weight_decay=True).apply(ADAM, 256, 256 * kappa)
    assert scaled.weight_decay == pytest.approx(decay)
    assert scaled.lr * decay / kappa == pytest.approx(ADAM.lr * 0.01)
    assert rule(name).apply(ADAM, 256, 256 * kappa).weight_decay == 0.01


def test_values_given_for_this_batch_are_kept() -> None:
    carried = rule("sde", fixed=("betas",)).apply(ADAM, 256, 256 * 100)  # beyond the range of its betas
    assert (carried.betas, carried.lr, carried.eps) == (ADAM.betas, 0.01, 1e-9)
    both = rule("sde", fixed=("eps", "weight_decay"), scale_weight_decay=True).apply(ADAM, 256, 1024)
    assert (both.eps, both.weight_decay) == (ADAM.eps, ADAM.weight_decay)
    assert both.betas != ADAM.betas


@pytest.mark.parametrize(("name", "betas"), [("sde", (0.9,)), ("sde", ()), ("half-life", ())])
def test_a_rule_of_betas_needs_betas(name: str, betas: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=rf"lr\.rule={name} scales .*, which this optimizer doesn't have"):
        rule(name).apply(replace(ADAM, betas=betas), 256, 512)


def test_a_beta_of_0_stays_0() -> None:
    none = replace(ADAM, betas=(0.0, 0.99))
    assert rule("sde").apply(none, 64, 256).betas == (0.0, 0.96)
    assert rule("half-life").apply(none, 64, 256).betas[0] == 0.0


def test_only_legw_scales_the_warmup() -> None:
    assert rule("legw").warmup(1000, 256, 1024) == 4000
    assert {rule(name).warmup(1000, 256, 1024) for name in LAWS if name != "legw"} == {1000}


def test_powers_of_1_and_a_half_equal_linear_and_sqrt() -> None:
    for name, exponent in (("linear", 1.0), ("sqrt", 0.5), ("none", 0.0)):
        assert Rule("power", exponent).apply(SGD, 7, 99).lr == pytest.approx(Rule(name).apply(SGD, 7, 99).lr, rel=1e-12)


def test_auto_is_linear_for_sgd_and_sqrt_otherwise() -> None:
    assert make_rule("auto", "sgd") == Rule("linear")
    assert make_rule("auto", "adam") == Rule("sqrt")
    assert make_rule("noise", "sgd", noise_scale=9.0).power == 1.0
    assert make_rule("noise", "adam", noise_scale=9.0).power == 0.5
    assert make_rule("half-life", "adam", power=0.25).power == 0.25


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lr\.rule=quartic") as error:
        Rule("quartic")
    assert all(name in str(error.value) for name in LAWS)


@pytest.mark.parametrize(
    ("name", "own", "expected"),
    [
        ("power", {}, f"lr.power=None: needed by {WITH_POWER}, and only by these"),
        ("linear", {"power": 0.5}, f"lr.power=0.5: needed by {WITH_POWER}, and only by these"),
        ("noise", {"power": 1.0}, f"lr.noise_scale=None: needed by {WITH_SCALE}, and only by these"),
        ("sqrt", {"noise_scale": 5.0}, f"lr.noise_scale=5.0: needed by {WITH_SCALE}, and only by these"),
        (
            "noise",
            {"power": 2.0, "noise_scale": 5.0},
            "lr.power=2 is out of range; the exponent",
        ),
    ],
)
def test_numbers_of_another_rule_are_refused(name: str, own: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError) as refusal:  # noqa: PT011  (checked below)
        Rule(name, **own)
    assert expected in str(refusal.value)


@pytest.mark.parametrize(
    ("rule", "base", "before", "after", "found"),
    [
        (Rule("power", 1e5), 0.1, 1, 4, "inf"),  # Python's ** raises on overflow,
        (Rule("linear"), 1e308, 1, 32, "inf"),  # a product gives inf
        (Rule("power", 1e5), 0.1, 2, 1, "0"),
        (Rule("linear"), math.nan, 1, 2, "nan"),
    ],
)
def test_a_rule_that_overflows_is_refused(rule: Rule, base: float, before: int, after: int, found: str) -> None:
    with pytest.raises(ValueError, match=rf"lr\.rule={rule.name}.* to {found} at .*lr\.peak"):
        rule.apply(replace(SGD, lr=base), before, after)


@pytest.mark.parametrize("name", LAWS)
def test_each_rule_is_documented(name: str) -> None:
    """It has a row in scaling/README.md, and a warning if its tested range is limited."""
    law = LAWS[name]
    assert f"\n| `{name}` |" in (Path(__file__).parents[2] / "scaling/README.md").read_text()
    assert bool(law.beyond) == (math.isfinite(law.kappa_tested) or math.isfinite(law.batch_tested))


def test_tested_ranges_are_those_of_the_sources() -> None:
    assert LAWS["linear"].batch_tested == LAWS["linear"].kappa_tested * 256 == 8192
    assert LAWS["sqrt"].batch_tested == LAWS["sqrt"].kappa_tested * 512 == 32768
