"""What launch.py does with Slurm: submit a job for a run or an array for several; end the job that it is in."""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from isobatch.conf.groups import Slurm
from isobatch.conf.rundir.directory import RunDir
from isobatch.conf.rundir.files import holds_run, last_step
from isobatch.conf.saved import frozen
from isobatch.conf.schema import RunConfig
from isobatch.scaling.errors import UserError
from isobatch.slurm.end import end_of_job
from isobatch.slurm.requeue import Verdict, decide_requeue, put_back, put_back_by_slurm
from isobatch.slurm.state import JobStart
from isobatch.slurm.submit import common_cluster, prepare, refuse_if_queued


def submit(configs: Sequence[RunConfig], runs: Sequence[RunDir], root: RunDir, launcher: Path) -> str:
    """Submit a job that does one run, or an array that does several, in directories below ``root``.

    Returns:
        What to say: the job, where its output goes, how to follow and to cancel it; of a dry run, the script.

    Raises:
        UserError: they can't be one job, a job does one of them already, or Slurm rejects it. No file of it stays.
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
            job = submission.give()
        except BaseException:
            for run in runs:
                if not holds_run(run.path):
                    shutil.rmtree(run.path, ignore_errors=True)
            if not holds_run(root.path):
                with suppress(OSError):  # other runs of the sweep are there
                    submission.output.parent.rmdir()
                    root.path.rmdir()
            raise
        for number, run in enumerate(runs):
            run.event("submitted", job=submission.job_of(job, number), script=str(submission.script))
    return submission.told(job)


def end(run: RunDir, config: RunConfig) -> tuple[int, str]:
    """End the job that this process is in: record why it ended, and queue it again where it was stopped.

    Returns:
        The script's exit code, and what to say.

    Raises:
        UserError: this isn't a job of Slurm's, or Slurm doesn't answer.
    """
    if not isinstance(config.cluster, Slurm):
        problem = "action=requeue is for the script of a job"
        raise UserError(problem, "python launch.py cluster=slurm … action=requeue", "action", "requeue")
    ended = end_of_job(run.path)
    verdict = decide_requeue(ended, config.cluster.max_requeues, config.cluster.signal_s)
    if verdict.event == "finished":
        return 0, ""
    _note(run, verdict)  # before Slurm ends this process
    if verdict.event == "requeue":
        try:
            put_back(ended)
        except UserError as error:
            verdict = Verdict("not_requeued", verdict.kind, f"{verdict.cause}; the job can't be queued again: {error}")
            _note(run, verdict)
    return 0 if verdict.event == "requeue" else ended.code or 1, f"isobatch: job {ended.identifier} {verdict}"


def begin(run: RunDir) -> str:
    """Record why Slurm itself queued this job again, where nobody could do that before; return what to say of it."""
    with suppress(UserError):  # it is only to be told
        if verdict := put_back_by_slurm(run.path):
            _note(run, verdict)
            return f"isobatch: the job was queued again: {verdict.cause}"
    return ""


def _note(run: RunDir, verdict: Verdict) -> None:
    with suppress(OSError):  # a full disk is no reason not to go on
        if holds_run(run.path):  # a refused start leaves a foreign folder alone
            job, step = JobStart.here().id, last_step(run.path)
            run.event(verdict.event, job=job, kind=verdict.kind, cause=verdict.cause, step=step)
