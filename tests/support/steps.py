"""Iterate over the steps of a plan in tests."""

from __future__ import annotations

from collections.abc import Iterator

from isobatch.scaling.plan import Plan, Step


def walk(plan: Plan, sample: int = 0) -> Iterator[Step]:
    """Yield all steps from the step that starts at ``sample``."""
    while step := plan.step_at(sample):
        yield step
        sample = step.stop
