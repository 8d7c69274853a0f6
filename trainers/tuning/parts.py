"""The parts of ``action=tune``, in the order in which they are measured: each may use the results before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from isobatch.trainers.tuning import noise, speed
from isobatch.trainers.tuning.bench import Bench

Parts = Mapping[str, Mapping[str, Any]]
"""The results so far, by part."""


def measure_speed(bench: Bench, before: Parts) -> dict[str, Any]:
    """Time sizes up to the largest that fits into memory, if that was measured."""
    share = max(1, len(bench.opened.data) // bench.session.world.size)
    most = before.get("memory", {}).get("per_gpu") or bench.opened.plan.cut.per_gpu
    return speed.measure(bench, min(most, share)).plain()


def measure_noise(bench: Bench, before: Parts) -> dict[str, Any]:
    """Measure the noise scale along the first steps of the run, or from the checkpoint of ``init_from``."""
    return noise.measure(bench, bench.samples())


MEASURE: dict[str, Callable[[Bench, Parts], dict[str, Any]]] = {"speed": measure_speed, "noise": measure_noise}
ORDER = ("memory", "speed", "noise", "branch", "law", "lr", "sharpness")
SAYS = {
    "memory": "looking for the largest per-GPU batch that fits",
    "speed": "timing steps of each per-GPU batch",
    "noise": "measuring the gradient noise",
    "branch": "training branches with smaller and larger batches",
    "law": "looking up the law of the critical batch",
    "lr": "raising the learning rate until training diverges",
    "sharpness": "measuring the curvature of the loss",
}
