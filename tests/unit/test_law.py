"""Test the law that carries a language model's batch to another amount of data."""

from __future__ import annotations

import math

import pytest

from isobatch.scaling.errors import UserError
from isobatch.scaling.families import FAMILIES
from isobatch.scaling.tuning.law import batch_for_data


def test_it_gives_the_batches_of_nanochat() -> None:
    """nanochat takes 2**19 tokens at its depth 12, and 2**20 at about 7 times as much data."""
    found = batch_for_data("language", 7.0e9, 2**19, 1.0e9)
    assert found.batch == pytest.approx(2**19 * 7**0.383)
    assert round(math.log2(found.batch or 0)) == 20
    assert found.low == found.batch
    assert (found.high or 0) > (found.low or 0)
    assert "0.571" in found.why


def test_less_data_asks_for_a_smaller_batch_and_the_tuned_amount_for_the_tuned_one() -> None:
    less, same = batch_for_data("language", 1e8, 1000, 1e9), batch_for_data("language", 1e9, 1000, 1e9)
    assert less.batch == pytest.approx(1000 * 10**-0.383)
    assert (less.low or 0) < (less.batch or 0) == less.high
    assert (same.batch, same.low, same.high) == (1000, 1000, 1000)


@pytest.mark.parametrize("times", [1e-3, 1e3])
def test_far_from_the_tuned_amount_it_says_so(times: float) -> None:
    assert "tune again" in batch_for_data("language", times * 1e9, 1000, 1e9).why
    assert "tune again" not in batch_for_data("language", 2e9, 1000, 1e9).why


@pytest.mark.parametrize("family", [*(name for name in FAMILIES if name != "language"), None])
def test_other_families_have_no_batch_but_a_reason(family: str | None) -> None:
    found = batch_for_data(family, 1e9, 1000, 1e8)
    assert (found.batch, found.low, found.high) == (None, None, None)
    assert (family or "no family") in found.why


@pytest.mark.parametrize("amounts", [(0, 1, 1), (1, -1, 1), (1, 1, math.inf), (math.nan, 1, 1)])
def test_amounts_must_be_positive_and_finite(amounts: tuple[float, float, float]) -> None:
    with pytest.raises(UserError, match="positive"):
        batch_for_data("language", *amounts)
