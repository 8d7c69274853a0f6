"""Find the largest per-GPU batch that fits in memory, by few probes. Pure functions of numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limit:
    """Hold a limit on memory in bytes, and where it comes from."""

    bytes: int
    source: str
