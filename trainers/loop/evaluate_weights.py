"""``action=evaluate``: evaluate saved weights on the task's validation data, without writing anything."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from functools import partial

from isobatch.conf.rundir.directory import RunDir
from isobatch.conf.rundir.outcome import Outcome
from isobatch.conf.terminal import say
from isobatch.scaling.errors import UserError
from isobatch.scaling.planning.capabilities import check_precision
from isobatch.trainers.checkpoints.weights import initialise, load_average
from isobatch.trainers.data.validation import open_validation
from isobatch.trainers.loop.evaluate import Evaluator
from isobatch.trainers.loop.opening import EVALUATION_DEPENDS, open_task
from isobatch.trainers.model.build import prepare
from isobatch.trainers.model.randomness import Stream, seed_generators
from isobatch.trainers.ranks.failure import answer_if_read, restarts
from isobatch.trainers.ranks.session import Session, refuse_other_commands, stop_signal
from isobatch.trainers.tasks.task import make_model, make_task


def evaluate_weights(session: Session, enter: Callable[[RunDir], None]) -> Outcome:
    """Evaluate the weights of ``init_from`` on all ranks; rank 0 prints the result. Every worker runs this function.

    With ``output=json``, stdout has the result alone, and all other output goes to stderr. ``enter`` isn't called,
    because there is no run directory. Raise UserError if the config, the task or the weights can't be evaluated.
    """
    as_json, world, attempt = session.config.output == "json", session.world, session.start.attempt
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        source, values = measure_weights(session)
    if values is None:
        return Outcome("stopped", stop_signal(session.stop, world), 0, 0, attempt, restarts())
    if world.rank == 0:
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = " · ".join([*(f"{name} {value:.4f}" for name, value in values.items()), source])
        answer_if_read(json.dumps({"source": source, **finite}) if as_json else line)
    return Outcome("finished", "", 0, 0, attempt, restarts())


def measure_weights(session: Session) -> tuple[str, dict[str, float] | None]:
    """Return the source of the weights, and their values as ``val/<name>``, their average's as ``ema/<name>``.

    Task, data and model are made in the same order as in training, so that a task that draws its validation data draws
    the same. The values are None on all ranks if any rank was asked to stop.
    """
    config, world, timeout_s = session.config, session.world, session.config.cluster.timeout_s
    assert config.init_from is not None
    refuse_other_commands(config, world)
    seed_generators(config.seed)
    task = make_task(config)
    with world.patient(timeout_s):
        opened = open_task(session, task)
    if opened is None:
        return config.init_from, None
    check_precision(config, world.device.type)

    def warn(reason: str) -> None:
        if world.rank == 0:
            say(f"warning: {EVALUATION_DEPENDS}: {reason}")

    stream = Stream(config.seed, world.device, tell=warn)
    as_trained = config.model_copy(update={"compile": False, "recompute": ()})
    model = prepare(make_model(config, task), as_trained, stream, world.size).to(world.device)
    with world.patient(timeout_s):
        validation = open_validation(task, world, config.seed, config.evaluate.samples)
    if validation is None:
        raise UserError(f"task {config.task.name} has no validation data", "define val_data() in its class")
    evaluator = Evaluator(
        task, model, validation, world, stream, opened.evaluation_batch, config.precision,
        stop=session.stop, watch=session.watch, patient=partial(world.patient, timeout_s),
    )  # fmt: skip
    source = initialise(model, config.init_from, world)

    def weights() -> Iterator[tuple[str, AbstractContextManager[None]]]:
        yield "val", nullcontext()
        if load_average(model, source, world):
            yield "ema", nullcontext()

    return source, evaluator.of_weights(weights())
