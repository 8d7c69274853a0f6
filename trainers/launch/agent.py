"""This machine's workers: starting them, watching them, restarting them, on torch's elastic agent and its rendezvous.

torch's own local agent returns results through a queue, allows no say in what is restarted, and takes its workers'
exit for a hang if they leave by ``os._exit``, as they have to (see trainers/ranks/kept.py). What it does for several
machines (rendezvous, ranks, restart together) is used unchanged.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from multiprocessing.connection import wait
from typing import IO, Any

from torch._C._distributed_c10d import Store, TCPStore
from torch.distributed.elastic.agent.server.api import (
    RunResult,
    SimpleElasticAgent,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.events.api import Event, EventSource
from torch.distributed.elastic.rendezvous import RendezvousHandler

from isobatch.conf.rundir.directory import LOCK_FD, Outcome, RunDir
from isobatch.conf.rundir.lock import identity_of, place_of
from isobatch.conf.terminal import say
from isobatch.trainers.launch.failures import judged
from isobatch.trainers.launch.process import LOOK_S, SUSPENDED, WorkerProcess
from isobatch.trainers.launch.rendezvous import Alone
from isobatch.trainers.ranks.notes import (
    GRACE_S,
    await_words,
    first_error,
    leave_word,
    read_note,
    write_note,
)
from isobatch.trainers.ranks.signals import Stop
from isobatch.trainers.ranks.world import FRESH_STORE

STACKS_S = 0.3  # for workers that don't end by themselves to write down where they are
VERDICT_S = 4 * GRACE_S  # for the agent of rank 0 to say what is to be done
BARRIER_S = 5.0  # that an agent whose workers have ended stays, so that others can read how it ended

# The agent tells every turn it takes; what a user needs of it, the launcher says.
logging.getLogger("torch.distributed.elastic").addHandler(logging.NullHandler())
logging.getLogger("torch.distributed.elastic").propagate = False


class Agent(SimpleElasticAgent):
    """Runs ``work(*args, watch)`` in worker processes of this machine; exit code 0 is a good end of one.

    Where a worker has failed, the agent of rank 0 decides for all agents whether to start again.

    Attributes:
        notes: the store that all ranks of the present start share; keys ``error/RANK``, ``entered`` and ``end`` from
            the workers, ``failed``, ``stopping`` and ``verdict`` from the agents.
        end: what rank 0 returned.
        error: what the workers failed of: the earliest note of an error, or a worker's death by a signal; with
            what ``judged`` says of it.
        starts: how often the workers were started.
    """

    def __init__(
        self,
        work: Callable[..., Any],
        args: tuple[Any, ...],
        *,
        stop: Stop,
        count: int,
        handler: RendezvousHandler,
        address: str,
        timeout_s: float,
        max_restarts: int,
        start_method: str,
        run: RunDir | None,
        on_restart: Callable[[Agent], None],
    ) -> None:
        spec = WorkerSpec(
            "worker", count, handler, entrypoint=work, args=args, max_restarts=max_restarts, monitor_interval=1e-3
        )
        super().__init__(spec, exit_barrier_timeout=BARRIER_S)
        self.notes: Store | None = None
        self.end: Outcome | None = None
        self.error: dict[str, Any] | None = None
        self.starts = 0
        self._stop, self._announced = stop, False
        self._timeout_s = timeout_s
        self._restarts_left = max_restarts
        self._furthest = -1  # step that a start reached before it crashed
        self._reached = {"step": 0, "samples": 0}  # by any start
        self._address, self._start_method, self._on_restart = address, start_method, on_restart
        self._run = run
        self._entered: str | None = None  # the run directory, where a start before had it
        self._lock: IO[str] | None = None
        self._identity: tuple[int, int] | None = None  # of the run directory
        self._workers: list[WorkerProcess] = []

    @property
    def leads(self) -> bool:
        """Rank 0 is one of this agent's workers."""
        return self._worker_group.group_rank == 0

    @property
    def run_dir(self) -> RunDir | None:
        """The run directory, once rank 0 has it for this launch, in this start of the workers or in one before."""
        path = read_note(self.notes, "entered") or self._entered
        if path and self._run and self._lock:
            place = self._identity and place_of(self._lock, self._identity)  # it may have been moved
            return RunDir(place) if place else None
        return RunDir(path) if path else None

    @property
    def restarts(self) -> int:
        return self.starts - 1 if self.starts else 0

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        alone = isinstance(worker_group.spec.rdzv_handler, Alone)
        with nullcontext() if alone else self._stop.interrupting():
            super()._rendezvous(worker_group)
            # a store of its own for every start, which outlives the workers: the dead leave no addresses in it, and
            # their errors can be read
            shared: Store = worker_group.store  # type: ignore[assignment]
            if self.leads:
                self.notes = TCPStore(self._address, 0, is_master=True, wait_for_workers=False)
                write_note(shared, "notes", [self._address, self.notes.port])
            address, port = json.loads(shared.get("notes"))
            if not self.leads:
                self.notes = TCPStore(address, port, wait_for_workers=False)
            worker_group.master_addr, worker_group.master_port = address, port

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        spec = worker_group.spec
        work: Any = spec.entrypoint
        context: Any = multiprocessing.get_context(self._start_method)
        self.starts, self.error = self.starts + 1, None
        lock = self._handed_on() if self._start_method == "fork" else {}
        hurry, self._stop.hurry = self._stop.hurry, False  # the workers inherit it
        for worker in worker_group.workers:
            env = {
                "RANK": worker.global_rank,
                "WORLD_SIZE": worker.world_size,
                "LOCAL_RANK": worker.local_rank,
                "LOCAL_WORLD_SIZE": spec.local_world_size,
                "MASTER_ADDR": worker_group.master_addr,
                "MASTER_PORT": worker_group.master_port,
                "TORCHELASTIC_RESTART_COUNT": self.restarts,
                FRESH_STORE: 1,
                **lock,
            }
            self._workers.append(WorkerProcess(context, worker.global_rank, env, self._stop, work, spec.args))
        self._stop.hurry = hurry
        return {number: worker.pid for number, worker in enumerate(self._workers)}

    def _handed_on(self) -> dict[str, Any]:
        """The lock file for rank 0, which this agent keeps open for it from start to start."""
        if self._lock and not self.leads:
            self._lock.close()
            self._lock = None
        if self._run and self.leads:
            with suppress(OSError):  # the worker will say so
                self._lock = self._lock or self._run.open_lock()
                self._identity = self._identity or identity_of(self._run.path)
        return {LOCK_FD: self._lock.fileno()} if self._lock else {}

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        wait([worker.sentinel for worker in self._alive()], LOOK_S)
        if self._stop.wanted:
            self._pass_on_stop(self._stop.wanted)
        hanging = False
        for worker in self._alive():
            if cause := worker.look(self._timeout_s):
                self._note(worker, cause)
                hanging = True
        codes = [worker.code for worker in self._workers]
        if hanging or any(codes) or read_note(self.notes, "failed"):
            self._explain(worker_group)
            return RunResult(WorkerState.FAILED)
        if None in codes or self._await_end():
            return RunResult(WorkerState.HEALTHY)
        self.end = self._noted_end()
        return RunResult(WorkerState.SUCCEEDED, return_values={worker.rank: None for worker in self._workers})

    def _await_end(self) -> bool:
        """Whether rank 0, on another machine, has still to say how the run ended; or to fail, which begins it anew."""
        with suppress(RuntimeError):  # that machine, which keeps the notes, is gone
            return not self.leads and self.notes is not None and not self.notes.check(["end"])
        return False

    def _noted_end(self) -> Outcome | None:
        end = read_note(self.notes, "end")
        return Outcome.of(end) if end else None

    def _pass_on_stop(self, wanted: str) -> None:
        if not self._announced:
            self._announced = True
            hint = "; Ctrl-C again ends at once" if wanted == "SIGINT" else ""
            say(f"isobatch: {wanted}: stopping at the next step{hint}", sys.stderr)
            write_note(self.notes, "stopping", wanted)
        for worker in self._alive():
            worker.tell(wanted)

    def _explain(self, worker_group: WorkerGroup) -> None:
        """Let the other workers end too, find the error that was first, and learn whether to start again."""
        write_note(self.notes, "failed", True)  # the other agents' workers won't get on either
        self._note_deaths()
        deadline = time.monotonic() + GRACE_S
        while (alive := self._alive()) and (left := deadline - time.monotonic()) > 0:
            wait([worker.sentinel for worker in alive], min(left, LOOK_S))
        self._note_deaths()
        for worker in alive:
            suspended = worker.suspended
            self._note(worker, SUSPENDED if suspended else "it said nothing", silent=not suspended)
            worker.show_stacks()
        if alive:
            time.sleep(STACKS_S)
        own = {worker.rank for worker in self._workers}
        self._stop_workers(worker_group)
        self.error = self._judged(own) if self.leads else self._verdict()
        self.end = self._noted_end()
        if self.error:
            self._remember(self.error)
        self._remaining_restarts = int(self.error is not None and self.error["retry"])
        if not self._remaining_restarts:
            self._exit_barrier()  # as long as others may read it here

    def _note_deaths(self) -> None:
        """Say what became of the workers that couldn't say it themselves."""
        for worker in self._workers:
            if cause := worker.death():
                self._note(worker, cause)

    def _note(self, worker: WorkerProcess, cause: str, *, silent: bool = False) -> None:
        leave_word(self.notes, worker.rank, worker.word(cause, silent=silent))

    def _judged(self, own: set[int]) -> dict[str, Any] | None:
        """What the workers failed of and whether to start again, which the other agents are told.

        Args:
            own: this agent's ranks; another agent may be about to say what became of its own.
        """
        error = await_words(self.notes, self._worker_group.workers[0].world_size, own)
        if error is None:
            return None
        over = self._stop.wanted or any(read_note(self.notes, key) for key in ("stopping", "end"))
        error = judged(error, self._furthest, restarts_left=self._restarts_left, over=bool(over))
        write_note(self.notes, "verdict", error)
        return error

    def _remember(self, error: dict[str, Any]) -> None:
        """What later verdicts depend on, on each agent: rank 0 may be another's then."""
        if error["kind"] != "oom":
            self._restarts_left -= 1
            self._furthest = max(self._furthest, error["step"])
        self._reached = {key: max(far, error[key]) for key, far in self._reached.items()}
        error |= self._reached
        self._entered = read_note(self.notes, "entered") or self._entered

    def _verdict(self) -> dict[str, Any] | None:
        """What the agent of rank 0 makes of it; where it says nothing, what is known here, and the end."""
        deadline = time.monotonic() + VERDICT_S
        while time.monotonic() < deadline and self._await_end():
            if verdict := read_note(self.notes, "verdict"):
                return dict(verdict)
            time.sleep(LOOK_S)
        error = first_error(self.notes, self._worker_group.workers[0].world_size)
        return error and error | {"retry": False}

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        self._stop_workers(worker_group)
        self._on_restart(self)
        super()._restart_workers(worker_group)

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        self._shutdown()

    def _shutdown(self, death_sig: signal.Signals = signal.SIGKILL, timeout: int = 30) -> None:
        for worker in self._workers:
            worker.kill(timeout)
        self._workers.clear()

    def _alive(self) -> list[WorkerProcess]:
        return [worker for worker in self._workers if worker.code is None]

    def _construct_event(self, state: str, source: EventSource, *args: Any, **kwargs: Any) -> Event:
        """torch's asks the name servers for this machine's full name, several times a start, for a log nobody reads."""
        return Event(state, source)
