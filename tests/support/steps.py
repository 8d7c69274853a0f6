"""The steps of a plan, for tests."""

from __future__ import annotations

from collections.abc import Iterator

from isobatch.scaling.plan import Plan, Step


def walk(plan: Plan, sample: int = 0) -> Iterator[Step]:
    """All steps from the one that starts at ``sample``."""
    while step := plan.step_at(sample):
        yield step
        sample = step.stop
