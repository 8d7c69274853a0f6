"""``action=evaluate``: weights that lie in files, on the task's validation data. Nothing is written."""

from __future__ import annotations

import json
import math
import sys
from contextlib import nullcontext, redirect_stdout
from functools import partial
from typing import TYPE_CHECKING

from isobatch.conf.rundir.directory import Fatal, Outcome
from isobatch.conf.terminal import Unwritable, answer, say
from isobatch.scaling.errors import UserError
from isobatch.scaling.planning.evaluations import evaluation_batch
from isobatch.trainers.checkpoints.weights import initialise, load_average
from isobatch.trainers.data.validation import open_validation
from isobatch.trainers.loop.claim import refuse_other_commands, refuse_unless_same
from isobatch.trainers.loop.evaluate import Evaluator
from isobatch.trainers.model.build import make_model, prepare
from isobatch.trainers.model.precision import check_precision
from isobatch.trainers.model.randomness import Stream, seed_generators
from isobatch.trainers.ranks.notes import restarts
from isobatch.trainers.ranks.signals import Stop
from isobatch.trainers.ranks.world import World
from isobatch.trainers.run import evaluation_depends_on_cut, plan_of, stop_cause
from isobatch.trainers.tasks.prepare import prepare_data, without_hurry
from isobatch.trainers.tasks.task import make_task, open_data

if TYPE_CHECKING:
    from isobatch.conf.schema import RunConfig


def evaluate_weights(config: RunConfig, facts: dict[str, str], world: World, stop: Stop) -> Outcome:
    """The body of every worker, the same on all ranks: evaluate the weights of ``init_from``; rank 0 prints the result.

    With ``output=json`` it alone is printed to stdout; what else would be goes to stderr.

    Args:
        facts: ``attempt``, and perhaps ``per_gpu_limit``; the same on all ranks.

    Returns:
        ``finished`` or ``stopped``, the same on all ranks.

    Raises:
        UserError: what the user gave can't work.
    """
    as_json = config.output == "json"
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        source, values = measured(config, facts, world, stop)
    if values is None:
        return Outcome("stopped", stop_cause(stop, world), 0, 0, facts["attempt"], restarts())
    if world.rank == 0:
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = " · ".join([*(f"{name} {value:.4f}" for name, value in values.items()), source])
        try:
            answer(json.dumps({"source": source, **finite}) if as_json else line)
        except Unwritable as error:
            if str(error):  # else whoever read this has left
                raise Fatal(str(error)) from None
    return Outcome("finished", "", 0, 0, facts["attempt"], restarts())


def _warn(world: World, reason: str) -> None:
    if world.rank == 0:
        say(f"warning: {evaluation_depends_on_cut(reason)}")


def measured(config: RunConfig, facts: dict[str, str], world: World, stop: Stop) -> tuple[str, dict[str, float] | None]:
    """Where the weights are from, and their values as ``val/<name>``, those of their moving average as ``ema/<name>``.

    All is made in the order that training makes it in, so that a task which draws its validation data draws the same.
    The values are None, on all ranks, where some rank was asked to stop meanwhile.
    """
    assert config.init_from is not None
    refuse_other_commands(config, world)
    seed_generators(config.seed)
    task, timeout_s = make_task(config), config.cluster.timeout_s
    with world.patient(timeout_s):
        if prepare_data(task, world, stop, timeout_s):
            return config.init_from, None
        data = open_data(task, config)
        refuse_unless_same(world, "the number of samples that train_data() has", len(data))
    check_precision(config.precision, world.device)
    limit = int(facts["per_gpu_limit"]) if "per_gpu_limit" in facts else None
    per_gpu = evaluation_batch(config, plan_of(config, world.size, len(data), limit), limit)
    stream = Stream(config.seed, world.device, tell=partial(_warn, world))
    as_trained = config.model_copy(update={"compile": False, "recompute": ()})
    model = prepare(make_model(config, task), as_trained, stream, world.size).to(world.device)
    without_hurry(task, world, partial(world.patient, timeout_s))
    with world.patient(timeout_s):
        validation = open_validation(task, world, config.seed, config.evaluate.samples)
    if validation is None:
        raise UserError(f"task {config.task.name} has no validation data to evaluate on: its class needs val_data()")
    evaluate = Evaluator(task, model, validation, world, stream, per_gpu, config.precision, stop=stop)
    source = initialise(model, config.init_from, world)
    found: dict[str, float] = {}
    for kind in ("val", "ema"):
        if kind == "ema" and not load_average(model, source, world):
            break
        values = evaluate()
        if values is None:
            return source, None
        found |= {f"{kind}/{name}": value for name, value in values.items()}
    return source, found
