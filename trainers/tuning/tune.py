"""``action=tune``: measure what each part asks for, and recommend a batch. Every worker runs this function."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from typing import Any

from isobatch.conf.rundir.directory import RunDir
from isobatch.conf.rundir.lock import hold
from isobatch.conf.rundir.outcome import Outcome
from isobatch.conf.terminal import say
from isobatch.scaling.report.tuning import write_picture
from isobatch.scaling.tuning.results import Results, to_json
from isobatch.scaling.tuning.speed import NOISY, unknown
from isobatch.trainers.data.validation import open_validation
from isobatch.trainers.loop.opening import open_task
from isobatch.trainers.model.randomness import seed_generators
from isobatch.trainers.ranks.failure import answer_if_read, restarts
from isobatch.trainers.ranks.session import Session, refuse_other_commands, stop_signal
from isobatch.trainers.tasks.task import make_task
from isobatch.trainers.tuning import memory, recommend
from isobatch.trainers.tuning.bench import Bench, Interrupted
from isobatch.trainers.tuning.conditions import conditions_of
from isobatch.trainers.tuning.parts import PARTS
from isobatch.trainers.tuning.progress import Progress
from isobatch.trainers.tuning.recommend import recommended, summary
from isobatch.trainers.tuning.stored import put_result, read_results

RECOMMENDATION = "recommendation"  # in tune.json, beside the parts


def tune(session: Session, enter: Callable[[RunDir], None]) -> Outcome:
    """Measure the parts of ``tune.parts``, store each in ``tune/tune.json``, and print a recommendation on rank 0.

    With ``output=json``, stdout has what of that file holds under the present conditions, and nothing else. ``enter``
    isn't called: nothing is trained in the run directory.

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
            found = None if bench is None else measured(bench, results)
        finally:
            if folder.held:
                folder.held.release()
    if found is None:
        if world.rank == 0:
            say("stopped (the same command resumes)", sys.stderr)
        return Outcome("stopped", stop_signal(session.stop, world), 0, 0, attempt, restarts())
    if world.rank == 0:
        missing = write_picture(results.folder, found)
        if missing:
            say(f"warning: {missing}", sys.stderr)
        text = f"{summary(found.get(RECOMMENDATION, {}))}written to {results.file}"
        answer_if_read(to_json(found) if as_json else text)
    return Outcome("finished", "", 0, 0, attempt, restarts())


def begin(session: Session, folder: RunDir) -> Results:
    """Lock the ``folder`` of the results on rank 0, and return the results so far on all ranks."""
    world, start = session.world, session.start
    refuse_other_commands(session.config, world)

    def lock() -> None:
        folder.path.mkdir(parents=True, exist_ok=True)
        hold(folder.lock(start.job, start.job_restart, start.attempt, start.launches).file)

    return read_results(world, folder.path.parent, lock)


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
    opened = replace(opened, plan=opened.plan.settled)  # what is measured has one batch, whoever moves it in training
    return Bench(session, opened, validation, Progress(shown=world.rank == 0, live=not config.debug))


def measured(bench: Bench, results: Results) -> dict[str, Any] | None:
    """Measure each part that isn't stored yet; return all that were measured under the present conditions.

    Returns:
        The result by part, and the recommendation that rests on them, if they allow any; None if any rank was asked to
        stop.
    """
    check(bench, results)
    world, valid = bench.session.world, dict[str, Any]()
    try:
        with bench.progress as progress:
            for name, part in PARTS.items():
                conditions = conditions_of(bench, name, valid)
                stored = still_valid(bench, name, results.get(name, conditions))
                if stored is not None:
                    valid[name] = stored
                if name not in bench.config.tune.parts:
                    continue
                if stored is not None and not noisy(name, stored):
                    progress.tell(f"{name}: measured before, in {results.file}")
                    continue
                progress.part(name, part.doing)
                valid[name] = bench.agree(part.measure(bench, valid))
                progress.tell(f"{name}: {part.tell(valid[name])}")
                put_result(world, results, name, valid[name], conditions)
    except Interrupted:
        return None
    recommendation = recommended(bench, valid)  # None: an earlier one doesn't hold any more
    put_result(world, results, RECOMMENDATION, recommendation)
    return {name: results.parts[name] for name in (*valid, RECOMMENDATION) if name in results.parts}


def check(bench: Bench, results: Results) -> None:
    """Reject what will fail before anything is measured, which may take long.

    Raises:
        UserError: a part can't be measured, or the recommendation needs a part that wasn't asked for.
    """
    asked, valid = bench.config.tune.parts, dict[str, Any]()
    for name, part in PARTS.items():
        stored = still_valid(bench, name, results.get(name, conditions_of(bench, name, valid)))
        if stored is not None:
            valid[name] = stored
        elif name in asked:
            part.check(bench)
    recommend.check(bench, {*asked, *valid})


def still_valid(bench: Bench, part: str, stored: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return a stored result that can be used.

    Returns:
        None for a memory that batch.per_gpu=auto measured only up to a smaller size, and for a speed that isn't known.
    """
    if part == "memory" and memory.usable(stored, memory.share_of(bench)) is None:
        return None
    if part == "speed" and stored is not None and unknown(stored["spread"]):
        return None
    return stored


def noisy(part: str, stored: Mapping[str, Any]) -> bool:
    """Return whether a stored result is a speed from a busy machine: it is used, but measured again where asked for."""
    return part == "speed" and stored["spread"] > NOISY
