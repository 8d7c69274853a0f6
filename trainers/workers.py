"""Starting the workers of this machine, what each of them does, and how all of it ends. Torch-free until used.

torch 2.13's gloo hangs at a process's normal end (pytorch #190489: its destructor waits, holding the interpreter's
lock, for threads that need it). So nothing of a training is let go of, and every worker leaves by ``os._exit``.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NoReturn

from trainers.notes import error_note, first_error, log_of, restarts, write_final, write_note
from trainers.rundir import EXIT_CODE, Outcome, RunDir
from trainers.stop import Stop, Stopped, show_cursor

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

    from conf.schema import RunConfig
    from trainers.agent import Agent

HINDSIGHT_S = 0.2  # for the error of another rank, which may be the cause of rank 0's own

_kept: list[BaseException] = []  # their tracebacks hold what must not be destroyed
_store: Store | None = None  # where this worker leaves notes
_entered: RunDir | None = None  # its run directory


def launch(config: RunConfig, facts: dict[str, str], stop: Stop) -> int:
    """Train with this machine's workers, or in this process for ``debug``; say once what went wrong.

    Returns:
        The command's exit code.

    Raises:
        Refused: it can't work, and nothing was started.
    """
    if config.debug:
        result = _attempt(config, facts, stop)
        if isinstance(result, Outcome):
            return result.exit_code
        result.pop("log", None)  # where errors are looked for, the traceback is wanted here
        return _bury(result, _entered, facts).exit_code
    import_torch(config)
    import torch
    from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousTimeoutError

    import trainers.run  # noqa: F401  the workers are forked with it
    from conf.hardware import workers_here
    from trainers.agent import Agent
    from trainers.rendezvous import rendezvous

    cluster, handler, agent = config.cluster, None, None
    cause = "rank 0 ended without a result"
    stopped = ""
    try:
        handler, address = rendezvous(config, stop)
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
            on_restart=_tell_of_restart,
        )
        agent.run()
        if agent.end:
            return agent.end.exit_code
        cause = cause if agent.leads else "the machine of rank 0 is gone"
    except Stopped as signal:
        stopped = f"{signal}, while waiting for other machines"
    except RendezvousError as error:
        late = isinstance(error, RendezvousTimeoutError)
        why = f"not all {cluster.nodes} came within {cluster.timeout_s:g} s" if late else str(error)
        cause = f"the machines didn't meet at cluster.rendezvous={cluster.rendezvous}: {why or type(error).__name__}"
    finally:
        if handler:
            handler.shutdown()
    note = (agent and agent.error) or {"kind": "crashed", "again": False, "cause": cause}
    if stopped:
        note |= {"kind": "stopped", "again": False, "cause": stopped}
    run = agent.run_dir if agent and agent.leads else None
    return _bury(note, run, facts, agent.restarts if agent else 0).exit_code


def as_worker(config: RunConfig, facts: dict[str, str], stop: Stop) -> int:
    """Be a worker that torchrun started; the exit code that it wants, by ``leave``.

    torchrun knows 0 and not 0, and restarts what isn't 0: so ``stopped`` is a good end here, and who wants to know
    more reads ``outcome.json``.
    """
    stop.hurry = False
    end = _attempt(config, facts, stop, HINDSIGHT_S)
    if isinstance(end, dict) and os.environ["RANK"] == "0":
        _bury(end, _entered, facts, restarts())
    return _exit_code(end)


def work(config: RunConfig, facts: dict[str, str], stop: Stop) -> NoReturn:
    """Be a worker that our own agent started."""
    leave(_exit_code(_attempt(config, facts, stop)))


def leave(code: int) -> NoReturn:
    """End this process now: what torch does at a normal end takes time, and may hang."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    with suppress(OSError, ValueError):
        show_cursor()
    os._exit(code)


def entered(run: RunDir) -> None:
    """What a worker does once the run directory is its launch's: errors and other ranks' output go there."""
    global _entered
    _entered = run
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        write_note(_store, "entered", str(run.path.absolute()))
        return
    sys.stdout.flush()
    sys.stderr.flush()
    with open(log_of(run, rank), "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def _attempt(
    config: RunConfig, facts: dict[str, str], stop: Stop, hindsight_s: float = 0.0
) -> Outcome | dict[str, Any]:
    """The body of every worker, however it was started.

    Args:
        hindsight_s: how long rank 0 looks for another rank's error, which may be the cause of its own.

    Returns:
        How the training ended, or the note of an error.
    """
    global _store
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        import_torch(config)
        import torch

        from trainers.run import train
        from trainers.world import World, meeting_point

        _store = meeting_point(config.cluster.timeout_s)
        world = World.join(config.device, config.cluster.timeout_s)
        threads = config.cluster.environment.get("OMP_NUM_THREADS", _cores() // world.local_size)
        torch.set_num_threads(max(1, int(threads)))
        gc.freeze()
        gc.enable()
        facts = json.loads(world.agree(json.dumps(facts)))
        end = train(config, facts, world, stop, entered)
        world.leave()
        if rank == 0:
            write_note(_store, "end", asdict(end))
        return end
    except BaseException as error:
        _kept.append(error)
        note = error_note(error, rank, facts["attempt"], _entered)
        if _store is not None:
            write_note(_store, f"error/{rank}", note)
            if not note["again"]:
                write_final(_store, note)
            if rank == 0:
                time.sleep(hindsight_s)
                note = first_error(_store, size) or note
        return note


def _bury(error: dict[str, Any], run: RunDir | None, facts: dict[str, str], restarted: int = 0) -> Outcome:
    """Say once what ended the run, and write it down where the run directory is this launch's."""
    cause, where = error["cause"], ""
    if error["again"]:
        cause = f"rank {error['rank']} crashed: {cause}"
        where = f"; traceback in {error['log']}" if "log" in error else ""
        if not where:
            print(error.get("traceback", ""), end="", file=sys.stderr)
    print(f"isobatch: {cause}{where}", file=sys.stderr)
    step, samples = error.get("step", 0), error.get("samples", 0)
    end = Outcome(error["kind"], cause, step, samples, facts["attempt"], restarted)
    if run:
        run.event(end.state, cause=cause, step=step, samples=samples)
        run.write_outcome(end)
    return end


def _exit_code(end: Outcome | dict[str, Any]) -> int:
    return 0 if isinstance(end, Outcome) else EXIT_CODE[end["kind"]]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def import_torch(config: RunConfig) -> None:
    """Import torch, with all that training imports later, once for all workers that are forked from here."""
    os.environ.update({name: str(value) for name, value in config.cluster.environment.items()})
    os.environ["OMP_NUM_THREADS"] = "1"  # children of a process that ever had a second one hang; workers ask for more
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # to count GPUs without starting CUDA, which can't be forked
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings say what the exceptions say, with C++ stacks
    gc.disable()  # 0.5 s of looking through what stays anyway; workers turn it on again
    import torch
    import torch._dynamo  # noqa: F401


def _tell_of_restart(agent: Agent) -> None:
    if agent.leads and agent.error:
        rank, cause = agent.error["rank"], agent.error["cause"]
        print(f"isobatch: rank {rank} crashed: {cause}; starting the workers again", file=sys.stderr)
        if agent.run_dir:
            agent.run_dir.event("restart", rank=rank, cause=cause)
