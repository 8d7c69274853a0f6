"""Measure the gradient noise scale along a short training."""

from __future__ import annotations

from typing import Any

from isobatch.scaling.noise import Smoothed, estimate, filled
from isobatch.scaling.plan import Plan
from isobatch.trainers.tuning.bench import Bench

STEPS = 300  # of the training, unless tune.samples says otherwise: the noise rises fast at first
COURSE = 20  # points that are kept of it


def measure(bench: Bench, samples: int | None = None) -> dict[str, Any]:
    """Train with the run's own recipe and measure every step; return the noise scale at the end, and its course.

    Args:
        samples: length of the training; None: 300 steps, or the whole run if that is shorter.
    """
    plan = halved(bench)
    stages = STEPS * plan.cut.global_size
    end = min(plan.samples or stages, samples or stages)
    noise, course = Smoothed(), []
    with bench.trial(plan) as trial:
        while trial.state.samples < end and (taken := trial.step(measure=True)):
            step, total, update = taken
            if update.parts_sq is not None:
                norm = float(update.grad_norm)
                new = estimate(float(update.parts_sq), norm**2, step.cut.global_size, filled(step.cut))
                noise = noise.updated(new)
            if step.stop * COURSE // end > step.start * COURSE // end:
                scale = noise.scale()
                course.append({"samples": step.stop, "loss": float(total.loss) / float(total.units), **values(noise)})
                bench.say(f"{scale.scale:,.0f} samples" if scale else "not yet known", step.stop / end)
    return {**values(noise), "samples": end, "measurements": noise.count, "course": course}


def values(noise: Smoothed) -> dict[str, Any]:
    """Return the noise scale and its interval in samples; None while they aren't known."""
    scale = noise.scale()
    return {name: getattr(scale, name, None) for name in ("scale", "low", "high")}


def halved(bench: Bench) -> Plan:
    """Return the run's plan, with at least two micro-batches per step."""
    plan = bench.opened.plan
    if filled(plan.cut) > 1:
        return plan
    half = -(-plan.cut.global_size // plan.granule // 2) * plan.granule
    return plan.dealt(plan.world, half)
