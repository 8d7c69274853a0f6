"""How many examples a property is tried on."""

from __future__ import annotations

from hypothesis import settings

USUAL = 100  # Hypothesis's own number, which `make test` keeps and `make fuzz` raises


def examples(number: int) -> settings:
    """Return settings for ``number`` examples, or for as many times more as the loaded profile asks for."""
    return settings(max_examples=number * settings().max_examples // USUAL)
