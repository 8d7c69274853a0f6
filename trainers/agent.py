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
from pathlib import Path
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

from trainers.notes import (
    GRACE_S,
    KILLED_HINT,
    NO_FURTHER,
    await_words,
    first_error,
    leave_word,
    others_word,
    read_note,
    write_note,
)
from trainers.rendezvous import Alone
from trainers.rundir import Outcome, RunDir
from trainers.stop import Stop, die_with_parent
from trainers.watch import Watch
from trainers.world import FRESH_STORE

TICK_S = 0.1  # between looks at the workers, where nothing happens
STACKS_S = 0.3  # for those that don't, to write down where they are
VERDICT_S = 4 * GRACE_S  # for the agent of rank 0 to say what is to be done
BARRIER_S = 5.0  # that an agent whose workers have ended stays, so that others can read how it ended

# The agent tells every turn it takes; what a user needs of it, the launcher says.
logging.getLogger("torch.distributed.elastic").addHandler(logging.NullHandler())
logging.getLogger("torch.distributed.elastic").propagate = False


class Agent(SimpleElasticAgent):
    """Runs ``work(*args, watch)`` in worker processes of this machine; exit code 0 is a good end of one.

    Where a worker has failed, the agent of rank 0 decides for all of them whether to start again: not where that can't
    help, where a stop was asked for, or where the last start got no further than one before it. Where memory ran out,
    the next start has half the samples in a micro-batch, and doesn't count as one of ``max_restarts``.

    Attributes:
        notes: the store that all ranks of the present start share; keys ``error/RANK``, ``entered`` and ``end`` from
            the workers, ``failed``, ``stopping`` and ``verdict`` from the agents.
        end: what rank 0 returned.
        error: what the workers failed of: the earliest note of an error, or a worker's death by a signal; with
            ``retry``: they are to be started again, and then perhaps ``limit``: with so many samples at once.
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
        self._stop, self._announced, self._told = stop, False, set[int]()
        self._timeout_s = timeout_s
        self._restarts_left = max_restarts
        self._furthest = -1  # step that a start reached before it crashed
        self._reached = {"step": 0, "samples": 0}  # by any start
        self._address, self._start_method, self._on_restart = address, start_method, on_restart
        self._processes: dict[int, Any] = {}
        self._watches: dict[int, Watch] = {}
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
        self.starts, self.error, self._told = self.starts + 1, None, set()
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
            watch = self._watches[worker.global_rank] = Watch(context)
            arguments = ({key: str(value) for key, value in env.items()}, os.getpid(), self._stop, watch)
            process = context.Process(target=_child, args=(*arguments, spec.entrypoint, spec.args))
            process.start()
            self._processes[worker.global_rank] = process
            self._seen_alive[worker.global_rank] = time.time()
        self._stop.hurry = hurry
        return {worker.local_rank: self._processes[worker.global_rank].pid for worker in worker_group.workers}

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        wait([process.sentinel for process in self._alive().values()], TICK_S)
        if self._stop.wanted:
            self._pass_on_stop(self._stop.wanted)
        codes = {rank: process.exitcode for rank, process in self._processes.items()}
        if any(codes.values()) or self._note_hangs() or read_note(self.notes, "failed"):
            self._explain(worker_group)
            return RunResult(WorkerState.FAILED)
        alive = [rank for rank, code in codes.items() if code is None]
        self._seen_alive.update(dict.fromkeys(alive, time.time()))
        if alive or self._await_end():
            return RunResult(WorkerState.HEALTHY)
        self.end = self._noted_end()
        return RunResult(WorkerState.SUCCEEDED, return_values=dict.fromkeys(codes))

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
            print(f"isobatch: {wanted}: stopping at the next step{hint}", file=sys.stderr)
            write_note(self.notes, "stopping", wanted)
        for rank, process in self._alive().items():
            if self._watches[rank].started and rank not in self._told:
                os.kill(process.pid, signal.Signals[wanted])
                self._told.add(rank)
                self._watches[rank].forgive()

    def _note_hangs(self) -> bool:
        """Workers that don't notice themselves that they hang: stopped, stuck with the interpreter's lock held, or
        deaf to a signal before they train."""
        limit, hanging = self._timeout_s + GRACE_S, False
        for rank in self._alive():
            looks, watched = self._watches[rank].look(), self._watches[rank].training or rank in self._told
            if watched and looks * TICK_S > limit:
                hanging = True
                suspended = _suspended(self._processes[rank].pid)
                what = "suspended (by SIGSTOP, or a debugger)" if suspended else "it hung"
                self._note(rank, f"{what}: no sign of life within cluster.timeout_s={self._timeout_s:g}")
        return hanging

    def _explain(self, worker_group: WorkerGroup) -> None:
        """Let the others end too, find the error that was first, and learn whether to start again."""
        write_note(self.notes, "failed", True)  # the other agents' workers won't get on either
        self._note_deaths()
        deadline = time.monotonic() + GRACE_S
        while (alive := self._alive()) and (left := deadline - time.monotonic()) > 0:
            wait([process.sentinel for process in alive.values()], min(left, TICK_S))
        self._note_deaths()
        for rank, process in alive.items():
            if _suspended(process.pid):
                self._note(rank, "suspended (by SIGSTOP, or a debugger)")
            else:
                self._note(rank, "it said nothing", silent=True)
        self._show_stacks()
        own = set(self._processes)
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
        for rank, process in self._processes.items():
            if code := process.exitcode:
                cause = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
                self._note(rank, cause + (KILLED_HINT if code == -signal.SIGKILL else ""))

    def _note(self, rank: int, cause: str, **more: Any) -> None:
        reached, at = self._watches[rank].reached, self._seen_alive[rank]
        leave_word(self.notes, rank, others_word(rank, cause, reached, at, **more))

    def _show_stacks(self) -> None:
        """Have the workers that are left, and their data loaders, write down where they stand, also if stopped."""
        for process in self._alive().values():
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGQUIT)
                os.killpg(process.pid, signal.SIGCONT)
        if self._alive():
            time.sleep(STACKS_S)

    def _judged(self, own: set[int]) -> dict[str, Any] | None:
        """What the workers failed of and whether to start again, which the other agents are told.

        Args:
            own: this agent's ranks; another agent may be about to say what became of its own.
        """
        error = await_words(self.notes, self._worker_group.workers[0].world_size, own)
        if error is None:
            return None
        over = self._stop.wanted or any(read_note(self.notes, key) for key in ("stopping", "end"))
        error["retry"] = bool(error["again"] and not over)
        if error["kind"] == "oom":
            error["limit"] = error["per_gpu"] // 2
            error["retry"] = error["retry"] and error["limit"] > 0
        elif error["retry"]:
            error["retry"] = self._restarts_left > 0
            if error["retry"] and error["step"] <= self._furthest:
                error |= {"retry": False, "cause": error["cause"] + NO_FURTHER}
        write_note(self.notes, "verdict", error)
        return error

    def _remember(self, error: dict[str, Any]) -> None:
        """What later verdicts depend on, on each agent: rank 0 may be another's then."""
        if error["kind"] != "oom":
            self._restarts_left -= 1
            self._furthest = max(self._furthest, error["step"])
        self._reached = {key: max(far, error[key]) for key, far in self._reached.items()}
        error |= self._reached

    def _verdict(self) -> dict[str, Any] | None:
        """What the agent of rank 0 makes of it; where it says nothing, what is known here, and the end."""
        deadline = time.monotonic() + VERDICT_S
        while time.monotonic() < deadline and self._await_end():
            if verdict := read_note(self.notes, "verdict"):
                return dict(verdict)
            time.sleep(TICK_S)
        error = first_error(self.notes, self._worker_group.workers[0].world_size)
        return error and error | {"retry": False}

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        self._stop_workers(worker_group)
        self._on_restart(self)
        super()._restart_workers(worker_group)

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


def _suspended(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    return False


def _child(
    env: dict[str, str], parent: int, stop: Stop, watch: Watch, work: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.setsid()  # Ctrl-C reaches the launcher, which passes it on
    die_with_parent()
    if os.getppid() != parent:
        os._exit(1)
    os.environ.update(env)
    signal.signal(signal.SIGQUIT, signal.SIG_IGN)  # until there is a log for stacks
    stop.install()
    watch.beat()
    work(*args, watch)
