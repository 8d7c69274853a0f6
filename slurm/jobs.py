"""Submit a job for a run or an array for several, and end the job that this process is in."""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from isobatch.conf.groups import Slurm
from isobatch.conf.rundir.directory import RunDir
from isobatch.conf.rundir.files import holds_run
from isobatch.conf.rundir.reading import last_step
from isobatch.conf.saved import frozen
from isobatch.conf.schema import RunConfig
from isobatch.scaling.errors import UserError
from isobatch.slurm.end import end_of_job
from isobatch.slurm.requeue import Verdict, decide_requeue, requeue, requeued_by_slurm
from isobatch.slurm.state import JobStart
from isobatch.slurm.submit import common_cluster, prepare, refuse_if_queued


def submit(configs: Sequence[RunConfig], runs: Sequence[RunDir], root: RunDir, launcher: Path) -> str:
    """Submit a job for one run, or an array for several, in directories below ``root``.

    Returns:
        The message to print: the job, its output, how to follow and cancel it. For a dry run, the script.

    Raises:
        UserError: the runs can't be one job, a job already does one of them, or Slurm rejects it. No files are left.
    """
    cluster, stamp = common_cluster(configs), f"{time.strftime('%Y%m%dT%H%M%S')}-{uuid.uuid4().hex[:6]}"
    paths = [run.path.absolute() for run in runs]
    texts = {path: frozen(config, path) for config, path in zip(configs, paths, strict=True)}
    submission = prepare(cluster, texts, root.path.absolute(), stamp, launcher)
    if cluster.dry_run:
        return submission.text
    refuse_if_queued(paths)  # before taking the locks, which a running job holds
    with ExitStack() as locked:  # exclude concurrent submissions
        for run in runs:
            locked.enter_context(run.lock())
        try:
            refuse_if_queued(paths)
            job = submission.submit()
        except BaseException:
            for run in runs:
                if not holds_run(run.path):
                    shutil.rmtree(run.path, ignore_errors=True)
            if not holds_run(root.path):
                with suppress(OSError):  # not empty: it has other runs of the sweep
                    submission.output.parent.rmdir()
                    root.path.rmdir()
            raise
        for number, run in enumerate(runs):
            run.event("submitted", job=submission.job_of(job, number), script=str(submission.script))
    return submission.message(job)


def end(run: RunDir, config: RunConfig) -> tuple[int, str]:
    """End the job that this process is in: record why it ended, and requeue it if it was stopped.

    Returns:
        The script's exit code, and the message to print.

    Raises:
        UserError: this process isn't in a Slurm job, or Slurm doesn't answer.
    """
    if not isinstance(config.cluster, Slurm):
        problem = "action=requeue is for the script of a Slurm job"
        raise UserError(problem, "give cluster=slurm as well", "action", "requeue")
    ended = end_of_job(run.path)
    verdict = decide_requeue(ended, config.cluster.max_requeues, config.cluster.signal_s)
    if verdict.event == "finished":
        return 0, ""
    _note(run, verdict)  # before Slurm ends this process
    if verdict.event == "requeue":
        try:
            requeue(ended)
        except UserError as error:
            verdict = Verdict("not_requeued", verdict.kind, f"{verdict.cause}; the job can't be requeued: {error}")
            _note(run, verdict)
    return 0 if verdict.event == "requeue" else ended.code or 1, f"isobatch: job {ended.identifier} {verdict}"


def begin(run: RunDir) -> str:
    """Record why Slurm itself requeued this job, if its script couldn't. Return the message to print, or ""."""
    with suppress(UserError):  # only information
        if verdict := requeued_by_slurm(run.path):
            _note(run, verdict)
            return f"isobatch: the job was requeued: {verdict.cause}"
    return ""


def _note(run: RunDir, verdict: Verdict) -> None:
    with suppress(OSError):  # a full disk mustn't prevent the requeue
        if holds_run(run.path):  # don't write to a foreign folder after a rejected start
            job, step = JobStart.here().id, last_step(run.path)
            run.event(verdict.event, job=job, kind=verdict.kind, cause=verdict.cause, step=step)
