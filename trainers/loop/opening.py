"""Open the data of a run, and make the plan for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from isobatch.scaling.plan import Plan
from isobatch.scaling.planning.resolve import resolve
from isobatch.scaling.planning.sizes import evaluation_batch
from isobatch.trainers.ranks.session import Session, refuse_unless_same
from isobatch.trainers.tasks.prepare import prepare_data
from isobatch.trainers.tasks.task import Task, open_data

if TYPE_CHECKING:
    from isobatch.conf.schema import RunConfig


@dataclass(frozen=True, slots=True)
class Opened:
    """Hold a task whose training data is open.

    Attributes:
        data: map-style, of the same length on all ranks.
        evaluation_batch: the most samples in a forward of an evaluation.
    """

    task: Task
    data: Any
    plan: Plan
    evaluation_batch: int


def open_task(session: Session, task: Task) -> Opened | None:
    """Prepare and open the training data of ``task``, and make the plan; all ranks call this alike.

    Returns:
        None, on all ranks, where some rank was asked to stop before.

    Raises:
        UserError: the data can't be used, or no plan meets the config.
    """
    config, world, limit = session.config, session.world, session.start.per_gpu_limit
    if prepare_data(task, world, session.stop, config.cluster.timeout_s):
        return None
    data = open_data(task, config)
    refuse_unless_same(world, "the number of samples that train_data() has", len(data))
    plan = plan_of(config, world.size, len(data), limit)
    return Opened(task, data, plan, evaluation_batch(config, plan, limit))


def plan_of(config: RunConfig, world: int, train_samples: int | None, per_gpu_limit: int | None = None) -> Plan:
    """Return the plan of ``config`` for ``world`` ranks.

    Args:
        per_gpu_limit: the most samples in a pass, where memory asks for fewer than the config. It may be of an
            evaluation, and then below what a micro-batch can be.

    Raises:
        UserError: no plan meets the config.
    """
    plan = resolve(config, world, train_samples)
    most = max(per_gpu_limit, plan.granule) if per_gpu_limit else None
    if most and config.numerics != "bitwise" and most < max(stage.cut.per_gpu for stage in plan.stages):
        return plan.dealt(world, most)
    return plan
