"""Train in the calling process, such as a notebook's, and leave that process as it was. Torch-free until used."""

from __future__ import annotations

import gc
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from isobatch.conf.rundir.outcome import Outcome
from isobatch.scaling.errors import UserError
from isobatch.trainers.launch.failures import record_end
from isobatch.trainers.launch.worker import Body, Worker
from isobatch.trainers.ranks.failure import Failure
from isobatch.trainers.ranks.session import Start
from isobatch.trainers.ranks.signals import Stop
from isobatch.trainers.ranks.watch import Watch

if TYPE_CHECKING:
    from isobatch.conf.schema import RunConfig


def run_here(config: RunConfig, start: Start, body: Body) -> Outcome:
    """Be the only worker, in the calling process, and give the run directory up at the end.

    Raises:
        UserError: something the user gave can't work.
        RuntimeError: the run crashed; the cause is chained.
        KeyboardInterrupt: the user interrupted it; it is recorded as stopped, after the last checkpoint.
    """
    worker = Worker(config, start, body, Stop(), Watch(), _raise, [], guarded=False)
    try:
        end = worker.work()
    finally:
        if worker.run and worker.run.held:
            worker.run.held.close()
    assert isinstance(end, Outcome)
    return end


def _raise(worker: Worker, failure: Failure) -> None:
    """Record the failure without printing it, and raise it."""
    error = sys.exception()
    if isinstance(error, KeyboardInterrupt):
        failure = replace(failure, kind="stopped", again=False, cause="KeyboardInterrupt")
    end = record_end(replace(failure, log=""), worker.run, worker.start.attempt, to=io.StringIO())
    if isinstance(error, UserError | KeyboardInterrupt):
        raise error
    raise RuntimeError(end.cause) from error


@contextmanager
def process_kept() -> Iterator[None]:
    """Put back what training sets for the whole process: environment, generators, threads, garbage collection."""
    environment = dict(os.environ)
    import torch

    from isobatch.trainers.model.randomness import generators_kept

    threads, collects, frozen = torch.get_num_threads(), gc.isenabled(), gc.get_freeze_count()
    deterministic, benchmark = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        with generators_kept(torch.device("cuda") if torch.cuda.is_initialized() else None):
            yield
    finally:
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warns)
        torch.backends.cudnn.benchmark = benchmark
        (gc.enable if collects else gc.disable)()
        if not frozen:
            gc.unfreeze()
