"""Find a learning rate by a range test: raise the LR at each step until training diverges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from isobatch.scaling.errors import UserError
from isobatch.scaling.plan import Plan
from isobatch.scaling.tuning.lr_range import RangeTest, read
from isobatch.trainers.tuning.bench import Bench

STEPS = 200
# With fewer, the LR grows faster than the loss can show: on noisy quadratics the largest stable LR read up to 4.5
# times too high at 41 steps, and with a momentum of 0.9 up to 40 times too low.
LEAST_STEPS = 100
DECADES = 3  # below and above the run's peak LR


def measure(bench: Bench) -> dict[str, Any]:
    """Train at the run's batch while the LR rises exponentially, from step 0 or with the weights of ``init_from``."""
    run, batch, steps = bench.opened.plan, bench.opened.plan.cut.global_size, steps_of(bench)
    peak, curve = run.peak.lr, RangeTest.empty()
    lowest, rise = peak * 10.0**-DECADES, 10.0 ** (2 * DECADES / (steps - 1))
    with bench.trial(_constant(run, steps * batch)) as trial:
        while len(curve.tried) < steps and not curve.diverged():
            lr = lowest * rise ** len(curve.tried)
            taken = trial.step(lr=lr)
            assert taken is not None
            loss = float(taken[1].loss) / float(taken[1].units)
            curve.add(lr, loss)
            bench.say(f"LR {lr:.3g}: loss {loss:.4g}", len(curve.tried) / steps)
    return {"batch": batch, "run_lr": peak, **read(curve).plain()}


def steps_of(bench: Bench) -> int:
    """Return the steps of the test. Raises UserError if ``tune.samples`` has too few."""
    run, samples = bench.opened.plan, bench.samples()
    steps = STEPS if samples is None else samples // run.cut.global_size
    if steps < LEAST_STEPS:
        over = f"over {2 * DECADES} decades of the LR"
        problem = f"{run.size(samples or 0)} are {steps} steps, and a range test {over} needs {LEAST_STEPS}"
        fix = f"give tune.samples={LEAST_STEPS}st or more, or leave it out for {STEPS}"
        raise UserError(problem, fix, "tune.samples", bench.config.tune.samples)
    return steps


def _constant(plan: Plan, samples: int) -> Plan:
    """Return a plan of the run's first batch alone, without a schedule, which may be longer than the run."""
    assert plan.schedule is not None
    schedule = replace(
        plan.schedule,
        samples=samples,
        warmup_samples=0,
        decay="constant",
        milestones=(),
        cooldown_samples=0,
        held_until=0,
    )
    return replace(plan, segments=plan.segments[:1], samples=samples, schedule=schedule)


def tell(found: Mapping[str, Any]) -> str:
    """Return a sentence with the result."""
    if found["suggestion"] is None:
        return str(found["note"])
    limit = f"it is stable up to {found['largest_stable']:.3g}" if found["largest_stable"] else found["note"]
    suggested = f"{found['suggestion']:.3g} at a batch of {found['batch']:,}, {found['why']}"
    return f"{suggested}; {limit}; the run has {found['run_lr']:.3g}"
