"""Starting the workers of this machine, what each of them does, and how all of it ends. Torch-free until used."""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from isobatch.conf.rundir.directory import EXIT_CODE, Fatal, Outcome, RunDir
from isobatch.conf.terminal import say
from isobatch.scaling.errors import UserError
from isobatch.trainers.launch.failures import Note, bury, judged, note_restart, said
from isobatch.trainers.ranks.kept import KEPT
from isobatch.trainers.ranks.notes import (
    await_words,
    error_note,
    lasting,
    leave_word,
    log_of,
    read_note,
    restarts,
    write_note,
)
from isobatch.trainers.ranks.signals import Stop, Stopped, show_cursor
from isobatch.trainers.ranks.watch import Watch

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

    from isobatch.conf.schema import RunConfig
    from isobatch.trainers.launch.agent import Agent

THREADS = "ISOBATCH_THREADS"  # in the environment: what OMP_NUM_THREADS was before the launcher's own 1 took its place
HANG_S = 10.0  # for a worker that hangs to say so; its main thread may stand in the way

_store: Store | None = None  # where this worker leaves notes
_entered: RunDir | None = None  # its run directory
_terminal: TextIO = sys.stderr  # the error stream it was started with


def launch(config: RunConfig, facts: dict[str, str], stop: Stop) -> int:
    """Train with this machine's workers, or in this process for ``debug``; say once what went wrong.

    Returns:
        The command's exit code.

    Raises:
        UserError: it can't work, and nothing was started.
    """
    if config.debug:
        result = _attempt(config, facts, stop, Watch(), _say_at_once, guarded=False)
        return result.exit_code if isinstance(result, Outcome) else EXIT_CODE[result["kind"]]
    import_torch(config)
    import torch
    from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousTimeoutError

    import isobatch.trainers.run  # noqa: F401  the workers are forked with it
    from isobatch.conf.hardware import workers_here
    from isobatch.trainers.engines.engine import import_engine
    from isobatch.trainers.launch.agent import Agent
    from isobatch.trainers.launch.rendezvous import rendezvous

    import_engine(config)
    cluster, handler, agent = config.cluster, None, None
    cause = "rank 0 ended without a result"
    stopped = ""
    try:
        handler, address = rendezvous(config, stop, facts.get("hosts", "").split(), facts.get("host", ""))
        agent = Agent(
            work,
            (config, facts, stop),
            stop=stop,
            count=workers_here(config),
            handler=handler,
            address=address,
            timeout_s=cluster.timeout_s,
            max_restarts=cluster.max_restarts,
            start_method="fork" if sys.platform == "linux" and not torch.cuda.is_initialized() else "spawn",
            run=RunDir(facts["run_dir"]) if "run_dir" in facts else None,
            on_restart=partial(_before_restart, facts),
        )
        agent.run()
        if agent.end:
            return agent.end.exit_code
        cause = cause if agent.leads else "the machine of rank 0 is gone"
    except Stopped as wish:
        stopped = f"{wish}, while waiting for other machines"
    except RendezvousError as error:
        late = isinstance(error, RendezvousTimeoutError)
        other = f"not all {cluster.nodes} came within {cluster.timeout_s:g} s" if late else type(error).__name__
        where = getattr(cluster, "rendezvous", None)
        cause = f"the machines didn't meet at cluster.rendezvous={where}: {str(error) or other}"
    finally:
        if handler:
            handler.shutdown()
    note = (agent and agent.error) or {"kind": "crashed", "again": False, "cause": cause}
    if stopped:
        note |= {"kind": "stopped", "again": False, "cause": stopped}
    run = agent.run_dir if agent and agent.leads else None
    return bury(note, run, facts["attempt"], agent.restarts if agent else 0).exit_code


def as_worker(config: RunConfig, facts: dict[str, str], stop: Stop) -> int:
    """Be a worker that torchrun started; the exit code that it wants, by ``leave``.

    torchrun knows 0 and not 0, and restarts what isn't 0: so ``stopped`` is a good end here, and who wants to know
    more reads ``outcome.json``.
    """
    os.environ.pop("OMP_NUM_THREADS", None)  # which torchrun sets to 1 where nobody has said anything
    stop.hurry, watch = False, Watch()
    watch.beat()
    return _exit_code(_attempt(config, facts, stop, watch, _end_under_torchrun))


def work(config: RunConfig, facts: dict[str, str], stop: Stop, watch: Watch) -> NoReturn:
    """Be a worker that our own agent started."""
    leave(_exit_code(_attempt(config, facts, stop, watch, _leave_word)))


def leave(code: int) -> NoReturn:
    """End this process now: what torch does at a normal end takes time, and may hang."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    with suppress(OSError, ValueError):
        show_cursor()
    os._exit(code)


def _enter(run: RunDir, guard: Callable[[TextIO], None] | None, lost: Callable[[str], None]) -> None:
    """What a worker does once the run directory is its launch's: errors, stacks and other ranks' output go there."""
    global _entered, _terminal
    _entered = run
    if run.held:
        run.held.keep(lost)
    rank = os.environ.get("RANK", "0")
    log = open(log_of(run, rank), "a")  # noqa: SIM115  as long as this process lives
    if guard:
        faulthandler.register(signal.SIGQUIT, log)
        guard(log)
    if rank == "0":
        write_note(_store, "entered", str(run.path.absolute()))
        return
    sys.stdout.flush()
    sys.stderr.flush()
    _terminal = os.fdopen(os.dup(2), "w")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def _attempt(
    config: RunConfig,
    facts: dict[str, str],
    stop: Stop,
    watch: Watch,
    failed: Callable[[Note, dict[str, str]], Note],
    *,
    guarded: bool = True,
) -> Outcome | Note:
    """The body of every worker, however it was started.

    Args:
        failed: what to do about the note of this worker's error.
        guarded: end this process where it hangs.

    Returns:
        How the training ended, or the note of an error.
    """
    global _store

    def fail(error: BaseException) -> Note:
        global _entered
        KEPT.append(error)  # its traceback holds what must not be destroyed
        if isinstance(error, UserError) and _entered and _entered.held:
            _entered.held.release()
        elif _entered and (gone := _entered.gone):
            error, _entered = Fatal(gone), _entered.now  # it explains whatever it has led to
        return failed(error_note(error, rank, facts["attempt"], _entered, watch.reached), facts)

    def give_up(error: Exception) -> None:
        saying = threading.Thread(target=fail, args=(error,), daemon=True)
        saying.start()
        saying.join(HANG_S)
        leave(EXIT_CODE["crashed"])

    def lose(cause: str) -> None:
        with watch.excused():
            give_up(Fatal(cause))

    rank = int(os.environ.get("RANK", "0"))
    try:
        import_torch(config)
        import torch

        from isobatch.trainers.ranks.world import World, meeting_point
        from isobatch.trainers.run import train

        _store = meeting_point(config.cluster.timeout_s)
        world = World.join(config.device, config.cluster.timeout_s)
        torch.set_num_threads(_threads(config, world.local_size))
        gc.freeze()
        gc.enable()
        if limit := read_note(lasting(_store), "per_gpu_limit"):
            facts = facts | {"per_gpu_limit": str(limit)}
        launches = " ".join(world.gather(facts["attempt"]))
        facts = json.loads(world.agree(json.dumps(facts))) | {"launches": launches}
        guard = partial(watch.guard, config.cluster.timeout_s, world.wait_patiently, give_up)
        end = train(
            config,
            facts,
            world,
            stop,
            partial(_enter, guard=guard if guarded else None, lost=lose),
            watch,
        )
        watch.unguard()
        if _entered and _entered.held:
            _entered.held.release()
        if rank == 0:
            write_note(_store, "end", asdict(end))
        world.leave()
        return end
    except BaseException as error:
        watch.unguard()
        return fail(error)


def _say_at_once(note: Note, facts: dict[str, str]) -> Note:
    """Be the only worker: nobody else says what went wrong."""
    note.pop("log", None)  # where errors are looked for, the traceback is wanted here
    bury(note, _entered, facts["attempt"])
    return note


def _leave_word(note: Note, facts: dict[str, str]) -> Note:
    """Tell our agent, who does the rest."""
    leave_word(_store, note["rank"], note)
    return note


def _end_under_torchrun(note: Note, facts: dict[str, str]) -> Note:
    """The first worker that fails says for all what happened, and leaves word of it for torchrun's next start."""
    _leave_word(note, facts)
    first = os.environ["RANK"] == "0"
    with suppress(RuntimeError):  # torchrun, which keeps the store, is gone
        first = _store.add("failures", 1) == 1 if _store else first
    if not first:
        return note
    error = await_words(_store, int(os.environ["WORLD_SIZE"])) or note
    kept = lasting(_store)
    before = read_note(kept, "furthest")
    error = judged(error, -1 if before is None else before)
    end = bury(error, _entered, facts["attempt"], restarts(), _terminal)
    if not error["retry"]:
        write_note(kept, "final", {"kind": error["kind"], "cause": end.cause})
        return note
    if "limit" in error:
        write_note(kept, "per_gpu_limit", error["limit"])
    else:
        write_note(kept, "furthest", max(error["step"], before or 0))
    if _entered and restarts() < int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        note_restart(error, _entered, restarts() + 1)
    return note


def _before_restart(facts: dict[str, str], agent: Agent) -> None:
    """Say why the workers are started again, and with how many samples at once where memory ran out."""
    error = agent.error
    if error is None:
        return
    smaller = ""
    if "limit" in error:
        facts["per_gpu_limit"] = str(error["limit"])
        smaller = f" with batch.per_gpu={error['limit']}"
    if agent.leads:
        say(f"isobatch: {said(error)}; starting the workers again{smaller}", sys.stderr)
        if agent.run_dir:
            note_restart(error, agent.run_dir, agent.starts)


def _exit_code(end: Outcome | dict[str, Any]) -> int:
    return 0 if isinstance(end, Outcome) else EXIT_CODE[end["kind"]]


def _threads(config: RunConfig, local_size: int) -> int:
    """What OMP_NUM_THREADS asked for (of a list, its first level), else a worker's share of this machine's cores.

    Sums within an operation are rounded by their number. So where numerics are bitwise it is 1 everywhere, whatever
    OMP_NUM_THREADS asks for, which can't be heard under torchrun.
    """
    if config.numerics == "bitwise":
        return 1
    asked = os.environ.get(THREADS, "").partition(",")[0]
    return max(1, int(asked) if asked.isdecimal() else _cores() // local_size)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def import_torch(config: RunConfig) -> None:
    """Import torch, with all that training imports later, once for all workers that are forked from here."""
    os.environ.update({name: str(value) for name, value in config.cluster.environment.items()})
    os.environ.setdefault(THREADS, os.environ.get("OMP_NUM_THREADS", ""))
    os.environ["OMP_NUM_THREADS"] = "1"  # children of a process that ever had a second one hang; workers ask for more
    if config.numerics == "bitwise":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS isn't deterministic
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # to count GPUs without starting CUDA, which can't be forked
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings say what the exceptions say, with C++ stacks
    gc.disable()  # 0.5 s of looking through what stays anyway; workers turn it on again
    import torch
    import torch._dynamo  # noqa: F401
