"""The parts of ``action=tune``, in the order in which they are measured: each may use the results before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from isobatch.scaling.tuning.results import FOLDER
from isobatch.trainers.tuning import branch, law, lr, memory, noise, sharpness, speed
from isobatch.trainers.tuning.bench import Bench
from isobatch.trainers.tuning.conditions import conditions_of

Results = Mapping[str, Mapping[str, Any]]
"""The results so far, by part."""


class Part(NamedTuple):
    """A part of ``action=tune``.

    Attributes:
        doing: what it does, as the user reads it.
        measure: returns its result; it may use the results before it.
        tell: returns what is printed of a result.
        check: raises UserError for what can be known to fail before anything is measured; it is fast.
    """

    doing: str
    measure: Callable[[Bench, Results], dict[str, Any]]
    tell: Callable[[Mapping[str, Any]], str]
    check: Callable[[Bench], object] = lambda bench: None


PARTS = {
    "memory": Part(
        "looking for the largest per-GPU batch that fits",
        lambda bench, _: memory.measure_noted(bench, bench.run / FOLDER, conditions_of(bench, "memory")).as_json(),
        memory.tell,
    ),
    "speed": Part(
        "timing steps of each per-GPU batch",
        lambda bench, before: (
            speed.measure(bench, before.get("memory", {}).get("per_gpu")).plain()
            | {"to_the_largest": "memory" in before}
        ),
        speed.tell,
    ),
    "noise": Part("measuring the gradient noise", lambda bench, _: noise.measure(bench), noise.tell, noise.check),
    "branch": Part(
        "training branches with smaller and larger batches",
        lambda bench, _: branch.measure(bench),
        branch.tell,
        branch.check,
    ),
    "law": Part(
        "carrying the tuned batch to this run's data",
        lambda bench, _: law.measure(bench),
        law.tell,
        law.measure,
    ),
    "lr": Part(
        "raising the learning rate until training diverges", lambda bench, _: lr.measure(bench), lr.tell, lr.steps_of
    ),
    "sharpness": Part(
        "measuring the curvature of the loss",
        lambda bench, _: sharpness.measure(bench),
        sharpness.tell,
        sharpness.weights_of,
    ),
}
