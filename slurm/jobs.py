"""What launch.py does with Slurm: give it a job for a run or an array for several; end the job that it is in."""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import Any, Protocol

from isobatch.conf.rundir.files import last_step
from isobatch.conf.saved import frozen
from isobatch.conf.schema import RunConfig, Slurm
from isobatch.scaling.errors import UserError
from isobatch.slurm.allocation import job_here
from isobatch.slurm.requeue import Verdict, end_of_job, judge, put_back, put_back_by_slurm
from isobatch.slurm.state import SlurmError
from isobatch.slurm.submit import common_cluster, prepare, refuse_if_queued


class Run(Protocol):
    """A run directory, as far as jobs have to do with it."""

    path: Path

    @property
    def begun(self) -> bool:
        """It holds a run."""

    def lock(self) -> AbstractContextManager[Any]:
        """Take it. Raises where another launch has it."""

    def event(self, event: str, **fields: Any) -> None:
        """Add a line to its events."""


def submit(
    configs: Sequence[RunConfig], runs: Sequence[Run], root: Run, launcher: Path, write: Callable[[Path, str], None]
) -> str:
    """Give Slurm a job that does one run, or an array that does several, in directories below ``root``.

    Args:
        write: a text to a file, all of it or nothing.

    Returns:
        What is to be said: the job, where its output goes, how to follow and to cancel it; of a dry run, the script.

    Raises:
        UserError: they can't be one job, a job does one of them already, or Slurm refuses. Nothing of it stays.
    """
    cluster, stamp = common_cluster(configs), f"{time.strftime('%Y%m%dT%H%M%S')}-{uuid.uuid4().hex[:6]}"
    places = [run.path.absolute() for run in runs]
    texts = {place: frozen(config, place) for config, place in zip(configs, places, strict=True)}
    submission = prepare(cluster, texts, root.path.absolute(), stamp, launcher)
    if cluster.dry_run:
        return submission.text
    refuse_if_queued(places)  # a job that runs has the lock
    with ExitStack() as locked:  # nobody else submits at the same time
        for run in runs:
            locked.enter_context(run.lock())
        try:
            refuse_if_queued(places)
            job = submission.give(write)
        except BaseException:
            for run in runs:
                if not run.begun:
                    shutil.rmtree(run.path, ignore_errors=True)
            if not root.begun:
                with suppress(OSError):  # other runs of the sweep are there
                    submission.output.parent.rmdir()
                    root.path.rmdir()
            raise
        for number, run in enumerate(runs):
            run.event("submitted", job=submission.job_of(job, number), script=str(submission.script))
    return submission.told(job)


def end(run: Run, config: RunConfig) -> tuple[int, str]:
    """What the script of a job does at its end: see why it ended, note that, and put the job back where it stopped.

    Returns:
        The script's exit code, and what is to be said.

    Raises:
        UserError: this isn't a job of Slurm's.
        SlurmError: Slurm doesn't answer.
    """
    if not isinstance(config.cluster, Slurm):
        raise UserError("action=requeue is for the script of a job: python launch.py cluster=slurm … action=requeue")
    ended = end_of_job(run.path)
    verdict = judge(ended, config.cluster.max_requeues, config.cluster.signal_s)
    if verdict.event == "finished":
        return 0, ""
    _note(run, verdict)  # before Slurm ends this process
    if verdict.event == "requeue":
        try:
            put_back(ended)
        except SlurmError as error:
            verdict = Verdict("not_requeued", verdict.kind, f"{verdict.cause}; the job can't be queued again: {error}")
            _note(run, verdict)
    return 0 if verdict.event == "requeue" else ended.code or 1, f"isobatch: job {ended.identifier} {verdict}"


def begin(run: Run) -> str:
    """Note why Slurm by itself queued this job again, where nobody could do that before; what is to be said of it."""
    with suppress(SlurmError):  # it is only to be told
        if verdict := put_back_by_slurm(run.path):
            _note(run, verdict)
            return f"isobatch: the job was queued again: {verdict.cause}"
    return ""


def _note(run: Run, verdict: Verdict) -> None:
    with suppress(OSError):  # a full disk is no reason not to go on
        if run.begun:  # a refused start leaves a foreign folder alone
            job, step = job_here()["job"], last_step(run.path)
            run.event(verdict.event, job=job, kind=verdict.kind, cause=verdict.cause, step=step)
