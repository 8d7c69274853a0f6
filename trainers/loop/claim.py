"""Claim the run directory for this launch, and record the end of the run."""

from __future__ import annotations

import platform
import socket

import torch

from isobatch.conf.existing import ever_trained
from isobatch.conf.rundir.directory import RunDir
from isobatch.conf.rundir.files import write_atomic
from isobatch.conf.rundir.lock import hold
from isobatch.conf.rundir.outcome import Outcome, State
from isobatch.conf.rundir.reading import last_step
from isobatch.conf.saved import dump
from isobatch.conf.terminal import say
from isobatch.scaling.errors import UserError
from isobatch.scaling.report.run import NO_CAUSE
from isobatch.trainers.ranks.failure import Reached, restarts
from isobatch.trainers.ranks.session import Session, raise_on_all, refuse_other_commands


def claim(session: Session) -> tuple[RunDir, Outcome | None]:
    """Claim the run directory: rank 0 locks it and writes ``running``, and the other ranks wait until they see that.

    The files of an earlier attempt aren't changed yet, because this attempt may still be rejected.

    Returns:
        The directory, and the outcome of the previous attempt; ``finished`` is the same on all ranks.

    Raises:
        UserError: ranks were started with different configs, the folder isn't writable or isn't a run's, another
            launch works in it, or a node doesn't see the files that rank 0 writes.
    """
    world, start = session.world, session.start
    refuse_other_commands(session.config, world)
    run, before = RunDir(start.run_dir), None
    hosts = world.gather(socket.gethostname())
    error = None
    if world.rank == 0:
        try:
            before = _begin(run, session, sorted(set(hosts)))
        except (UserError, OSError) as caught:
            unwritable = UserError(f"run.dir={run.path} can't be written: {caught}", "", "run.dir", str(run.path))
            error = caught if isinstance(caught, UserError) else unwritable
            if run.held:
                run.held.release()
    raise_on_all(world, error)
    run.await_attempt(start.attempt)
    return run, before if world.rank == 0 else run.outcome()


def _begin(run: RunDir, session: Session, hosts: list[str]) -> Outcome | None:
    """Lock the directory and record the start, on rank 0; return the outcome of the previous attempt."""
    start = session.start
    run.path.mkdir(parents=True, exist_ok=True)
    run.refuse_foreign()
    hold(run.lock(start.job, start.job_restart, start.attempt, start.launches).file)
    before = run.outcome()
    if before and before.state == "finished" and not start.extends:
        return before
    at = (before.step, before.samples) if before else (0, 0)
    if not ever_trained(run.path):  # else keep the previous config until this attempt trains
        write_atomic(run.path / "config.yaml", dump(session.config))
    run.write_outcome(Outcome("running", "", *at, start.attempt, restarts()))
    run.logs.mkdir(exist_ok=True)
    if before and before.state == "running" and before.attempt != start.attempt:
        step = last_step(run.path)
        say(f"the last attempt {NO_CAUSE}, after step {step} or later")
        run.event("crashed", cause=NO_CAUSE, attempt=before.attempt, step=step, found=True)
    run.event(
        "start",
        command=start.command,
        **start.code,
        attempt=start.attempt,
        restart=restarts(),
        new=before is None,
        hosts=list(start.hosts) or hosts,
        **({"job": start.job, "job_restart": start.job_restart} if start.job else {}),
        world_size=session.world.size,
        device=str(session.world.device),
        versions={"python": platform.python_version(), "torch": torch.__version__},
    )
    return before


def end(session: Session, run: RunDir, state: State, cause: str, reached: Reached) -> Outcome:
    """Return the outcome of a run that ended at ``reached``; rank 0 writes it."""
    outcome = Outcome(state, cause, reached.step, reached.samples, session.start.attempt, restarts())
    if session.world.rank == 0:
        run.event(state, cause=cause, step=outcome.step, samples=outcome.samples)
        run.write_outcome(outcome)
    return outcome
