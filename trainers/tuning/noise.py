"""Measure the gradient noise scale along a short training, or at the checkpoints of a run."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from isobatch.scaling.errors import UserError
from isobatch.scaling.geometry import counted
from isobatch.scaling.noise import FEWEST, RAW, Norm, Smoothed, unmeasurable
from isobatch.scaling.plan import Intervals, Plan
from isobatch.scaling.tuning.witnesses import over_run, stretches_of
from isobatch.trainers.tensors.manifest import Checkpoint
from isobatch.trainers.tuning.bench import Bench
from isobatch.trainers.tuning.starts import TRAIN_FIRST, plan_here, run_of_config, spread, starts, unfit, verified

STEPS = 300  # of the training, unless tune.samples says otherwise: the noise rises fast at first
STEPS_EACH = 100  # from each checkpoint
COURSE = 20  # points that are kept of a training


def measure(bench: Bench) -> dict[str, Any]:
    """Return the noise scale where the measurement ends, its course, and what it is over the whole run.

    With ``init_from`` alone, it is measured at the checkpoints of that run, else along a training with the run's own
    recipe, of a fine-tune from the weights that it starts from.
    """
    plan, found = bench.opened.plan, verified(bench, check(bench))
    if found:
        ways = [along(bench, plan_here(bench, start), start, STEPS_EACH) for start in found]
        course = [row for _, _, rows in ways for row in rows[-1:]]
    else:
        ways = [along(bench, plan, None, STEPS)]
        course = ways[0][2]
    noise, norm, rows = ways[-1]
    known = [(row["samples"], row["scale"]) for row in course if row["scale"] is not None]
    whole = over_run(known, stretches_of(plan))
    about = {"batch": plan.cut.global_size, "measurements": noise.count, "norm": norm.name, "norm_text": norm.text}
    return {**values(noise), "over_run": whole, "samples": rows[-1]["samples"], **about, "course": course}


def check(bench: Bench) -> list[Checkpoint]:
    """Return the checkpoints to measure at; none: from step 0.

    Raises:
        UserError: a step can't be halved, the training has too few of them, or no checkpoint leaves enough.
    """
    plan = bench.opened.plan
    if reason := unmeasurable(measured(plan)):
        problem, _, fix = reason.partition("; ")
        raise UserError(problem, fix, "tune.parts", "noise")
    found = list[Checkpoint]()
    if run := run_of_config(bench):
        found = spread([start for start in starts(bench) if not unfit(bench, start) and _has_steps(bench, start)])
        if not found:
            problem = f"{run} has no checkpoint from which {COURSE} steps of it are left to measure the noise in"
            raise UserError(problem, f"{TRAIN_FIRST}; without init_from, it is measured from step 0", "init_from")
    for start in found:
        _span(bench, plan_here(bench, start), start, STEPS_EACH)
    if not found:
        _span(bench, plan, None, STEPS)
    return found


def _has_steps(bench: Bench, start: Checkpoint) -> bool:
    """Return whether a checkpoint has enough of its run left for a course: the last one has none."""
    plan, position = plan_here(bench, start), start.header.samples
    return (plan.samples or 0) - position >= COURSE * plan.stage_at(position).cut.global_size


def along(
    bench: Bench, plan: Plan, start: Checkpoint | None, steps: int
) -> tuple[Smoothed, Norm, list[dict[str, Any]]]:
    """Train and measure every step. Return the averages at the end, their norm, and their course.

    Args:
        start: the checkpoint to start from; None: step 0.
        steps: of the training, if ``tune.samples`` doesn't tell its length; the end of the plan ends it, too.
    """
    begin, end = _span(bench, plan, start, steps)
    noise, norm, course = Smoothed(), RAW, list[dict[str, Any]]()
    with bench.trial(measured(plan), start) as trial:
        while trial.state.samples < end and (taken := trial.step()):
            step, total, update = taken
            with suppress(ValueError):  # it overflows
                if new := update.estimate(step.cut):
                    noise, norm = noise.updated(new.of_data(len(bench.opened.data)), update.norm.name), update.norm
            done, before = ((at - begin) * COURSE // (end - begin) for at in (step.stop, step.start))
            if done > before:
                scale = noise.scale()
                course.append({"samples": step.stop, "loss": float(total.loss) / float(total.units), **values(noise)})
                share = (step.stop - begin) / (end - begin)
                bench.say(f"{scale.scale:,.0f} samples" if scale else "not yet known", share)
    return noise, norm, course


def _span(bench: Bench, plan: Plan, start: Checkpoint | None, steps: int) -> tuple[int, int]:
    """Return the samples at which a training begins and ends. Raises UserError if it has too few steps."""
    begin = start.header.samples if start else 0
    length = bench.samples() or steps * plan.stage_at(begin).cut.global_size
    end = min(begin + length, plan.samples or begin + length)
    given, needed = (end - begin) // plan.stage_at(begin).cut.global_size, FEWEST + 1  # one before Adam has a state
    if given < needed:
        problem = f"{end - begin:,} samples are {counted(given, 'step')}, and a noise scale needs {needed}"
        raise UserError(problem, f"give tune.samples={needed}st or more", "tune.samples", bench.config.tune.samples)
    return begin, end


def values(noise: Smoothed) -> dict[str, Any]:
    """Return the noise scale and its interval in samples; None while they aren't known."""
    scale = noise.scale()
    return {name: getattr(scale, name, None) for name in ("scale", "low", "high")}


def measured(plan: Plan) -> Plan:
    """Return the plan with a measurement of two halves in every step."""
    return replace(plan, intervals=Intervals(None, None, None, noise=1, noise_parts=2))


def tell(found: Mapping[str, Any]) -> str:
    """Return a sentence with the noise scale."""
    count = found["measurements"]
    if found["scale"] is None:
        lost = f"not known at sample {found['samples']:,}: the gradient's mean is lost in its noise"
        whole = found["over_run"]
        so_far = f"; over the whole run about {whole:,.0f}, by its course until then" if whole else ""
        return f"{lost} after {count} measurements{so_far}"
    at = f"at sample {found['samples']:,}, {found['norm_text']}"
    now = f"{found['scale']:,.0f} samples [{found['low']:,.0f}, {found['high']:,.0f}] {at}"
    return f"{now}; over the whole run about {found['over_run']:,.0f}"
