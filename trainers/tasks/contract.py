"""Look at a run's data and try its task before step 1, on all ranks alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from scaling.plan import Plan
from trainers.fingerprint import fingerprint
from trainers.loader import Fetch
from trainers.look import Unseen, has_no_state, look
from trainers.rundir import Refused
from trainers.starting.notes import is_oom
from trainers.tasks import Task
from trainers.tasks.halves import Halves, halves, own_generators
from trainers.tasks.sandbox import Sandbox
from trainers.tasks.trial import Found, LossTrial, batches_of
from trainers.world import World

if TYPE_CHECKING:
    from conf.schema import RunConfig


@dataclass(frozen=True, slots=True)
class Looked:
    """What the data and the task are known by before step 1, the same on all ranks.

    Attributes:
        fingerprint: of the data; None: not to be compared.
        depends_on_hardware: why the run isn't the same on another number of ranks.
        depends_on_cut: why it isn't where its micro-batches have other sizes.
        skipped: why something couldn't be tried.
    """

    fingerprint: str | None
    depends_on_hardware: list[str]
    depends_on_cut: list[str]
    skipped: list[str]


def look_and_try(
    config: RunConfig, task: Task, data: Any, model: nn.Module, plan: Plan, world: World, beat: Callable[[], None]
) -> Looked:
    """Look at the training data, and try the contract of ``task`` where ``check.contract`` says so.

    Args:
        model: bare, as it will be trained.
        beat: called after every look and forward.

    Raises:
        Refused: the task breaks the contract; on all ranks.
    """
    fetch = Fetch(data, task, plan.seed)
    looks = world.rank == 0 and config.data.fingerprint
    works: list[Callable[[], Any]] = [partial(fingerprint, data, config.seed)] if looks else []
    if config.check.contract:
        cut = max((stage.cut for stage in plan.stages), key=lambda cut: cut.per_gpu)
        works += [partial(own_generators, fetch)]
        works += [partial(halves, fetch, *batch) for batch in batches_of(cut, len(data))]
    seen = look(works, beat, here=has_no_state(data, task))
    digits = seen.pop(0) if looks else None
    known_by = world.agree(digits if isinstance(digits, str) else "") or None
    if not config.check.contract:
        return Looked(known_by, [], [], [])
    unseen = next((one.why for one in seen if isinstance(one, Unseen)), "")
    if any(world.gather(unseen)):
        return Looked(known_by, [], [], [f"a sample couldn't be fetched: {unseen}"])
    own, *batches = seen
    found = _tried(LossTrial(Sandbox(task, model, world.device, config.seed, beat), model.train), batches)
    return _agreed(world, known_by, own, found)


def _tried(trial: LossTrial, batches: list[Halves]) -> Found:
    if not batches:
        return Found(skipped="a micro-batch has one sample, so there is nothing to compare; a larger batch.per_gpu has")
    try:
        return trial.run(batches)
    except Refused as error:
        return Found(rejected=str(error))
    except Exception as error:
        why = "memory ran out" if is_oom(error) else f"task.loss failed: {type(error).__name__}: {error}"
        return Found(skipped=why)


def _agreed(world: World, known_by: str | None, own: list[str], found: Found) -> Looked:
    """What all ranks found. Raises Refused, on all of them, where one rejects the task."""
    everyone = [Found(**json.loads(text)) for text in world.gather(json.dumps(asdict(found)))]
    if rejected := next((one.rejected for one in everyone if one.rejected), ""):
        raise Refused(rejected)
    first = next((one for one in everyone if one.depends), found)  # the numbers in it may be others on each rank
    counters = dict.fromkeys(reason for one in everyone for reason in one.counters)
    skipped = dict.fromkeys(one.skipped for one in everyone if one.skipped)
    return Looked(known_by, [*own, *counters], first.depends, list(skipped))
