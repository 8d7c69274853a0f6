"""Set the number of examples of a property test."""

from __future__ import annotations

from hypothesis import settings

USUAL = 100  # Hypothesis's default, which `make test` keeps and `make fuzz` raises


def examples(number: int) -> settings:
    """Return settings for ``number`` examples, scaled by the loaded profile."""
    return settings(max_examples=number * settings().max_examples // USUAL)
