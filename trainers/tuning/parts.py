"""The parts of ``action=tune``, in the order in which they are measured: each may use the results before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from isobatch.scaling.tuning.memory import from_json, told
from isobatch.trainers.tuning import branch, law, lr, memory, noise, sharpness, speed
from isobatch.trainers.tuning.bench import Bench

Parts = Mapping[str, Mapping[str, Any]]
"""The results so far, by part."""


def measure_memory(bench: Bench, before: Parts) -> dict[str, Any]:
    """Look for the largest per-GPU batch that fits."""
    return memory.measure(bench).as_json()


def measure_speed(bench: Bench, before: Parts) -> dict[str, Any]:
    """Time sizes up to the largest that fits into memory, if that was measured."""
    share = max(1, len(bench.opened.data) // bench.session.world.size)
    most = before.get("memory", {}).get("per_gpu") or bench.opened.plan.cut.per_gpu
    return speed.measure(bench, min(most, share)).plain()


def measure_noise(bench: Bench, before: Parts) -> dict[str, Any]:
    """Measure the noise scale along the first steps of the run, or from the checkpoint of ``init_from``."""
    return noise.measure(bench, bench.samples())


def measure_law(bench: Bench, before: Parts) -> dict[str, Any]:
    """Look up the batch of a language model."""
    return law.measure(bench)


def measure_branch(bench: Bench, before: Parts) -> dict[str, Any]:
    """Train branches of the checkpoints of ``init_from``, or of the run directory."""
    return branch.measure(bench)


def measure_lr(bench: Bench, before: Parts) -> dict[str, Any]:
    """Raise the LR at the run's batch."""
    return lr.measure(bench)


def measure_sharpness(bench: Bench, before: Parts) -> dict[str, Any]:
    """Measure the curvature at the weights of ``init_from``, or at the run's own."""
    return sharpness.measure(bench)


MEASURE: dict[str, Callable[[Bench, Parts], dict[str, Any]]] = {
    "memory": measure_memory,
    "speed": measure_speed,
    "noise": measure_noise,
    "law": measure_law,
    "branch": measure_branch,
    "lr": measure_lr,
    "sharpness": measure_sharpness,
}
ORDER = ("memory", "speed", "noise", "branch", "law", "lr", "sharpness")
SAYS = {
    "memory": "looking for the largest per-GPU batch that fits",
    "speed": "timing steps of each per-GPU batch",
    "noise": "measuring the gradient noise",
    "branch": "training branches with smaller and larger batches",
    "law": "carrying the tuned batch to this run's data by the published law",
    "lr": "raising the learning rate until training diverges",
    "sharpness": "measuring the curvature of the loss",
}


def tell(part: str, found: Mapping[str, Any]) -> str:
    """Return a sentence with the result of a part."""
    return TELLS[part](found)


def _tell_memory(found: Mapping[str, Any]) -> str:
    return told(from_json(found))


def _tell_speed(found: Mapping[str, Any]) -> str:
    sizes = {row["per_gpu"]: row for row in found["sizes"]}
    knee, best = sizes[found["knee"]], max(sizes.values(), key=lambda row: row["samples_per_s"])
    advice = {
        "data": f"; bound by data: ranks wait {knee['data_wait']:.0%} of a step, so give data.workers more processes",
        "communication": f"; bound by communication: {knee['fixed_ms']:.3g} of {knee['step_ms']:.3g} ms aren't passes, "
        "so accumulation pays",
        "compute": "",
    }
    fastest = f"{best['samples_per_s']:,.0f} samples/s at {best['per_gpu']:,} per GPU"
    if knee is best:
        return f"{fastest}{advice[found['bound']]}"
    return f"{fastest}; {knee['per_gpu']:,} per GPU is within 5 % of it{advice[found['bound']]}"


def _tell_noise(found: Mapping[str, Any]) -> str:
    count = found["measurements"]
    if found["scale"] is None:
        return f"not yet known after {count} measurements: the gradient's mean is lost in its noise; give tune.samples"
    now = f"{found['scale']:,.0f} samples [{found['low']:,.0f}, {found['high']:,.0f}] at its end, {found['norm_text']}"
    return f"{now}; over the whole run about {found['over_run']:,.0f}"


def _tell_law(found: Mapping[str, Any]) -> str:
    return f"a batch of {found['batch']:,.0f} samples: {found['why']}"


TELLS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "memory": _tell_memory,
    "speed": _tell_speed,
    "noise": _tell_noise,
    "branch": branch.tell,
    "lr": lr.tell,
    "sharpness": sharpness.tell,
    "law": _tell_law,
}
