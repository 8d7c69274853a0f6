"""``action=tune``: measure what each part asks for, and recommend a batch. Every worker runs this function."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

from isobatch.conf.rundir.directory import RunDir
from isobatch.conf.rundir.lock import hold
from isobatch.conf.rundir.outcome import Outcome
from isobatch.conf.terminal import answer, say
from isobatch.scaling.errors import UserError
from isobatch.scaling.tuning.results import Results
from isobatch.trainers.data.validation import open_validation
from isobatch.trainers.loop.opening import open_task
from isobatch.trainers.model.randomness import Stream, seed_generators
from isobatch.trainers.ranks.failure import restarts
from isobatch.trainers.ranks.session import Session, raise_on_all, refuse_other_commands, stop_signal
from isobatch.trainers.tasks.task import make_task
from isobatch.trainers.tuning import speed
from isobatch.trainers.tuning.bench import Bench, Interrupted


def tune(session: Session, enter: Callable[[RunDir], None]) -> Outcome:
    """Measure the parts of ``tune.parts``, store each in ``tune/tune.json``, and print a recommendation on rank 0.

    With ``output=json``, stdout has the content of that file alone. ``enter`` isn't called: nothing is trained in the
    run directory.

    Raises:
        UserError: the config or the task can't be measured.
    """
    world, attempt = session.world, session.start.attempt
    as_json = session.config.output == "json"
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        results = begin(session)
        bench = open_bench(session)
        done = bench is not None and measured(bench, results)
    if not done:
        return Outcome("stopped", stop_signal(session.stop, world), 0, 0, attempt, restarts())
    if world.rank == 0:
        answer(results.json() if as_json else f"written to {results.file}")
    return Outcome("finished", "", 0, 0, attempt, restarts())


def begin(session: Session) -> Results:
    """Lock the folder of the results on rank 0, and return the results so far on all ranks."""
    world, start = session.world, session.start
    refuse_other_commands(session.config, world)
    path, error, results = Path(start.run_dir), None, None
    if world.rank == 0:
        try:
            results = Results(path)
            results.folder.mkdir(parents=True, exist_ok=True)
            hold(RunDir(results.folder).lock(start.job, start.job_restart, start.attempt, start.launches).file)
        except (UserError, OSError) as caught:
            error = caught if isinstance(caught, UserError) else UserError(f"{path} can't be written: {caught}")
    raise_on_all(world, error)
    parts = json.loads(world.agree(json.dumps(results.parts if results else None)))
    results = results or Results(path)
    results.parts = parts
    return results


def open_bench(session: Session) -> Bench | None:
    """Open the task and its data; return None on all ranks if any rank was asked to stop."""
    config, world, timeout_s = session.config, session.world, session.config.cluster.timeout_s
    seed_generators(config.seed)
    task = make_task(config)
    with world.patient(timeout_s):
        opened = open_task(session, task)
    if opened is None:
        return None
    with world.patient(timeout_s):
        validation = open_validation(task, world, config.seed, config.evaluate.samples)
    stream = Stream(config.seed, world.device, lambda reason: None, lambda reason: None)
    return Bench(session, opened, stream, validation, say if world.rank == 0 else lambda text: None)


def measured(bench: Bench, results: Results) -> bool:
    """Measure each part that isn't stored yet; return False on all ranks if any rank was asked to stop."""
    world = bench.session.world
    try:
        for part in bench.config.tune.parts:
            found: dict[str, Any] = PARTS[part](bench)
            if world.rank == 0:
                results.put(part, found)
    except Interrupted:
        return False
    return True


def measure_speed(bench: Bench) -> dict[str, Any]:
    most = min(64, len(bench.opened.data) // bench.session.world.size)
    return speed.measure(bench, most).plain()


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {"speed": measure_speed}
