"""Start, watch and restart this machine's workers with torch's elastic agent and its rendezvous.

torch's own local agent returns results through a queue, has no hook to decide about a restart, and mistakes a worker's
``os._exit``, which is required here (see ``World.kept``), for a hang. Its support for several machines (rendezvous,
ranks, common restarts) is used unchanged.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import signal
import sys
import time
from contextlib import nullcontext, suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch.distributed.elastic.agent.server import api as elastic
from torch.distributed.elastic.events.api import Event, EventSource
from torch.distributed.elastic.rendezvous import RendezvousHandler

from isobatch.conf.hardware import workers_here
from isobatch.conf.rundir.directory import RunDir
from isobatch.conf.rundir.files import identity_of, place_of
from isobatch.conf.rundir.lock import LOCK_FD, open_lock
from isobatch.conf.rundir.outcome import Outcome
from isobatch.conf.terminal import say
from isobatch.trainers.launch.failures import Starts, Verdict, record_restart
from isobatch.trainers.launch.process import LOOK_S, SUSPENDED, WorkerProcess
from isobatch.trainers.launch.rendezvous import Alone
from isobatch.trainers.launch.worker import Body, run_for_agent
from isobatch.trainers.ranks.internals import Store, TCPStore
from isobatch.trainers.ranks.notes import GRACE_S, await_failure, first_failure, note_failure, read_note, write_note
from isobatch.trainers.ranks.signals import Stop
from isobatch.trainers.ranks.world import FRESH_STORE

if TYPE_CHECKING:
    from isobatch.conf.schema import RunConfig
    from isobatch.trainers.ranks.session import Start

STACKS_S = 0.3  # for workers that don't end by themselves to write their stacks
VERDICT_S = 4 * GRACE_S  # for the agent of rank 0 to publish its verdict
BARRIER_S = 5.0  # for which an agent outlives its workers, so that the other agents can read its notes

# torch's agent logs every state change; the launcher prints the messages that users need.
logging.getLogger("torch.distributed.elastic").addHandler(logging.NullHandler())
logging.getLogger("torch.distributed.elastic").propagate = False


class Agent(elastic.SimpleElasticAgent):
    """Run ``body`` in worker processes on this machine. A worker succeeds with exit code 0.

    If a worker fails, the agent of rank 0 decides for all agents whether to restart.

    Attributes:
        notes: the store that all ranks of the current start share, with the keys ``error/RANK``, ``entered`` and
            ``end`` from the workers, and ``failed``, ``stopping``, ``verdict`` and ``starts`` from the agents.
        end: the outcome that rank 0 returned; ``starts``: how often the workers were started.
        verdict: the first failure, and whether to restart.
    """

    def __init__(
        self, config: RunConfig, start: Start, body: Body, stop: Stop, handler: RendezvousHandler, address: str
    ) -> None:
        spec = elastic.WorkerSpec(
            "worker", workers_here(config), handler, entrypoint=run_for_agent, args=(config, start, body, stop),
            max_restarts=config.cluster.max_restarts, monitor_interval=1e-3,
        )  # fmt: skip
        super().__init__(spec, exit_barrier_timeout=BARRIER_S)
        self.notes: Store | None = None
        self.end: Outcome | None = None
        self.verdict: Verdict | None = None
        self.starts = 0
        self._stop, self._announced = stop, False
        self._address, self._timeout_s = address, config.cluster.timeout_s
        self._failed_starts = Starts(config.cluster.max_restarts)  # on each agent, since rank 0 may move to another
        self._start_method = "fork" if sys.platform == "linux" and not torch.cuda.is_initialized() else "spawn"
        self._run = RunDir(start.run_dir) if start.run_dir else None
        self._entered: str | None = None  # the run directory, if an earlier start entered it
        self._lock: IO[str] | None = None
        self._identity: tuple[int, int] | None = None  # of the run directory
        self._workers: list[WorkerProcess] = []

    @property
    def leads(self) -> bool:
        """True if rank 0 is one of this agent's workers."""
        return self._worker_group.group_rank == 0

    @property
    def run_dir(self) -> RunDir | None:
        """Return the run directory, once rank 0 has entered it in this start or in an earlier one."""
        path: Path | str | None = read_note(self.notes, "entered", str) or self._entered
        if path and self._lock:  # it may have been moved
            path = self._identity and place_of(self._lock, self._identity)
        return RunDir(path) if path else None

    @property
    def restarts(self) -> int:
        return max(0, self.starts - 1)

    def _rendezvous(self, worker_group: elastic.WorkerGroup) -> None:
        alone = isinstance(worker_group.spec.rdzv_handler, Alone)
        with nullcontext() if alone else self._stop.interrupting():
            super()._rendezvous(worker_group)
            # a new store per start has no addresses of dead workers; it outlives the workers, so it keeps their errors
            shared: Store = worker_group.store  # type: ignore[assignment]
            if self.leads:
                self.notes = TCPStore(self._address, 0, is_master=True, wait_for_workers=False)
                write_note(self.notes, "starts", self._failed_starts)
                shared.set("notes", json.dumps([self._address, self.notes.port]))
            address, port = json.loads(shared.get("notes"))
            if not self.leads:
                self.notes = TCPStore(address, port, wait_for_workers=False)
            worker_group.master_addr, worker_group.master_port = address, port

    def _start_workers(self, worker_group: elastic.WorkerGroup) -> dict[int, Any]:
        spec = worker_group.spec
        context: Any = multiprocessing.get_context(self._start_method)
        self.starts, self.verdict = self.starts + 1, None
        base = self._inherited_lock() if self._start_method == "fork" else {}
        base |= {"LOCAL_WORLD_SIZE": spec.local_world_size, "TORCHELASTIC_RESTART_COUNT": self.restarts, FRESH_STORE: 1}
        base |= {"MASTER_ADDR": worker_group.master_addr, "MASTER_PORT": worker_group.master_port}
        for worker in worker_group.workers:
            ranks = {"RANK": worker.global_rank, "WORLD_SIZE": worker.world_size, "LOCAL_RANK": worker.local_rank}
            env = {key: str(value) for key, value in (base | ranks).items()}
            process = WorkerProcess(context, worker.global_rank, env, self._stop, run_for_agent, spec.args)
            self._workers.append(process)
        return {number: worker.pid for number, worker in enumerate(self._workers)}

    def _inherited_lock(self) -> dict[str, Any]:
        """Return the descriptor of rank 0's lock file, which this agent keeps open from start to start."""
        if self._lock and not self.leads:
            self._lock.close()
            self._lock = None
        if self._run and self.leads:
            with suppress(OSError):  # the worker reports it
                self._lock = self._lock or open_lock(self._run.path)
                self._identity = self._identity or identity_of(self._run.path)
        return {LOCK_FD: self._lock.fileno()} if self._lock else {}

    def _monitor_workers(self, worker_group: elastic.WorkerGroup) -> elastic.RunResult:
        wait([worker.sentinel for worker in self._alive()], LOOK_S)
        if self._stop.wanted:
            self._forward_stop(self._stop.wanted)
        hanging = [(worker, cause) for worker in self._alive() if (cause := worker.look(self._timeout_s))]
        for worker, cause in hanging:
            self._note(worker, cause)
        codes = [worker.code for worker in self._workers]
        if hanging or any(codes) or read_note(self.notes, "failed", bool):
            self._handle_failure(worker_group)
            return elastic.RunResult(elastic.WorkerState.FAILED)
        if None in codes or self._await_end():
            return elastic.RunResult(elastic.WorkerState.HEALTHY)
        self.end = read_note(self.notes, "end", Outcome)
        ended = {worker.rank: None for worker in self._workers}
        return elastic.RunResult(elastic.WorkerState.SUCCEEDED, return_values=ended)

    def _await_end(self) -> bool:
        """Return whether rank 0 is on another machine, and has neither ended the run nor failed yet."""
        with suppress(RuntimeError):  # the machine that holds the notes is gone
            return not self.leads and self.notes is not None and not self.notes.check(["end"])
        return False

    def _forward_stop(self, wanted: str) -> None:
        if not self._announced:
            self._announced = True
            hint = "; Ctrl-C again ends at once" if wanted == "SIGINT" else ""
            say(f"isobatch: {wanted}: stopping at the next step{hint}", sys.stderr)
            write_note(self.notes, "stopping", wanted)
        for worker in self._alive():
            worker.forward_signal(wanted)

    def _handle_failure(self, worker_group: elastic.WorkerGroup) -> None:
        """End the other workers too, find the first failure, and get the verdict whether to restart."""
        write_note(self.notes, "failed", True)  # the other agents' workers can't continue either
        self._note_deaths()
        deadline = time.monotonic() + GRACE_S
        while (alive := self._alive()) and (left := deadline - time.monotonic()) > 0:
            wait([worker.sentinel for worker in alive], min(left, LOOK_S))
        self._note_deaths()
        for worker in alive:
            suspended = worker.suspended
            self._note(worker, SUSPENDED if suspended else "it reported nothing", silent=not suspended)
            worker.show_stacks()
        if alive:
            time.sleep(STACKS_S)
        own = {worker.rank for worker in self._workers}
        self._shutdown()
        self.verdict = self._decide(own) if self.leads else self._await_verdict()
        self.end = read_note(self.notes, "end", Outcome)
        if self.verdict:
            self.verdict = self._failed_starts.add(self.verdict)
            self._entered = read_note(self.notes, "entered", str) or self._entered
        self._remaining_restarts = int(self.verdict is not None and self.verdict.retry)
        if not self._remaining_restarts:
            self._exit_barrier()  # until the other agents have read the notes here

    def _note_deaths(self) -> None:
        """Note the deaths of workers that couldn't leave a note themselves."""
        for worker in self._workers:
            if cause := worker.death():
                self._note(worker, cause)

    def _note(self, worker: WorkerProcess, cause: str, *, silent: bool = False) -> None:
        note_failure(self.notes, worker.failure(cause, silent=silent))

    def _decide(self, own: set[int]) -> Verdict | None:
        """Decide whether to restart, and publish the verdict. The other agents may still report ranks but ``own``."""
        if (failure := await_failure(self.notes, self._worker_group.workers[0].world_size, own)) is None:
            return None
        over = self._stop.wanted or read_note(self.notes, "stopping", str) or read_note(self.notes, "end", Outcome)
        verdict = self._failed_starts.decide(failure, over=bool(over))
        write_note(self.notes, "verdict", verdict)
        return verdict

    def _await_verdict(self) -> Verdict | None:
        """Return the verdict of rank 0's agent. Without one, don't retry, and name the first failure known here."""
        deadline = time.monotonic() + VERDICT_S
        while time.monotonic() < deadline and self._await_end():
            if verdict := read_note(self.notes, "verdict", Verdict):
                return verdict
            time.sleep(LOOK_S)
        failure = first_failure(self.notes, self._worker_group.workers[0].world_size)
        return Verdict(failure, retry=False) if failure else None

    def _restart_workers(self, worker_group: elastic.WorkerGroup) -> None:
        self._shutdown()
        if self.verdict and self.leads:
            limit, summary = self.verdict.per_gpu_limit, self.verdict.failure.summary
            smaller = "" if limit is None else f" with batch.per_gpu={limit}"
            say(f"isobatch: {summary}; restarting the workers{smaller}", sys.stderr)
            if run := self.run_dir:
                record_restart(self.verdict, run, self.starts)
        super()._restart_workers(worker_group)

    def _stop_workers(self, worker_group: elastic.WorkerGroup) -> None:
        self._shutdown()

    def _shutdown(self, death_sig: signal.Signals = signal.SIGKILL, timeout: int = 30) -> None:
        for worker in self._workers:
            worker.kill(timeout)
        self._workers.clear()

    def _alive(self) -> list[WorkerProcess]:
        return [worker for worker in self._workers if worker.code is None]

    def _construct_event(self, state: str, source: EventSource, *args: Any, **kwargs: Any) -> Event:
        """Return a bare event. torch's version looks up this machine's full name, for a log that is switched off."""
        return Event(state, source)
