"""Measure the per-GPU batch of a run with batch.per_gpu=auto before its model is made."""

from __future__ import annotations

from dataclasses import replace

from isobatch.conf.rundir.directory import RunDir
from isobatch.conf.terminal import say
from isobatch.scaling.errors import UserError
from isobatch.scaling.planning.sizes import evaluation_batch
from isobatch.trainers.loop.opening import Opened, plan_of
from isobatch.trainers.ranks.session import Session
from isobatch.trainers.tuning.bench import Bench, Interrupted
from isobatch.trainers.tuning.conditions import conditions_of
from isobatch.trainers.tuning.memory import measure_noted, tell, usable
from isobatch.trainers.tuning.progress import Progress
from isobatch.trainers.tuning.stored import put_result, read_results

PART = "memory"


def with_measured_size(session: Session, opened: Opened, run: RunDir) -> Opened | None:
    """Return ``opened`` with the plan for the largest per-GPU batch that fits; called by all ranks.

    A result of an earlier start, or of action=tune, on the same hardware is used again.

    Returns:
        None on all ranks if any rank was asked to stop.

    Raises:
        UserError: nothing fits.
    """
    world, config = session.world, session.config
    bench = Bench(session, opened, None, Progress(shown=False))
    cap = most_of_a_rank(opened)
    results, conditions = read_results(world, run.path), conditions_of(bench, PART)
    found = usable(results.get(PART, conditions), cap)
    if found is None:
        try:
            found = measure_noted(bench, results.folder, conditions, cap)
        except Interrupted:
            return None
        put_result(world, results, PART, found.as_json(), conditions)
    text = tell(found.as_json())
    if not found.per_gpu:
        fix = "use precision=bf16, recompute or engine=fsdp"
        if found.outlook:
            helps = any(way["per_gpu"] for way in found.outlook["ways"])
            fix = "use less memory in one of these ways" if helps else "give the run more memory, or a smaller model"
        raise UserError(f"batch.per_gpu=auto: {text}", fix, "batch.per_gpu", "auto")
    per_gpu = min(found.per_gpu, cap)
    if world.rank == 0:
        run.event("per_gpu", text=text, per_gpu=per_gpu)
        say(text)
    limit = session.start.per_gpu_limit
    plan = plan_of(config, world.size, len(opened.data), limit, per_gpu)
    return replace(opened, plan=plan, evaluation_batch=evaluation_batch(config, plan, limit))


def most_of_a_rank(opened: Opened) -> int:
    """Return the most samples that a rank gets in a step: a larger per-GPU batch is of no use."""
    plan = opened.plan
    granules = plan.largest // plan.granule
    return -(-granules // plan.world) * plan.granule
