"""Test which sizes are timed, with a clock of the test's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from isobatch.trainers.tuning import speed


@pytest.mark.parametrize(
    ("slow", "expected"),
    [((), [1, 2, 4, 8, 16]), ((2, 4), [1, 2, 4, 8, 16]), ((2, 2, 4, 4), [1, 2, 4])],
    ids=["a quiet machine", "a slow moment", "slower sizes"],
)
def test_sizes_end_where_two_are_slower_twice(
    monkeypatch: pytest.MonkeyPatch, slow: tuple[int, ...], expected: list[int]
) -> None:
    """A step takes 1 ms at any size, and ten times as long once for each time that the size is in ``slow``."""
    left = [size for size in slow for _ in ("one pass", "two")]
    bench = SimpleNamespace(
        session=SimpleNamespace(world=SimpleNamespace(size=1)),
        plan=lambda global_size, per_gpu: SimpleNamespace(passes=global_size // per_gpu, per_gpu=per_gpu),
        most=float,
        say=lambda text: None,
    )
    trial: Any = SimpleNamespace(bench=bench)
    trial.follow = lambda plan: setattr(trial, "plan", plan)

    def time_steps(trial: Any) -> tuple[float, float]:
        passes, size = trial.plan.passes, trial.plan.per_gpu
        is_slow = size in left
        if is_slow:
            left.remove(size)
        return 0.001 * passes * (10 * size if is_slow else 1), 0.0

    monkeypatch.setattr(speed, "time_steps", time_steps)
    assert list(speed.first_round(trial, [1, 2, 4, 8, 16])) == expected
