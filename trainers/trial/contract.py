"""Inspect a run's data and try its task before step 1, with the same outcome on all ranks."""

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
from isobatch.trainers.loop.opening import MEASURES_DEPEND, RUN_DEPENDS, Opened, report_dependence
from isobatch.trainers.model.modes import Modes
from isobatch.trainers.model.randomness import Stream
from isobatch.trainers.ranks.failure import is_oom
from isobatch.trainers.ranks.session import raise_on_all
from isobatch.trainers.ranks.watch import Watch
from isobatch.trainers.ranks.world import World
from isobatch.trainers.trial.evaluation import own_generators_of_validation, try_evaluation, validation_halves
from isobatch.trainers.trial.halves import halves, own_generators
from isobatch.trainers.trial.sandbox import Sandbox
from isobatch.trainers.trial.training import Found, batches_of, try_loss

if TYPE_CHECKING:
    from isobatch.conf.schema import RunConfig


TOO_FEW = Found(skipped="a micro-batch has only one sample, which can't be halved; use a larger batch.per_gpu")


@dataclass(frozen=True, slots=True)
class Looked:
    """Hold the findings about the data and the task before step 1, the same on all ranks.

    Attributes:
        fingerprint: fingerprint of the data; None: it can't be compared.
        depends_on_hardware: reasons why the run changes with the number of ranks.
        depends_on_cut: reasons why the run changes with the sizes of micro-batches.
        measures_depend: reasons why measures of the loss change with the sizes of micro-batches.
        evaluation_depends: reasons why evaluations change with the sizes of their batches.
        skipped: reasons why a part of the trial was skipped.
        failed: what failed in the trial and would in step 1, whose error says more; empty if nothing did.
    """

    fingerprint: str | None
    depends_on_hardware: list[str]
    depends_on_cut: list[str]
    measures_depend: list[str]
    evaluation_depends: list[str]
    skipped: list[str]
    failed: str = ""


def look_and_try(
    opened: Opened, model: nn.Module, validation: Validation | None, config: RunConfig, world: World, watch: Watch
) -> Looked:
    """Take the fingerprint of the data and, with ``check.contract``, try the task.

    Args:
        model: the bare model that will be trained.
        watch: gets a heartbeat after every fetch and forward. Fetches and ``summarise`` have no time limit.

    Raises:
        UserError: the task breaks the contract; on all ranks.
    """
    wanted = config.check.contract and not config.debug  # the trial would hit the breakpoints of a debug run
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
    unseen = [sample for sample in seen.values() if isinstance(sample, Unseen)]
    raise_on_all(world, next((UserError(*one.refused) for one in unseen if one.refused), None))
    reason = next(filter(None, world.gather(unseen[0].why if unseen else "")), "")
    if reason or not wanted:
        failed = f"a sample couldn't be fetched in it, but could in training: {reason}" if reason else ""
        return Looked(known_by, [], [], [], [], [], failed)
    sandbox = Sandbox(task, model, world.device, config.seed, watch.beat)
    batches = [seen[name] for name in seen if name.startswith("batch ")]
    of_loss, of_evaluation = TOO_FEW, Found()
    if batches:
        of_loss = _agreed(world, partial(try_loss, sandbox, batches, Modes(model).train))
    if validation:
        with watch.excused() if task.has("summarise") else nullcontext():
            trial = partial(try_evaluation, sandbox, seen["validation"], config.precision)
            of_evaluation = _agreed(world, trial)
    failed = f"task.summarise failed in this trial, and may fail in training: {of_evaluation.failed}"
    skipped = (of_loss.skipped, of_evaluation.skipped, failed if of_evaluation.failed else "")
    return Looked(
        known_by,
        depends_on_hardware=[*seen["own"], *of_loss.counters],
        depends_on_cut=of_loss.depends,
        measures_depend=of_loss.logged,
        evaluation_depends=[*seen.get("own of validation", []), *of_evaluation.depends],
        skipped=[reason for reason in skipped if reason],
        failed=f"task.loss failed in it, and not in training: {of_loss.failed}" if of_loss.failed else "",
    )


def announce(looked: Looked, run: RunDir | None, stream: Stream) -> None:
    """Print the findings, and record them in the events of ``run``."""
    for reason in looked.depends_on_hardware:
        report_dependence(run, RUN_DEPENDS, reason)
    for reason in looked.depends_on_cut:
        stream.tell(reason)
    for reason in looked.measures_depend:
        report_dependence(run, MEASURES_DEPEND, reason)
    for reason in looked.evaluation_depends:
        stream.tell_of_evaluation(reason)
    for reason in looked.skipped:
        _announce_skipped(reason, run)


def announce_failed(looked: Looked, run: RunDir | None) -> None:
    """Report what failed in the trial, after a step in which it didn't; else the step's own error tells."""
    if looked.failed:
        _announce_skipped(looked.failed, run)


def _announce_skipped(reason: str, run: RunDir | None) -> None:
    tell(run, "trial_skipped", f"the trial of the task before step 1 was incomplete: {reason}", reason=reason)


def _looks(opened: Opened, validation: Validation | None) -> dict[str, Callable[[], Any]]:
    """Return the functions that fetch samples for the trial, by name."""
    fetch = Fetch(opened.data, opened.task, opened.plan.seed)
    cut = max((stage.cut for stage in opened.plan.stages), key=lambda cut: cut.per_gpu)
    batches = {f"batch {batch[0]}": partial(halves, fetch, *batch) for batch in batches_of(cut, fetch.length)}
    looks: dict[str, Callable[[], Any]] = {"own": partial(own_generators, fetch), **batches}
    if validation:
        looks["own of validation"] = partial(own_generators_of_validation, validation)
        looks["validation"] = partial(validation_halves, validation, opened.evaluation_batch)
    return looks


def _agreed(world: World, trial: Callable[[], Found]) -> Found:
    """Run ``trial`` on all ranks and return one rank's findings. Raises UserError on all ranks if any rank rejects."""
    found, error = Found(), None
    try:
        found = trial()
    except UserError as caught:
        error = caught
    except Exception as caught:
        found = Found(failed="memory ran out" if is_oom(caught) else f"{type(caught).__name__}: {caught}")
    raise_on_all(world, error)
    findings = [Found(**json.loads(text)) for text in world.gather(json.dumps(asdict(found)))]
    return next((finding for finding in findings if finding != Found()), found)  # numbers may differ between ranks
