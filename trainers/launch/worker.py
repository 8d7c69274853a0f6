"""Run one worker: join the other ranks, call the body, and end. The same for every launcher. Torch-free until used."""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NoReturn, TextIO

from isobatch.conf.hardware import environment, runs_at_a_time, under_torchrun
from isobatch.conf.rundir.directory import RunDir
from isobatch.conf.rundir.outcome import EXIT_CODE, Outcome
from isobatch.scaling.errors import UserError
from isobatch.trainers.launch.failures import Starts
from isobatch.trainers.ranks.failure import Failure, RunFailed, describe_failure, keep_failure, log_of
from isobatch.trainers.ranks.notes import from_json, note_failure, read_note, store_of_all_starts, to_json, write_note
from isobatch.trainers.ranks.session import Session, Start
from isobatch.trainers.ranks.signals import Stop, show_cursor
from isobatch.trainers.ranks.watch import Watch

if TYPE_CHECKING:
    from isobatch.conf.schema import RunConfig
    from isobatch.trainers.ranks.internals import Store
    from isobatch.trainers.ranks.world import World

# The work of every worker. It must be a module-level function, so that a spawned process can unpickle it. It calls its
# second argument with the run directory, once this launch has entered that.
Body = Callable[[Session, Callable[[RunDir], None]], Outcome]

THREADS = "ISOBATCH_THREADS"  # environment variable with the user's OMP_NUM_THREADS, which the launcher sets to 1
HANG_S = 10.0  # for a hanging worker to report its failure, which its main thread may block


class Worker:
    """One worker of a run.

    Args:
        report: called with this worker's failure, after it was recorded in the run directory.
        kept: see ``World``; it has to outlive the worker.

    Attributes:
        start: rank 0's description of the start.
        store: the store in which ranks exchange notes.
        run: the run directory, once this launch has entered it.
        terminal: the standard error stream that this process was started with.
    """

    def __init__(
        self,
        config: RunConfig,
        start: Start,
        body: Body,
        stop: Stop,
        watch: Watch,
        report: Callable[[Worker, Failure], None],
        kept: list[object],
    ) -> None:
        self.config, self.start, self.body, self.stop, self.watch = config, start, body, stop, watch
        self.kept, self._report = kept, report
        self.rank = int(os.environ.get("RANK", "0"))
        self.store: Store | None = None
        self.run: RunDir | None = None
        self.terminal: TextIO = sys.stderr

    def work(self) -> Outcome | Failure:
        """Call the body. Return its outcome, or this worker's failure."""
        try:
            import_torch(self.config)
            world = self._join()
            session = Session(self.config, self.start, world, self.stop, self.watch)
            end = self.body(session, partial(self._enter, world))
            self.watch.unguard()
            if self.run and self.run.held:
                self.run.held.release()
            if self.rank == 0:
                write_note(self.store, "end", end)
            world.leave()
            return end
        except BaseException as error:
            self.watch.unguard()
            return self._fail(error)

    @property
    def _may_end_process(self) -> bool:
        """False in an API caller's process and in a debugger, where a hang may be the caller's or a breakpoint's."""
        return self.stop.installed and not self.config.debug

    def _join(self) -> World:
        """Join the other ranks, and agree with them on the description of this start."""
        import torch

        from isobatch.trainers.ranks.world import World, meeting_point

        self.store = meeting_point(self.config.cluster.timeout_s, self.kept)
        world = World.join(
            self.config.device, self.config.cluster.timeout_s, self.store, self.kept, self.config.cluster.backend
        )
        torch.set_num_threads(_threads(self.config, world.local_size))
        gc.freeze()
        gc.enable()
        launches = tuple(world.gather(self.start.attempt))
        failed = read_note(store_of_all_starts(self.store), "starts", Starts) or Starts()
        known = replace(self.start, launches=launches, per_gpu_limit=failed.per_gpu_limit)
        self.start = from_json(world.agree(to_json(known)), Start)
        return world

    def _enter(self, world: World, run: RunDir) -> None:
        """Redirect errors, stacks and the output of all ranks but 0 to the run directory."""
        self.run = run
        if run.held:
            run.held.keep(self._lose)
        log = open(log_of(run, self.rank), "a")  # noqa: SIM115  open until this process ends
        if self._may_end_process:
            faulthandler.register(signal.SIGQUIT, log)
            self.watch.guard(self.config.cluster.timeout_s, world.wait_patiently, self._give_up, log)
        if self.rank == 0:
            write_note(self.store, "entered", str(run.path.absolute()))
            return
        sys.stdout.flush()
        sys.stderr.flush()
        self.terminal = os.fdopen(os.dup(2), "w")
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]

    def _fail(self, error: BaseException) -> Failure:
        """Record the failure in the run directory, and report it."""
        self.kept.append(error)  # its traceback references objects that must not be destroyed
        if isinstance(error, UserError) and self.run and self.run.held:
            self.run.held.release()
        elif self.run and (gone := self.run.gone):
            error, self.run = RunFailed(gone), self.run.now  # the missing directory caused any other error
        failure = describe_failure(error, self.rank, self.start.attempt, self.watch.reached)
        if self.run:
            failure = keep_failure(failure, self.run)
        self._report(self, failure)
        return failure

    def _give_up(self, error: Exception) -> None:
        """End this process from a thread other than the main thread."""
        reporting = threading.Thread(target=self._fail, args=(error,), daemon=True)
        reporting.start()
        reporting.join(HANG_S)
        leave(EXIT_CODE["crashed"])

    def _lose(self, cause: str) -> None:
        """End this process, since it lost the run directory. End only the run if the process must stay."""
        if not self._may_end_process:
            self.stop.wanted = cause
            return
        with self.watch.excused():
            self._give_up(RunFailed(cause))


def run_for_agent(config: RunConfig, start: Start, body: Body, stop: Stop, watch: Watch) -> NoReturn:
    """Run as a worker of Isobatch's own agent. A failure is left as a note, which the agent handles."""
    kept: list[object] = []
    end = Worker(config, start, body, stop, watch, lambda worker, why: note_failure(worker.store, why), kept).work()
    leave(0 if isinstance(end, Outcome) else end.exit_code)


def leave(code: int) -> NoReturn:
    """End this process at once, since torch's cleanup at a normal end takes time and may hang."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    with suppress(OSError, ValueError):
        show_cursor()
    os._exit(code)


def _threads(config: RunConfig, local_size: int) -> int:
    """Return the threads requested by OMP_NUM_THREADS (the first of a list), else a worker's share of the cores.

    The number of threads changes the rounding of sums within an operation, so it is always 1 with bitwise numerics.
    """
    if config.numerics == "bitwise":
        return 1
    asked = os.environ.get(THREADS, "").partition(",")[0]
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, int(asked) if asked.isdecimal() else cores // (local_size * runs_at_a_time(config)))


def import_torch(config: RunConfig) -> None:
    """Import torch and everything else that training needs, once for all workers forked from this process."""
    os.environ.update(environment(config))
    requested = "" if under_torchrun() else os.environ.get("OMP_NUM_THREADS", "")  # torchrun sets it to 1 by default
    os.environ.setdefault(THREADS, requested)
    os.environ["OMP_NUM_THREADS"] = "1"  # a fork hangs if its parent ever had a second OpenMP thread
    if config.numerics == "bitwise":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS isn't deterministic
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # count GPUs without CUDA, which doesn't survive a fork
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings repeat the exceptions, with C++ stacks
    gc.disable()  # collecting long-lived imports takes 0.5 s; workers enable it again
    from isobatch.trainers.ranks.internals import import_compiler

    import_compiler()
