"""Compare lines of ``metrics.jsonl`` between runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

# Values that depend on the clock, the hardware or the load of the machine.
TIMED = {"samples_per_s", "time_s", "units_per_s", "data_wait", "memory_gb", "mfu", "evaluation_s"}


def untimed(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return lines of metrics without the values that differ each time."""
    return [{name: value for name, value in line.items() if name not in TIMED} for line in lines]
