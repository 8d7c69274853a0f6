"""Measure the gradient noise scale along a short training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from isobatch.scaling.noise import RAW, Smoothed
from isobatch.scaling.plan import Intervals, Plan
from isobatch.scaling.tuning.recommendation import over_run
from isobatch.trainers.tuning.bench import Bench

STEPS = 300  # of the training, unless tune.samples says otherwise: the noise rises fast at first
COURSE = 20  # points that are kept of it


def measure(bench: Bench, samples: int | None = None) -> dict[str, Any]:
    """Train with the run's own recipe and measure every step; return the noise scale at the end, and its course.

    Args:
        samples: length of the training; None: 300 steps, or the whole run if that is shorter.
    """
    plan = measured(bench.opened.plan)
    stages = STEPS * plan.cut.global_size
    end = min(plan.samples or stages, samples or stages)
    noise, norm, course = Smoothed(), RAW, []
    with bench.trial(plan) as trial:
        while trial.state.samples < end and (taken := trial.step()):
            step, total, update = taken
            if new := update.estimate(step.cut):
                noise, norm = noise.updated(new.of_data(len(bench.opened.data)), update.norm.name), update.norm
            if step.stop * COURSE // end > step.start * COURSE // end:
                scale = noise.scale()
                course.append({"samples": step.stop, "loss": float(total.loss) / float(total.units), **values(noise)})
                bench.say(f"{scale.scale:,.0f} samples" if scale else "not yet known", step.stop / end)
    known = [(row["samples"], row["scale"]) for row in course if row["scale"] is not None]
    whole = over_run(known, plan.cut.global_size, plan.samples or end)
    measurements = {"samples": end, "measurements": noise.count, "norm": norm.name, "norm_text": norm.text}
    return {**values(noise), "over_run": whole, **measurements, "course": course}


def values(noise: Smoothed) -> dict[str, Any]:
    """Return the noise scale and its interval in samples; None while they aren't known."""
    scale = noise.scale()
    return {name: getattr(scale, name, None) for name in ("scale", "low", "high")}


def measured(plan: Plan) -> Plan:
    """Return the plan with a measurement of two halves in every step."""
    return replace(plan, intervals=Intervals(None, None, None, noise=1, noise_parts=2))
