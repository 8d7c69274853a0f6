"""Look at a run's data and try its task before step 1, on all ranks alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from isobatch.conf.rundir.directory import RunDir
from isobatch.scaling.errors import UserError
from isobatch.trainers.data.fetch import Fetch
from isobatch.trainers.data.fingerprint import fingerprint
from isobatch.trainers.data.look import Unseen, has_no_state, look
from isobatch.trainers.data.validation import Validation
from isobatch.trainers.loop.metrics import tell
from isobatch.trainers.loop.opening import RUN_DEPENDS, Opened, report_dependence
from isobatch.trainers.model.modes import Modes
from isobatch.trainers.model.randomness import Stream
from isobatch.trainers.ranks.failure import is_oom
from isobatch.trainers.ranks.watch import Watch
from isobatch.trainers.ranks.world import World
from isobatch.trainers.trial.evaluation import own_generators_of_validation, try_evaluation, validation_halves
from isobatch.trainers.trial.halves import halves, own_generators
from isobatch.trainers.trial.sandbox import Sandbox
from isobatch.trainers.trial.training import Found, batches_of, try_loss

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


def look_and_try(
    opened: Opened, model: nn.Module, validation: Validation | None, config: RunConfig, world: World, watch: Watch
) -> Looked:
    """Look at the data, and try the contract of the task where ``check.contract`` says so.

    Args:
        model: bare, as it will be trained.
        watch: told of every look and forward. Looking at data, and ``summarise``, may take their time.

    Raises:
        UserError: the task breaks the contract; on all ranks.
    """
    wanted = config.check.contract and not config.debug  # which is for breakpoints, and they would be met here
    works: dict[str, Callable[[], Any]] = {}
    if world.rank == 0 and config.data.fingerprint:
        works["fingerprint"] = partial(fingerprint, opened.data, config.seed)
    if wanted:
        works |= _looks(opened, validation)
    task = opened.task
    here = has_no_state(opened.data, task) and (validation is None or has_no_state(validation.data, task))
    with watch.excused():
        seen = dict(zip(works, look(list(works.values()), watch.beat, here=here), strict=True))
    digits = seen.get("fingerprint")
    known_by = world.agree(digits if isinstance(digits, str) else "") or None
    unseen = next((one.why for one in seen.values() if isinstance(one, Unseen)), "")
    if any(reasons := world.gather(unseen)) or not wanted:
        return Looked(known_by, [], [], [], [f"a sample couldn't be fetched: {why}" for why in reasons if why][:1])
    sandbox = Sandbox(task, model, world.device, config.seed, watch.beat)
    batches = [seen[name] for name in seen if name.startswith("batch ")]
    of_loss, of_evaluation = TOO_FEW, Found()
    if batches:
        of_loss = _agreed(world, "loss", partial(try_loss, sandbox, batches, Modes(model).train))
    if validation:
        with watch.excused() if task.has("summarise") else nullcontext():
            trial = partial(try_evaluation, sandbox, seen["validation"], config.precision)
            of_evaluation = _agreed(world, "summarise", trial)
    return Looked(
        known_by,
        depends_on_hardware=[*seen["own"], *of_loss.counters],
        depends_on_cut=of_loss.depends,
        evaluation_depends=[*seen.get("own of validation", []), *of_evaluation.depends],
        skipped=[found.skipped for found in (of_loss, of_evaluation) if found.skipped],
    )


def announce(looked: Looked, run: RunDir | None, stream: Stream) -> None:
    """Say what was found, and keep it in the events of ``run``."""
    for reason in looked.depends_on_hardware:
        report_dependence(run, RUN_DEPENDS, reason)
    for reason in looked.depends_on_cut:
        stream.tell(reason)
    for reason in looked.evaluation_depends:
        stream.tell_of_evaluation(reason)
    for reason in looked.skipped:
        tell(run, "trial_skipped", f"before step 1 the task could only be tried in part: {reason}", reason=reason)


def _looks(opened: Opened, validation: Validation | None) -> dict[str, Callable[[], Any]]:
    """Return what fetches samples for the trial, by name."""
    fetch = Fetch(opened.data, opened.task, opened.plan.seed)
    cut = max((stage.cut for stage in opened.plan.stages), key=lambda cut: cut.per_gpu)
    batches = {f"batch {batch[0]}": partial(halves, fetch, *batch) for batch in batches_of(cut, fetch.length)}
    looks: dict[str, Callable[[], Any]] = {"own": partial(own_generators, fetch), **batches}
    if validation:
        looks["own of validation"] = partial(own_generators_of_validation, validation)
        looks["validation"] = partial(validation_halves, validation, opened.evaluation_batch)
    return looks


def _agreed(world: World, what: str, trial: Callable[[], Found]) -> Found:
    """Return what some rank found. Raises UserError, on all ranks, where one of them rejects the task."""
    try:
        found = trial()
    except UserError as error:
        found = Found(rejected=str(error))
    except Exception as error:
        why = "memory ran out" if is_oom(error) else f"{type(error).__name__}: {error}"
        found = Found(skipped=f"task.{what} failed in this trial, and may fail in training: {why}")
    everyone = [Found(**json.loads(text)) for text in world.gather(json.dumps(asdict(found)))]
    if rejected := next((one.rejected for one in everyone if one.rejected), ""):
        raise UserError(rejected)
    return next((one for one in everyone if one != Found()), found)  # numbers in it may be others on each rank
