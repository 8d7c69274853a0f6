"""This machine's workers: starting them, watching them, restarting them, on torch's elastic agent and its rendezvous.

torch's own local agent returns results through a queue, allows no say in what is restarted, and takes its workers'
exit for a hang if they leave by ``os._exit``, as they have to (see trainers/workers.py). What it does for several
machines (rendezvous, ranks, restart together) is used unchanged.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from multiprocessing.connection import wait
from typing import Any

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

from trainers.notes import first_error, read_note, write_note
from trainers.rendezvous import Alone
from trainers.rundir import Outcome, RunDir
from trainers.stop import Stop, die_with_parent
from trainers.world import FRESH_STORE

TICK_S = 0.1  # between looks at the workers, where nothing happens
GRACE_S = 3.0  # for the other workers to end by themselves after one has failed
BARRIER_S = 5.0  # that an agent whose workers have ended stays, so that others can read how it ended

# The agent tells every turn it takes; what a user needs of it, the launcher says.
logging.getLogger("torch.distributed.elastic").addHandler(logging.NullHandler())
logging.getLogger("torch.distributed.elastic").propagate = False


class Agent(SimpleElasticAgent):
    """Runs ``work(*args)`` in worker processes of this machine; exit code 0 is a good end of one.

    Attributes:
        notes: the store that all ranks of the present start share; keys ``error/RANK``, ``entered`` and ``end``.
        end: what rank 0 returned.
        error: what the workers failed of: the earliest note of an error, or a worker's death by a signal.
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
        self._stop, self._told = stop, False
        self._timeout_s = timeout_s
        self._address, self._start_method, self._on_restart = address, start_method, on_restart
        self._processes: dict[int, Any] = {}
        self._seen_alive: dict[int, float] = {}

    @property
    def leads(self) -> bool:
        """Rank 0 is one of this agent's workers."""
        return self._worker_group.group_rank == 0

    @property
    def run_dir(self) -> RunDir | None:
        """The run directory, once rank 0 has it for this launch."""
        path = read_note(self.notes, "entered")
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
        context: Any = multiprocessing.get_context(self._start_method)
        self.starts, self.error = self.starts + 1, None
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
            }
            arguments = ({key: str(value) for key, value in env.items()}, os.getpid(), self._stop, spec.entrypoint)
            process = context.Process(target=_child, args=(*arguments, spec.args))
            process.start()
            self._processes[worker.global_rank] = process
            self._seen_alive[worker.global_rank] = time.time()
        self._stop.hurry = hurry
        return {worker.local_rank: self._processes[worker.global_rank].pid for worker in worker_group.workers}

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        wait([process.sentinel for process in self._alive().values()], TICK_S)
        if self._stop.wanted and not self._told:
            self._told = True
            hint = "; Ctrl-C again ends at once" if self._stop.wanted == "SIGINT" else ""
            print(f"isobatch: {self._stop.wanted}: stopping at the next step{hint}", file=sys.stderr)
            for process in self._alive().values():
                os.kill(process.pid, signal.Signals[self._stop.wanted])
        codes = {rank: process.exitcode for rank, process in self._processes.items()}
        if any(codes.values()):
            self._explain(worker_group)
            return RunResult(WorkerState.FAILED)
        alive = [rank for rank, code in codes.items() if code is None]
        self._seen_alive.update(dict.fromkeys(alive, time.time()))
        if alive:
            return RunResult(WorkerState.HEALTHY)
        return RunResult(WorkerState.SUCCEEDED, return_values=dict.fromkeys(codes))

    def _explain(self, worker_group: WorkerGroup) -> None:
        """Let the others end too, and find the error that was first."""
        self._note_deaths()
        deadline = time.monotonic() + GRACE_S
        while (alive := self._alive()) and (left := deadline - time.monotonic()) > 0:
            wait([process.sentinel for process in alive.values()], min(left, TICK_S))
        self._note_deaths()
        own = set(self._processes)
        self._stop_workers(worker_group)
        deadline = time.monotonic() + GRACE_S
        while True:
            self.error = first_error(self.notes, worker_group.workers[0].world_size)
            if self.error is None or own.issuperset(self.error["silent"]) or time.monotonic() > deadline:
                break
            time.sleep(TICK_S)  # another machine may be about to say what became of its rank
        if self._stop.wanted or not (self.error and self.error["again"]):
            self._remaining_restarts = 0
        if self._remaining_restarts == 0:
            super()._exit_barrier()

    def _note_deaths(self) -> None:
        """Say what became of the workers that couldn't say it themselves."""
        for rank, process in self._processes.items():
            code = process.exitcode
            if code and read_note(self.notes, f"error/{rank}") is None:
                cause = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
                if code == -signal.SIGKILL:
                    cause += " (Linux does that where memory runs out)"
                error = {"time": self._seen_alive[rank], "rank": rank, "kind": "crashed", "again": True, "lost": False}
                write_note(self.notes, f"error/{rank}", {**error, "cause": cause})

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        self._stop_workers(worker_group)
        self.error = self.error or first_error(self.notes, worker_group.workers[0].world_size)
        self._on_restart(self)
        super()._restart_workers(worker_group)

    def _exit_barrier(self) -> None:
        """Learn how the run ended, which rank 0 may still be writing down, and let the other agents learn it too."""
        size, deadline = self._worker_group.workers[0].world_size, time.monotonic() + self._timeout_s
        with suppress(RuntimeError):  # the machine of rank 0, which keeps the notes, is gone
            while self.notes and time.monotonic() < deadline:
                if self.notes.check(["end"]):
                    self.end = Outcome.of(json.loads(self.notes.get("end")))
                    break
                self.error = first_error(self.notes, size)
                if self.error or self.leads:
                    break
                time.sleep(TICK_S)
        super()._exit_barrier()

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        self._shutdown()

    def _shutdown(self, death_sig: signal.Signals = signal.SIGKILL, timeout: int = 30) -> None:
        for process in self._processes.values():
            process.kill()
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # its data loaders
            process.join(timeout)
        self._processes.clear()

    def _alive(self) -> dict[int, Any]:
        return {rank: process for rank, process in self._processes.items() if process.exitcode is None}

    def _construct_event(self, state: str, source: EventSource, *args: Any, **kwargs: Any) -> Event:
        """torch's asks the name servers for this machine's full name, several times a start, for a log nobody reads."""
        return Event(state, source)


def _child(env: dict[str, str], parent: int, stop: Stop, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.setsid()  # Ctrl-C reaches the launcher, which passes it on
    die_with_parent()
    if os.getppid() != parent:
        os._exit(1)
    os.environ.update(env)
    stop.install()
    work(*args)
