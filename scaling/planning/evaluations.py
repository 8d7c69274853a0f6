"""When a run is evaluated, and how many samples at once."""

from __future__ import annotations

from isobatch.conf.schema import RunConfig
from isobatch.scaling.errors import UserError
from isobatch.scaling.plan import Plan
from isobatch.scaling.planning.sizes import in_samples


def evaluation_batch(config: RunConfig, plan: Plan, limit: int | None = None) -> int:
    """Return the most samples per forward of an evaluation.

    Args:
        limit: the most since memory ran out.

    Raises:
        UserError: ``evaluate.per_gpu`` isn't a whole number of samples.
    """
    given = config.evaluate.per_gpu
    most = plan.cut.per_gpu if given is None else in_samples(config, "evaluate.per_gpu=", given)
    return min(most, limit or most)


def check_evaluations(config: RunConfig, plan: Plan) -> None:
    """Reject what evaluations can't do.

    Raises:
        UserError: ``evaluate.per_gpu`` isn't a whole number of samples, or ``checkpoint.best`` waits for an evaluation
            that never comes.
    """
    evaluation_batch(config, plan)
    wanted, best, every = config.evaluate, config.checkpoint.best, plan.intervals.evaluate
    if not best or wanted.first or wanted.last:
        return
    never = f"checkpoint.best={best} waits for an evaluation, and evaluate.last=false with evaluate.every="
    if wanted.every is None:
        raise UserError(
            f"{never}null means that there is none",
            "give evaluate.every=1ep, or leave one of the two keys out",
            "checkpoint.best",
            best,
        )
    if every is None or plan.samples is None:
        return
    last = plan.stage_at(plan.samples - 1)
    start = plan.samples + (plan.added or 0) - last.cut.global_size
    if every > start:
        raise UserError(
            f"{never}{wanted.every} means that there is none: the run's last step begins at sample {start:,}, before "
            f"the first evaluation is due (sample {every:,})",
            "give a shorter evaluate.every, or leave evaluate.last=false out",
            "checkpoint.best",
            best,
        )
