"""Open the data of a run, make the plan for it, and report before step 1."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from isobatch.conf.messages import shown
from isobatch.conf.rundir.directory import RunDir
from isobatch.conf.rundir.outcome import Outcome
from isobatch.conf.terminal import say, say_if_slow
from isobatch.scaling.errors import UserError
from isobatch.scaling.geometry import counted
from isobatch.scaling.noise import unmeasurable
from isobatch.scaling.plan import Plan
from isobatch.scaling.planning.advice import lr_jump
from isobatch.scaling.planning.resolve import resolve
from isobatch.scaling.planning.sizes import evaluation_batch
from isobatch.trainers.checkpoints.weights import listed
from isobatch.trainers.data.state import TrainState
from isobatch.trainers.loop.metrics import tell
from isobatch.trainers.model.batchnorm import Counting
from isobatch.trainers.model.build import of_micro_batches
from isobatch.trainers.model.modes import Modes
from isobatch.trainers.model.randomness import Stream
from isobatch.trainers.ranks.session import Session, refuse_unless_same
from isobatch.trainers.tasks.prepare import prepare_data
from isobatch.trainers.tasks.task import Task, open_data
from isobatch.trainers.tensors.manifest import Checkpoint

if TYPE_CHECKING:
    from isobatch.conf.schema import RunConfig

RUN_DEPENDS = "this run isn't the same on other hardware or another batch.per_gpu"
MEASURES_DEPEND = "measures of the loss aren't the same on other hardware or another batch.per_gpu"
EVALUATION_DEPENDS = "the values of evaluations aren't the same on other hardware or another evaluate.per_gpu"


@dataclass(frozen=True, slots=True)
class Opened:
    """Hold a task and its open training data.

    Attributes:
        data: map-style dataset, of the same length on all ranks.
        evaluation_batch: the most samples in a forward of an evaluation.
    """

    task: Task
    data: Any
    plan: Plan
    evaluation_batch: int


def open_task(session: Session, task: Task) -> Opened | None:
    """Prepare and open the training data of ``task``, and make the plan; called by all ranks.

    Return None on all ranks if any rank was asked to stop. Raise UserError if the data or the config is invalid.
    """
    config, world, limit = session.config, session.world, session.start.per_gpu_limit
    if prepare_data(task, world, session.stop, config.cluster.timeout_s):
        return None
    with say_if_slow("opening the data …") if world.rank == 0 else nullcontext():
        data = open_data(task, config)
    refuse_unless_same(world, "the number of samples that train_data() has", len(data))
    plan = plan_of(config, world.size, len(data), limit)
    return Opened(task, data, plan, evaluation_batch(config, plan, limit))


def plan_of(
    config: RunConfig,
    world: int,
    train_samples: int | None,
    per_gpu_limit: int | None = None,
    measured: int | None = None,
) -> Plan:
    """Return the plan of ``config`` for ``world`` ranks.

    Args:
        measured: the per-GPU batch of batch.per_gpu=auto, in samples; None: not measured yet.
        per_gpu_limit: the most samples in a pass that fit in memory, if fewer than the config's. An evaluation may
            have set it below the smallest micro-batch.

    Raises:
        UserError: no plan meets the config.
    """
    plan = resolve(config, world, train_samples)
    if measured:
        plan = plan.dealt(world, measured)
    most = max(per_gpu_limit, plan.granule) if per_gpu_limit else None
    if most and config.numerics != "bitwise" and most < max(stage.cut.per_gpu for stage in plan.stages):
        return plan.dealt(world, most)
    return plan


def report_dependence(run: RunDir | None, message: str, reason: str) -> None:
    """Report ``message``, RUN_DEPENDS or the like, with its reason; do nothing if ``run`` is None."""
    tell(run, "depends_on_cut", f"{message}: {reason}", reason=reason)


def make_stream(session: Session, run: RunDir | None) -> Stream:
    """Return the stream of random keys, which reports in ``run`` why the run depends on its cut."""
    fixed_cut = session.config.numerics == "bitwise"
    return Stream(
        session.config.seed,
        session.world.device,
        partial(report_dependence, None if fixed_cut else run, RUN_DEPENDS),
        partial(report_dependence, run, EVALUATION_DEPENDS),
    )


def announce_position(
    run: RunDir, state: TrainState, found: Checkpoint | None, before: Outcome | None, weights_from: str | None
) -> None:
    """Report where training starts: at a checkpoint, again at step 0, or with the weights of ``init_from``."""
    if before and before.state == "finished" and before.cause:
        say(f"this run had ended early, at step {before.step}, by {before.cause}; it continues")
    if found:
        run.event("going_on", checkpoint=found.path.name, step=state.steps, samples=state.samples)
        say(f"resuming from step {state.steps} of {state.plan.steps} (checkpoints/{found.path.name})")
    elif before and before.state != "refused":
        say("restarting from step 0: the last attempt ended before its first checkpoint")
    if weights_from:
        run.event("initialised", source=weights_from)
        say(f"weights from {weights_from}")


def announce_frozen(run: RunDir, modes: Modes) -> None:
    """Report the submodules that stay in eval mode."""
    if modes.frozen:
        names = list(modes.frozen)
        run.event("frozen", eval_mode=names)
        say(f"in eval mode, as model() returned it: {listed(names)}")


def refuse_without_validation(config: RunConfig) -> None:
    """Raise UserError if the config needs validation data; called if there is none."""
    asked = {"checkpoint.best": config.checkpoint.best, "evaluate.first": config.evaluate.first}
    for key, value in {**asked, "stop.when": config.stop.when, "stop.at": config.stop.at}.items():
        if value:
            problem = f"{key}={shown(value)} needs validation data, but task {config.task.name} has no val_data()"
            raise UserError(problem, "leave it out, or define val_data()", key, value)


def warnings(config: RunConfig, model: nn.Module, state: TrainState, found: Checkpoint | None) -> Iterator[str]:
    """Yield the warnings that are due before step 1."""
    if found and (jump := lr_jump(found.header.plan, state.plan, state.samples)):
        yield jump
    if found and found.header.tally is None:
        yield f"time_s and units count from step {state.steps}: its checkpoint is from a version that didn't count them"
    if config.noise.every and (reason := unmeasurable(state.plan)):
        yield reason
    if config.noise.every and config.noise.parts and (layers := of_micro_batches(model)):
        take = f"{counted(len(layers), 'BatchNorm layer')} {'take' if len(layers) > 1 else 'takes'} statistics"
        changes = (
            f"noise.parts=2 halves the passes from which {take}, so a measured step isn't that of an unmeasured run"
        )
        yield f"{changes}; use batchnorm.mode=ghost, or noise.parts=null"
    if config.batchnorm.mode and not any(isinstance(module, Counting) for module in model.modules()):
        yield f"batchnorm.mode={config.batchnorm.mode}, but the model trains no BatchNorm layer: leave it out"
