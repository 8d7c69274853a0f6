"""Look at a run's data and try its task before step 1, on all ranks alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from isobatch.scaling.errors import UserError
from isobatch.scaling.plan import Plan
from isobatch.trainers.data.fetch import Fetch
from isobatch.trainers.data.fingerprint import fingerprint
from isobatch.trainers.data.look import Unseen, has_no_state, look
from isobatch.trainers.data.validation import Validation
from isobatch.trainers.model.modes import Modes
from isobatch.trainers.ranks.failure import is_oom
from isobatch.trainers.ranks.watch import Watch
from isobatch.trainers.ranks.world import World
from isobatch.trainers.tasks.task import Task
from isobatch.trainers.trial.evaluation import EvaluationTrial, own_generators_of_validation, validation_halves
from isobatch.trainers.trial.halves import halves, own_generators
from isobatch.trainers.trial.sandbox import Sandbox
from isobatch.trainers.trial.training import Found, LossTrial, batches_of

if TYPE_CHECKING:
    from isobatch.conf.schema import RunConfig


TOO_FEW = Found(skipped="a micro-batch has one sample, so there is nothing to compare; a larger batch.per_gpu has more")


@dataclass(frozen=True, slots=True)
class Looked:
    """Hold what was found in the data and the task before step 1, the same on all ranks.

    Attributes:
        fingerprint: of the data; None: it can't be compared.
        depends_on_hardware: why the run isn't the same on another number of ranks.
        depends_on_cut: why the run isn't the same with micro-batches of other sizes.
        evaluation_depends: why the values of evaluations aren't the same with batches of other sizes.
        skipped: why something couldn't be tried.
    """

    fingerprint: str | None
    depends_on_hardware: list[str]
    depends_on_cut: list[str]
    evaluation_depends: list[str]
    skipped: list[str]


@dataclass(frozen=True, slots=True)
class Subject:
    """Hold what is looked at and tried.

    Attributes:
        model: bare, as it will be trained.
        data, validation: of training, and of evaluations; None: there are none.
        evaluation_batch: samples of an evaluation's forward, at most.
    """

    task: Task
    model: nn.Module
    data: Any
    validation: Validation | None
    plan: Plan
    evaluation_batch: int


def look_and_try(subject: Subject, config: RunConfig, world: World, watch: Watch) -> Looked:
    """Look at the data, and try the contract of the task where ``check.contract`` says so.

    Args:
        watch: told of every look and forward. Looking at data, and ``summarise``, may take their time.

    Raises:
        UserError: the task breaks the contract; on all ranks.
    """
    wanted = config.check.contract and not config.debug  # which is for breakpoints, and they would be met here
    with watch.excused():
        seen = _seen(subject, wanted, config, world, watch)
    digits = seen.get("fingerprint")
    known_by = world.agree(digits if isinstance(digits, str) else "") or None
    unseen = next((one.why for one in seen.values() if isinstance(one, Unseen)), "")
    if any(reasons := world.gather(unseen)) or not wanted:
        return Looked(known_by, [], [], [], [f"a sample couldn't be fetched: {why}" for why in reasons if why][:1])
    sandbox = Sandbox(subject.task, subject.model, world.device, config.seed, watch.beat)
    batches = [seen[name] for name in seen if name.startswith("batch ")]
    loss = LossTrial(sandbox, Modes(subject.model).train)
    of_loss = _agreed(world, _tried("loss", lambda: loss.run(batches)) if batches else TOO_FEW)
    of_evaluation = Found()
    if subject.validation:
        evaluation = EvaluationTrial(sandbox, config.precision, world.device)
        with watch.excused() if subject.task.has("summarise") else nullcontext():
            of_evaluation = _agreed(world, _tried("summarise", lambda: evaluation.run(seen["validation"])))
    return Looked(
        known_by,
        depends_on_hardware=[*seen["own"], *of_loss.counters],
        depends_on_cut=of_loss.depends,
        evaluation_depends=[*seen.get("own of validation", []), *of_evaluation.depends],
        skipped=[found.skipped for found in (of_loss, of_evaluation) if found.skipped],
    )


def _seen(subject: Subject, wanted: bool, config: RunConfig, world: World, watch: Watch) -> dict[str, Any]:
    """Look at the data, in one process for all looks; return what each look saw, or why it saw nothing, by name."""
    task, data, validation = subject.task, subject.data, subject.validation
    works: dict[str, Callable[[], Any]] = {}
    if world.rank == 0 and config.data.fingerprint:
        works["fingerprint"] = partial(fingerprint, data, config.seed)
    if wanted:
        fetch = Fetch(data, task, subject.plan.seed)
        cut = max((stage.cut for stage in subject.plan.stages), key=lambda cut: cut.per_gpu)
        works["own"] = partial(own_generators, fetch)
        works |= {f"batch {batch[0]}": partial(halves, fetch, *batch) for batch in batches_of(cut, len(data))}
        if validation:
            works["own of validation"] = partial(own_generators_of_validation, validation)
            works["validation"] = partial(validation_halves, validation, subject.evaluation_batch)
    here = has_no_state(data, task) and (validation is None or has_no_state(validation.data, task))
    return dict(zip(works, look(list(works.values()), watch.beat, here=here), strict=True))


def _tried(what: str, trial: Callable[[], Found]) -> Found:
    try:
        return trial()
    except UserError as error:
        return Found(rejected=str(error))
    except Exception as error:
        why = "memory ran out" if is_oom(error) else f"{type(error).__name__}: {error}"
        return Found(skipped=f"task.{what} failed in this trial, and may fail in training: {why}")


def _agreed(world: World, found: Found) -> Found:
    """Return what some rank found. Raises UserError, on all ranks, where one of them rejects the task."""
    everyone = [Found(**json.loads(text)) for text in world.gather(json.dumps(asdict(found)))]
    if rejected := next((one.rejected for one in everyone if one.rejected), ""):
        raise UserError(rejected)
    return next((one for one in everyone if one != Found()), found)  # numbers in it may be others on each rank
