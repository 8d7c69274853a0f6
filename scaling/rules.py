"""Rules that carry a recipe from the global batch it was tuned at to another one.

Each is a small function of the recipe and κ = B/B₀, the global batch over the batch of the tuning. A rule is a starting
point, not a promise: none of them transfers everywhere (Shallue et al. 2018).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the optimizer is told at one step.

    Attributes:
        lr: learning rate; a parameter group's own LR is a factor of it.
        betas: memory of the moments: (momentum,) for SGD, (β₁, β₂) for the Adam family, () where it isn't known.
        eps: Adam's ε; None where the optimizer has none.
        weight_decay: None: not told, the optimizer keeps its own.
        ema: decay per step of the weights' moving average; None: there is none.
    """

    lr: float
    betas: tuple[float, ...]
    eps: float | None
    weight_decay: float | None
    ema: float | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule as data, so that a plan is JSON.

    >>> tuned = Recipe(lr=0.1, betas=(0.9,), eps=None, weight_decay=0.0)
    >>> Rule("linear").apply(tuned, kappa=4).lr, Rule("power", 0.5).apply(tuned, kappa=4).lr
    (0.4, 0.2)
    """

    name: str
    power: float | None = None

    def __post_init__(self) -> None:
        if self.name not in LAWS:
            raise ValueError(f"lr.rule={self.name}: known rules are {', '.join(LAWS)}")
        if (self.name == "power") is (self.power is None):
            raise ValueError(f"lr.rule={self.name} with lr.power={self.power}: the rule power, and no other, needs it")

    @property
    def law(self) -> Law:
        return LAWS[self.name]

    def apply(self, recipe: Recipe, kappa: float) -> Recipe:
        """The recipe at κ times the batch that ``recipe`` was tuned at.

        The EMA's half-life is a number of samples, so its decay per step is ρ^κ under every rule (Busbridge et al.
        2023, arXiv:2307.13813).

        Raises:
            ValueError: the LR would be zero or endless.
        """
        try:
            carried = self.law.carry(recipe, kappa, self.power or 0.0)
        except OverflowError:
            carried = replace(recipe, lr=math.inf)
        if not 0 < carried.lr < math.inf:
            exponent = "" if self.power is None else f" (lr.power={self.power:g})"
            raise ValueError(
                f"lr.rule={self.name}{exponent} turns the base LR {recipe.lr:g} into {carried.lr:g} at {kappa:.4g} × "
                "its batch; give lr.peak, the LR at this batch, outright"
            )
        return carried if recipe.ema is None else replace(carried, ema=recipe.ema**kappa)


def linear(recipe: Recipe, kappa: float, _: float) -> Recipe:
    """η = η₀·κ (Goyal et al. 2017, arXiv:1706.02677)."""
    return replace(recipe, lr=recipe.lr * kappa)


def sqrt(recipe: Recipe, kappa: float, _: float) -> Recipe:
    """η = η₀·√κ (Krizhevsky 2014; Hoffer et al. 2017; You et al. 2020)."""
    return replace(recipe, lr=recipe.lr * math.sqrt(kappa))


def power(recipe: Recipe, kappa: float, exponent: float) -> Recipe:
    """η = η₀·κ^α, α being ``lr.power``."""
    return replace(recipe, lr=recipe.lr * kappa**exponent)


def none(recipe: Recipe, kappa: float, _: float) -> Recipe:
    """η = η₀."""
    return recipe


class Law(NamedTuple):
    """A rule's function with what the plan says about it.

    Attributes:
        factor: how the factor is written, from B/B₀ and the exponent.
        kappa_tested: the largest κ at which its source saw it hold; infinite where nothing is claimed.
        batch_tested: likewise the largest global batch, in samples.
        beyond: what was seen, or isn't known, beyond that.
    """

    carry: Callable[[Recipe, float, float], Recipe]
    factor: str
    source: str
    kappa_tested: float = math.inf
    batch_tested: float = math.inf
    beyond: str = ""


LAWS = {
    "linear": Law(
        linear,
        "{ratio}",
        "Goyal et al. 2017",
        kappa_tested=32,
        batch_tested=8192,
        beyond="on ImageNet it held from 256 to 8192 with gradual warmup and lost 1.2 points of accuracy at 16384",
    ),
    "sqrt": Law(
        sqrt,
        "√({ratio})",
        "Krizhevsky 2014; Hoffer et al. 2017",
        kappa_tested=64,
        batch_tested=32768,
        beyond="LAMB's recipes use it from 512 to 32768, with a longer warmup at each doubling",
    ),
    "power": Law(power, "({ratio})^{power:g}", "an exponent of your own, lr.power"),
    "none": Law(none, "1", "the LR isn't scaled"),
}


def automatic(family: str | None) -> Rule:
    """``lr.rule=auto``: linear for the SGD family, sqrt for all others."""
    return Rule("linear" if family == "sgd" else "sqrt")
