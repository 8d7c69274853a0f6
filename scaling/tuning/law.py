"""Carry the global batch of a language model to another amount of data by a published power law. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass

from isobatch.scaling.errors import UserError
from isobatch.scaling.families import FAMILIES

FAMILY = "language"
EXPONENT = 0.383  # Bergsma et al. 2025
OTHER_EXPONENT = 0.571  # Li et al. 2025, arXiv:2503.04715, whose optimal batch grows faster
FAR = 100.0  # from the tuned amount of data, at which the two exponents differ by 2.4 ×


@dataclass(frozen=True, slots=True)
class LawBatch:
    """What the law says.

    Attributes:
        batch: the global batch, in the unit of the tuned one; None if the law doesn't apply.
        low, high: the batches by the two published exponents, the smaller one first; None without a batch.
        why: how the batch follows and how far it can be trusted, or why there is none.
    """

    batch: float | None
    low: float | None
    high: float | None
    why: str


def batch_for_data(family: str | None, data: float, tuned_batch: float, tuned_data: float) -> LawBatch:
    """Return the global batch for ``data``, from a batch that was tuned at another amount of data.

    B = B₀·(D/D₀)^0.383. The exponent was fitted to the pre-training of language models with AdamW, in which the best
    batch didn't depend on the size of the model. Other studies of such models find larger exponents, up to 0.571.

    Args:
        family: of the task; the law is for ``language`` only.
        data: D, the data of the run, in samples or tokens.
        tuned_batch: B₀, in samples or tokens; ``tuned_data``: D₀, in the unit of ``data``.

    Raises:
        UserError: an amount isn't positive and finite.

    Source: Bergsma et al. 2025, arXiv:2505.13738; Li et al. 2025, arXiv:2503.04715.

    >>> round(batch_for_data("language", 8e9, 2**19, 1e9).batch / 2**19, 2)
    2.22
    """
    for name, value in (("data", data), ("tuned batch", tuned_batch), ("tuned data", tuned_data)):
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"the {name} of the law is {value:g}", "give a positive, finite amount")
    if family != FAMILY:
        of = f"the family {family}" if family in FAMILIES else f"family={family}"
        why = f"B ∝ D^{EXPONENT:g} was fitted to language models, and this task is of {of}"
        return LawBatch(
            None, None, None, why if family else f"{why.partition(', and')[0]}, and this task has no family"
        )
    times = data / tuned_data
    batch, other = (tuned_batch * times**exponent for exponent in (EXPONENT, OTHER_EXPONENT))
    why = (
        f"B ∝ D^{EXPONENT:g} (Bergsma et al. 2025) from a batch of {tuned_batch:,.4g} for {times:.3g} × as much data; "
        f"another study's exponent {OTHER_EXPONENT:g} gives {other:,.4g}"
    )
    if not 1 / FAR <= times <= FAR:
        why += f"; that far from the tuned amount ({FAR:g} × and more), tune again"
    return LawBatch(batch, min(batch, other), max(batch, other), why)
