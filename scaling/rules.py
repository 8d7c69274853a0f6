"""Scaling rules: adapt a recipe from the global batch it was tuned at to another one.

Each rule is a small function of a recipe and a move from batch B₀ to B, with κ = B/B₀. A rule is a starting point, not
a promise: none of them transfers everywhere (Shallue et al. 2018, arXiv:1811.03600).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Annotated, NamedTuple

from annotated_types import Len

from isobatch.scaling.errors import UserError
from isobatch.scaling.geometry import counted
from isobatch.scaling.limits import Memory, NotNegative, Number, Positive, Share, Text

PARTS = ("betas", "eps", "weight_decay")  # parts of a recipe besides the LR that a run's config may fix


@dataclass(frozen=True, slots=True)
class Recipe:
    """Hold the optimizer's hyperparameters at one step.

    Attributes:
        lr: learning rate; a parameter group's own LR is a factor of it.
        betas: decay rates of the moments: (momentum,) for SGD, (β₁, β₂) for the Adam family, () if unknown.
        eps: Adam's ε; None if the optimizer has none.
        weight_decay: None: the optimizer keeps its own.
        ema: decay per step of the weights' moving average; None: no average.
    """

    lr: NotNegative
    betas: Annotated[tuple[Memory, ...], Len(0, 2)]
    eps: NotNegative | None
    weight_decay: NotNegative | None
    ema: Share | None = None


class OutOfRange(UserError):
    """A batch outside a rule's range; ``largest`` is the largest batch at which the rule holds, in samples."""

    def __init__(self, reason: str, largest: int) -> None:
        super().__init__(reason)
        self.largest = largest


class Move(NamedTuple):
    """Describe a move from the batch ``before`` to the batch ``after``, in samples, with the rule's parameters."""

    before: int
    after: int
    power: float
    noise_scale: float

    @property
    def kappa(self) -> float:
        return self.after / self.before


@dataclass(frozen=True, slots=True)
class Rule:
    """Hold a rule as data, so that a plan can be written as JSON.

    >>> tuned = Recipe(lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    >>> Rule("linear").apply(tuned, 256, 1024).lr, Rule("sde").apply(tuned, 256, 1024).betas
    (0.4, (0.6, 0.8))

    Attributes:
        name: a name of LAWS.
        power: the exponent α, for the laws that have one.
        noise_scale: B_noise in samples, for the laws that use it.
        scale_weight_decay: scale the weight decay, too; see ``timescale``.
        fixed: parts of the recipe given for this batch, which the rule doesn't change.
    """

    name: Text
    power: Number | None = None
    noise_scale: Positive | None = None
    scale_weight_decay: bool = False
    fixed: tuple[Text, ...] = ()

    def __post_init__(self) -> None:
        if self.name not in LAWS:
            raise ValueError(f"lr.rule={self.name}: known rules are {', '.join(LAWS)}")
        for key, value, uses in (
            ("lr.power", self.power, lambda law: law.powers is not None),
            ("lr.noise_scale", self.noise_scale, lambda law: law.measured),
        ):
            if uses(self.law) is (value is None):
                users = ", ".join(name for name, law in LAWS.items() if uses(law))
                raise ValueError(f"lr.rule={self.name} with {key}={value}: needed by {users}, and only by these rules")
        known = ("lr", *PARTS)
        if set(self.fixed) - set(known) or len(set(self.fixed)) < len(self.fixed):
            raise ValueError(f"fixed parts are {', '.join(self.fixed)}; known are {', '.join(known)}, each once")
        least, most = self.law.powers or (-math.inf, math.inf)
        if self.power is not None and not least <= self.power <= most:
            problem = f"lr.power={self.power:g} is out of range"
            fix = f"the exponent of lr.rule={self.name} is {least:g} to {most:g}"
            raise UserError(problem, fix, "lr.power", self.power)

    @property
    def law(self) -> Law:
        return LAWS[self.name]

    def apply(self, recipe: Recipe, before: int, after: int) -> Recipe:
        """Return ``recipe``, tuned at a global batch of ``before`` samples, scaled to one of ``after`` samples.

        The EMA's half-life is a number of samples, so its decay per step becomes ρ^κ under every rule (Busbridge et al.
        2023, arXiv:2307.13813).

        Raises:
            OutOfRange: the rule doesn't hold at ``after``.
            UserError: the rule doesn't fit the optimizer, or the LR would be zero or infinite.
        """
        if before == after:
            return recipe
        move = Move(before, after, self.power or 0.0, self.noise_scale or 0.0)
        try:
            carried = self.law.carry(recipe, move)
            if "lr" in self.fixed:  # before the weight decay, which depends on it
                carried = replace(carried, lr=recipe.lr)
            if self.scale_weight_decay and carried.lr > 0:
                carried = replace(carried, weight_decay=timescale(recipe, carried.lr, move))
        except OverflowError:
            carried = replace(recipe, lr=math.inf)
        kept = {name: getattr(recipe, name) for name in self.fixed}
        carried = replace(carried, **kept)
        if "betas" not in kept:
            _refuse_lost_memory(self.name, recipe, carried, move)
        if not all(0 <= beta < 1 for beta in carried.betas):
            problem = (
                f"lr.rule={self.name} moves betas to {list(carried.betas)}, which have to be from 0 to less than 1"
            )
            raise UserError(problem, "use lr.rule=sqrt or linear", "lr.rule", self.name)
        if not 0 < carried.lr < math.inf:
            exponent = "" if self.power is None else f" (lr.power={self.power:g})"
            scaled = f"scales the base LR {recipe.lr:g} to {carried.lr:g} at {move.kappa:.4g} × its batch"
            problem = f"lr.rule={self.name}{exponent} {scaled}"
            raise UserError(problem, "give lr.peak, the LR at this batch", "lr.rule", self.name)
        return carried if recipe.ema is None else replace(carried, ema=recipe.ema**move.kappa)

    @property
    def later(self) -> Rule:
        """Return the rule for the segments after the first, without a fixed LR: lr.peak only applies to the first."""
        return replace(self, fixed=tuple(part for part in self.fixed if part != "lr"))

    def warmup(self, samples: int, before: int, after: int) -> int:
        """Return the warmup in samples at a batch of ``after``, given the warmup ``samples`` at ``before``."""
        return round(samples * after / before) if self.law.stretches_warmup else samples


def linear(recipe: Recipe, move: Move) -> Recipe:
    """η = η₀·κ (Goyal et al. 2017, arXiv:1706.02677)."""
    return replace(recipe, lr=recipe.lr * move.kappa)


def sqrt(recipe: Recipe, move: Move) -> Recipe:
    """η = η₀·√κ (Krizhevsky 2014; Hoffer et al. 2017; You et al. 2020)."""
    return replace(recipe, lr=recipe.lr * math.sqrt(move.kappa))


def power(recipe: Recipe, move: Move) -> Recipe:
    """η = η₀·κ^α, α being ``lr.power``."""
    return replace(recipe, lr=recipe.lr * move.kappa**move.power)


def sde(recipe: Recipe, move: Move) -> Recipe:
    """η = η₀·√κ, 1−β = κ(1−β₀) for both, ε = ε₀/√κ (Malladi et al. 2022, arXiv:2205.10287).

    Holds while κ(1−β₀) < 1 for both betas, and while noise dominates the gradient. A β of 0 stays 0.
    """
    kappa, root = Fraction(move.after, move.before), math.sqrt(move.kappa)
    betas = tuple(float(1 - kappa * (1 - _exact(beta))) if beta else 0.0 for beta in recipe.betas)
    eps = None if recipe.eps is None else recipe.eps / root
    return replace(recipe, lr=recipe.lr * root, betas=betas, eps=eps)


def half_life(recipe: Recipe, move: Move) -> Recipe:
    """β = β₀^κ, so that each moment's half-life stays the same number of samples (Marek et al. 2025, arXiv:2507.07101).

    The source tests β₂ and tunes η. Scaling β₁ the same way, and η = η₀·κ^α with a default α = ½ (``lr.power``), are
    our choice.
    """
    betas = tuple(beta**move.kappa for beta in recipe.betas)
    return replace(recipe, lr=recipe.lr * move.kappa**move.power, betas=betas)


def noise(recipe: Recipe, move: Move) -> Recipe:
    """η = η_max / (1 + B_noise/B)^α, so η = η₀ ((1 + B_noise/B₀)/(1 + B_noise/B))^α (McCandlish et al. 2018).

    α is 1 for SGD, ½ to 1 for Adam (arXiv:1812.06162, section 2.2 and appendix E).
    """
    gain = (1 + move.noise_scale / move.before) / (1 + move.noise_scale / move.after)
    return replace(recipe, lr=recipe.lr * gain**move.power)


def surge(recipe: Recipe, move: Move) -> Recipe:
    """η = η_max / ½(√(B_noise/B) + √(B/B_noise)), highest at B = B_noise (Adam; Li et al. 2024, arXiv:2405.14578)."""

    def divisor(batch: int) -> float:
        return math.sqrt(move.noise_scale / batch) + math.sqrt(batch / move.noise_scale)

    return replace(recipe, lr=recipe.lr * divisor(move.before) / divisor(move.after))


def none(recipe: Recipe, move: Move) -> Recipe:
    """η = η₀."""
    return recipe


def timescale(recipe: Recipe, lr: float, move: Move) -> float | None:
    """λ = λ₀·κ·η₀/η: keep the timescale of decoupled weight decay, B/(ηλ) samples (Bergsma et al. 2025)."""
    return None if recipe.weight_decay is None else recipe.weight_decay * move.kappa * recipe.lr / lr


class Law(NamedTuple):
    """Hold a rule's function and its description in the plan.

    Attributes:
        factor: format of the LR's factor, from B/B₀, the exponent and the noise scale.
        moves: the other parts of the recipe that the rule changes, with their formulas.
        powers: the smallest and largest exponent; None if the rule has none. ``usual_power``: by optimizer family.
        measured: the rule uses the noise scale.
        stretches_warmup: the warmup is κ times as many samples.
        kappa_tested: the largest κ at which the source found it to hold; infinite if the source makes no claim.
        batch_tested: the same for the largest global batch, in samples.
        beyond: the findings beyond that range.
    """

    carry: Callable[[Recipe, Move], Recipe]
    factor: str
    source: str
    moves: dict[str, str] = {}  # noqa: RUF012  read only
    powers: tuple[float, float] | None = None
    usual_power: dict[str, float] = {}  # noqa: RUF012  read only
    measured: bool = False
    stretches_warmup: bool = False
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
    "legw": Law(
        sqrt,
        "√({ratio})",
        "You et al. 2019: linear-epoch gradual warmup",
        stretches_warmup=True,
        batch_tested=32768,
        beyond="its source goes to 32768 on ImageNet",
    ),
    "power": Law(power, "({ratio})^{power:g}", "an exponent of your own, lr.power", powers=(-math.inf, math.inf)),
    "sde": Law(sde, "√({ratio})", "Malladi et al. 2022", moves={"betas": "1 − κ(1 − β)", "eps": "ε/√κ"}),
    "half-life": Law(
        half_life,
        "({ratio})^{power:g}",
        "β₂: Marek et al. 2025; β₁ and the LR's exponent are our choice",
        moves={"betas": "β^κ, the same half-life in samples"},
        powers=(-math.inf, math.inf),
        usual_power={"sgd": 0.5, "adam": 0.5},
        batch_tested=4096,
        beyond="its source goes from a batch of 1 to 4096 sequences",
    ),
    "noise": Law(
        noise,
        "((1 + {noise}/{before})/(1 + {noise}/{after}))^{power:g}",
        "McCandlish et al. 2018",
        powers=(0.5, 1.0),
        usual_power={"sgd": 1.0, "adam": 0.5},
        measured=True,
    ),
    "surge": Law(
        surge,
        "(√({noise}/{before}) + √({before}/{noise}))/(√({noise}/{after}) + √({after}/{noise}))",
        "Li et al. 2024",
        measured=True,
    ),
    "none": Law(none, "1", "the LR isn't scaled"),
}


def make_rule(
    name: str,
    family: str,
    *,
    power: float | None = None,
    noise_scale: float | None = None,
    scale_weight_decay: bool = False,
    fixed: tuple[str, ...] = (),
) -> Rule:
    """Make the rule ``name``. The exponent defaults to the usual one of the optimizer's ``family``.

    Raises:
        UserError: the exponent is out of the rule's range.
        ValueError: the rule is unknown, or its parameters don't fit it.
    """
    if name == "auto":
        name = "linear" if family == "sgd" else "sqrt"
    law = LAWS.get(name)
    usual = law.usual_power.get(family) if law else None
    return Rule(name, usual if power is None else power, noise_scale, scale_weight_decay, fixed)


def _refuse_lost_memory(name: str, recipe: Recipe, carried: Recipe, move: Move) -> None:
    """Raise UserError if a rule would change unknown betas, or make one negative."""
    law = LAWS[name]
    if "betas" in law.moves and len(recipe.betas) < (2 if name == "sde" else 1):
        needs = "two betas, such as adamw's or lamb's" if name == "sde" else "betas or a momentum that the plan knows"
        problem = f"lr.rule={name} scales {needs}, which this optimizer doesn't have"
        raise UserError(problem, "use lr.rule=sqrt or linear", "lr.rule", name)
    if name != "sde" or all(beta > 0 or was == 0 for beta, was in zip(carried.betas, recipe.betas, strict=True)):
        return
    shortest = min(beta for beta in recipe.betas if beta)
    raise OutOfRange(
        f"lr.rule={name} doesn't hold from {counted(move.before, 'sample')} to {move.after:,}: 1 − β would become "
        f"{move.kappa:.6g} × (1 − {shortest:g}), which isn't below 1",
        largest=math.ceil(move.before / (1 - _exact(shortest))) - 1,
    )


def _exact(beta: float) -> Fraction:
    """Convert a float to its decimal value exactly, so that 10 × (1 − 0.9) is 1, not slightly less."""
    return Fraction(repr(beta))
