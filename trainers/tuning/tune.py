"""``action=tune``: measure what each part asks for, and recommend a batch. Every worker runs this function."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout

from isobatch.conf.rundir.directory import RunDir
from isobatch.conf.rundir.lock import hold
from isobatch.conf.rundir.outcome import Outcome
from isobatch.conf.terminal import answer, say
from isobatch.scaling.errors import UserError
from isobatch.scaling.report.tuning import write_picture
from isobatch.scaling.tuning.results import Results
from isobatch.trainers.data.validation import open_validation
from isobatch.trainers.loop.opening import open_task
from isobatch.trainers.model.randomness import Stream, seed_generators
from isobatch.trainers.ranks.failure import restarts
from isobatch.trainers.ranks.session import Session, raise_on_all, refuse_other_commands, stop_signal
from isobatch.trainers.tasks.task import make_task
from isobatch.trainers.tuning.bench import Bench, Interrupted
from isobatch.trainers.tuning.conditions import conditions_of
from isobatch.trainers.tuning.parts import PARTS
from isobatch.trainers.tuning.progress import Progress
from isobatch.trainers.tuning.recommend import recommended, summary


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
        folder = RunDir(session.start.run_dir)
        results = begin(session, folder)
        try:
            bench = open_bench(session)
            done = bench is not None and measured(bench, results)
        finally:
            if folder.held:
                folder.held.release()
    if not done:
        if world.rank == 0:
            say("stopped (the same command resumes)", sys.stderr)
        return Outcome("stopped", stop_signal(session.stop, world), 0, 0, attempt, restarts())
    if world.rank == 0:
        missing = write_picture(results.folder, results.parts)
        if missing:
            say(f"warning: {missing}", sys.stderr)
        answer(results.json() if as_json else f"{summary(results.parts)}\n\nwritten to {results.file}")
    return Outcome("finished", "", 0, 0, attempt, restarts())


def begin(session: Session, folder: RunDir) -> Results:
    """Lock the ``folder`` of the results on rank 0, and return the results so far on all ranks."""
    world, start = session.world, session.start
    refuse_other_commands(session.config, world)
    results, error = Results(folder.path.parent), None
    if world.rank == 0:
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            hold(folder.lock(start.job, start.job_restart, start.attempt, start.launches).file)
            results.read()
        except (UserError, OSError) as caught:
            problem = f"{folder.path} can't be written: {caught}"
            error = caught if isinstance(caught, UserError) else UserError(problem, "", "run.dir")
    raise_on_all(world, error)
    results.parts = json.loads(world.agree(json.dumps(results.parts)))
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
    return Bench(session, opened, stream, validation, Progress(shown=world.rank == 0, live=not config.debug))


def measured(bench: Bench, results: Results) -> bool:
    """Measure each part that isn't stored yet, and recommend; return False on all ranks if any was asked to stop."""
    rank = bench.session.world.rank
    try:
        with bench.progress as progress:
            for name, part in PARTS.items():
                if name not in bench.config.tune.parts:
                    continue
                conditions = conditions_of(bench, name)
                if results.get(name, conditions) is not None:
                    progress.tell(f"{name}: measured before, in {results.file}")
                    continue
                progress.part(name, part.doing)
                found = bench.agree(part.measure(bench, results.parts))
                results.parts[name] = found
                progress.tell(f"{name}: {part.tell(found)}")
                if rank == 0:
                    results.put(name, found, conditions)
    except Interrupted:
        return False
    recommendation = recommended(bench, results.parts)
    if rank == 0 and recommendation:
        results.put("recommendation", recommendation)
    return True
