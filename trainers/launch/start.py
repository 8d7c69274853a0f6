"""Start this machine's workers, or run one in this process, and record the outcome. Torch-free until used."""

from __future__ import annotations

import gc
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from isobatch.conf.rundir.outcome import Outcome
from isobatch.scaling.errors import UserError
from isobatch.trainers.launch.failures import Starts, record_end, record_restart
from isobatch.trainers.launch.worker import Body, Worker
from isobatch.trainers.ranks.failure import Failure, restarts
from isobatch.trainers.ranks.notes import await_failure, note_failure, read_note, store_of_all_starts, write_note
from isobatch.trainers.ranks.session import Start
from isobatch.trainers.ranks.signals import Stop, Stopped
from isobatch.trainers.ranks.watch import Watch

if TYPE_CHECKING:
    from isobatch.conf.schema import RunConfig


def launch(config: RunConfig, start: Start, body: Body, stop: Stop) -> int:
    """Train with this machine's workers. Print a failure once, and return the command's exit code.

    The module of ``body`` must be imported after ``import_torch``, since the workers are forked with it. Raises
    UserError if the configuration can't work; no worker is started then.
    """
    from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousTimeoutError

    from isobatch.trainers.engines.make import import_engine
    from isobatch.trainers.launch.agent import Agent
    from isobatch.trainers.launch.rendezvous import rendezvous

    import_engine(config)
    cluster, handler, agent = config.cluster, None, None
    cause, stopped = "rank 0 ended without a result", ""
    try:
        handler, address = rendezvous(config, stop, start.hosts, start.host)
        agent = Agent(config, start, body, stop, handler, address)
        agent.run()
        if agent.end:
            return agent.end.exit_code
        cause = cause if agent.leads else "the machine of rank 0 is gone"
    except Stopped as stop_signal:
        stopped = f"{stop_signal}, while waiting for other machines"
    except RendezvousError as error:
        late = isinstance(error, RendezvousTimeoutError)
        reason = f"not all {cluster.nodes} joined within {cluster.timeout_s:g} s" if late else type(error).__name__
        endpoint = getattr(cluster, "rendezvous", None)
        cause = f"the machines didn't meet at cluster.rendezvous={endpoint}: {str(error) or reason}"
    finally:
        if handler:
            handler.shutdown()
    failure = agent.verdict.failure if agent and agent.verdict else Failure(0, cause, again=False)
    if stopped:
        failure = replace(failure, kind="stopped", again=False, cause=stopped)
    run = agent.run_dir if agent and agent.leads else None
    return record_end(failure, run, start.attempt, agent.restarts if agent else 0).exit_code


def run_under_torchrun(config: RunConfig, start: Start, body: Body, stop: Stop, kept: list[object]) -> int:
    """Run as a worker that torchrun started, and return the exit code that torchrun expects.

    torchrun restarts a worker unless its exit code is 0, so ``stopped`` returns 0 here. ``outcome.json`` has the
    actual outcome.
    """
    stop.hurry, watch = False, Watch()
    watch.beat()
    end = Worker(config, start, body, stop, watch, _report_under_torchrun, kept).work()
    return 0 if isinstance(end, Outcome) else end.exit_code


def _report_under_torchrun(worker: Worker, failure: Failure) -> None:
    """Let the first worker that fails report for all workers, and write notes for torchrun's next start."""
    store = worker.store
    note_failure(store, failure)
    first = worker.rank == 0
    with suppress(RuntimeError):  # torchrun, which holds the store, is gone
        first = store.add("failures", 1) == 1 if store else first
    if not first:
        return
    lasting = store_of_all_starts(store)
    starts = read_note(lasting, "starts", Starts) or Starts()
    failure = await_failure(store, int(os.environ["WORLD_SIZE"])) or failure
    verdict = starts.decide(failure)
    end = record_end(verdict.failure, worker.run, worker.start.attempt, restarts(), worker.terminal)
    if not verdict.retry:
        write_note(lasting, "final", end)
        return
    starts.add(verdict)
    write_note(lasting, "starts", starts)
    if worker.run and restarts() < int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        record_restart(verdict, worker.run, restarts() + 1)


def run_in_process(config: RunConfig, start: Start, body: Body, stop: Stop, kept: list[object]) -> Outcome | Failure:
    """Run as the only worker, in the calling process, and print a failure at once."""

    def report(worker: Worker, failure: Failure) -> None:
        record_end(replace(failure, log=""), worker.run, worker.start.attempt)  # with its traceback

    return Worker(config, start, body, stop, Watch(), report, kept).work()


def run_here(config: RunConfig, start: Start, body: Body) -> Outcome:
    """Run as the only worker, in the calling process, and release the run directory at the end.

    Raises:
        UserError: the user's input can't work.
        RuntimeError: the run crashed; the cause is chained.
        KeyboardInterrupt: the user interrupted the run, which is recorded as stopped after its last checkpoint.
    """
    worker = Worker(config, start, body, Stop(), Watch(), _raise, [])
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
    """Restore the process-wide state that training sets: environment, generators, threads, garbage collection."""
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
