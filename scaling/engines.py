"""What each engine can do, as data."""

from __future__ import annotations

BITWISE_COST: float | None = (
    None  # how long a step takes with numerics=bitwise, as a multiple of fast; None: not measured
)
