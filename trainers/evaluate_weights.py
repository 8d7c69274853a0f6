"""``action=evaluate``: weights that lie in files, on the task's validation data. Nothing is written."""

from __future__ import annotations

import json
import math
import sys
from contextlib import nullcontext, redirect_stdout, suppress
from typing import TYPE_CHECKING

from trainers.enter import refuse_other_commands
from trainers.evaluate import make_evaluate
from trainers.keyed import seed_generators
from trainers.model import make_model
from trainers.precision import check_precision
from trainers.run import plan_of, stop_cause
from trainers.rundir import Outcome, Refused
from trainers.starting.notes import restarts
from trainers.stop import Stop
from trainers.tasks import make_task, open_data
from trainers.weights import initialise, load_average
from trainers.world import World

if TYPE_CHECKING:
    from conf.schema import RunConfig


def evaluate_weights(config: RunConfig, facts: dict[str, str], world: World, stop: Stop) -> Outcome:
    """The body of every worker, the same on all ranks: evaluate the weights of ``init_from``; rank 0 prints the result.

    With ``output=json`` it alone is printed to stdout; what else would be goes to stderr.

    Args:
        facts: ``attempt``, and perhaps ``per_gpu_limit``; the same on all ranks.

    Returns:
        ``finished`` or ``stopped``, the same on all ranks.

    Raises:
        Refused: what the user gave can't work.
    """
    as_json = config.output == "json"
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        source, values = measured(config, facts, world, stop)
    if values is None:
        return Outcome("stopped", stop_cause(stop, world), 0, 0, facts["attempt"], restarts())
    if world.rank == 0:
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = " · ".join([*(f"{name} {value:.4f}" for name, value in values.items()), source])
        with suppress(BrokenPipeError):
            print(json.dumps({"source": source, **finite}) if as_json else line, flush=True)
    return Outcome("finished", "", 0, 0, facts["attempt"], restarts())


def measured(config: RunConfig, facts: dict[str, str], world: World, stop: Stop) -> tuple[str, dict[str, float] | None]:
    """Where the weights are from, and their values as ``val/<name>``, those of their moving average as ``ema/<name>``.

    All is made in the order that training makes it in, so that a task which draws its validation data draws the same.
    The values are None, on all ranks, where some rank was asked to stop meanwhile.
    """
    assert config.init_from is not None
    refuse_other_commands(config, world)
    seed_generators(config.seed)
    task = make_task(config)
    data = open_data(task, config)
    check_precision(config.precision, world.device)
    per_gpu = plan_of(config, world.size, len(data), facts.get("per_gpu_limit")).cut.per_gpu
    model = make_model(config, task).to(world.device)
    evaluate = make_evaluate(task, model, world, per_gpu, stop, precision=config.precision)
    if evaluate is None:
        raise Refused(f"task {config.task.name} has no validation data to evaluate on: its class needs val_data()")
    source = initialise(model, config.init_from, world)
    found: dict[str, float] = {}
    try:
        for kind in ("val", "ema"):
            if kind == "ema" and not load_average(model, source, world):
                break
            values = evaluate()
            if values is None:
                return source, None
            found |= {f"{kind}/{name}": value for name, value in values.items()}
    except Exception as error:
        error.per_gpu = per_gpu  # type: ignore[attr-defined]  # with fewer samples at once, memory may suffice
        raise
    return source, found
