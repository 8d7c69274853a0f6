"""Call a task's ``prepare()`` on one process of each machine in turn, without a time limit."""

from __future__ import annotations

import inspect
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress

from isobatch.conf.terminal import say
from isobatch.scaling.errors import UserError
from isobatch.trainers.model.randomness import generators_kept
from isobatch.trainers.ranks.failure import Hangs
from isobatch.trainers.ranks.internals import Store
from isobatch.trainers.ranks.session import stop_signal
from isobatch.trainers.ranks.signals import Stop, Stopped
from isobatch.trainers.ranks.world import World
from isobatch.trainers.tasks.task import Task

LOOK_S = 0.2  # polling interval of a waiting rank
FAILED, STOPPED, ALIVE, DONE = ("prepare/failed", "prepare/stopped", "prepare/alive", "prepare/done/{}")


def prepare_data(task: Task, world: World, stop: Stop, timeout_s: float) -> str:
    """Call the task's ``prepare()`` on local rank 0 of one machine after another, while the other ranks wait.

    There is no time limit. A signal interrupts ``prepare()``. An exception ends all ranks.

    Args:
        timeout_s: time without a heartbeat after which another machine counts as lost.

    Returns:
        The signal that asked any rank to stop meanwhile, the same on all ranks; empty if there was none.

    Raises:
        UserError: ``prepare()`` takes arguments.
        Hangs: the rank that prepares the data failed, or its machine is lost.
    """
    if not task.has("prepare"):
        return ""
    try:
        inspect.signature(task.own.prepare).bind()
    except TypeError as error:
        problem = f"{type(task.own).__name__}.prepare() can't be called without arguments: {error}"
        raise UserError(problem, "let it take only self, or rename it") from None
    first = [rank for rank, local in enumerate(world.gather(str(world.local_rank))) if local == "0"]
    own_turn = sum(rank <= world.rank for rank in first) - 1  # index of this machine
    if world.rank == 0:
        say("preparing the data …")
    for turn, rank in enumerate(first):
        if rank == world.rank:
            with _answering(world.store, stop) if world.size > 1 else nullcontext():
                _prepare(task, world.store, stop)
            if world.store:
                world.store.set(*((STOPPED, stop.wanted) if stop.wanted else (DONE.format(turn), "")))
        elif not _await(DONE.format(turn), rank, world.store, stop, None if turn == own_turn else timeout_s):
            break
        if stop.wanted:
            break
    return stop_signal(stop, world)


def _prepare(task: Task, store: Store | None, stop: Stop) -> None:
    try:
        with suppress(Stopped), stop.interrupting(), generators_kept():  # only some ranks call it
            task.prepare()
    except BaseException:
        if store:
            with suppress(RuntimeError):  # the store's host is gone
                store.set(FAILED, "")
        raise


@contextmanager
def _answering(store: Store | None, stop: Stop) -> Iterator[None]:
    """Send heartbeats to the other machines, and stop this process if one of them was asked to stop."""
    assert store
    over = threading.Event()

    def answer() -> None:
        with suppress(RuntimeError):  # the store's host is gone
            while not over.wait(LOOK_S):
                store.add(ALIVE, 1)
                if store.check([STOPPED]) and not stop.wanted:
                    os.kill(os.getpid(), signal.Signals[store.get(STOPPED).decode()])
                    return

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _await(key: str, rank: int, store: Store | None, stop: Stop, lost_s: float | None) -> bool:
    """Wait until ``rank`` has set ``key``; return False if any rank was asked to stop first.

    Args:
        lost_s: time without a heartbeat after which the machine of ``rank`` counts as lost; None: it is this machine.

    Raises:
        Hangs: ``rank`` failed, or is lost.
    """
    assert store
    seen, looks = -1, 0
    while not store.check([key]):
        if stop.wanted:
            store.set(STOPPED, stop.wanted)
        if store.check([STOPPED]):
            stop.wanted = stop.wanted or store.get(STOPPED).decode()
            return False
        if store.check([FAILED]):
            raise Hangs(f"rank {rank} failed in prepare()", waiting=True)
        if lost_s is not None:
            alive = store.add(ALIVE, 0)
            seen, looks = alive, looks + 1 if alive == seen else 0  # counts polls, as this job may be suspended
            if looks * LOOK_S > lost_s:
                raise Hangs(f"no heartbeat from rank {rank}, which prepares the data, for {lost_s:g} s", waiting=True)
        time.sleep(LOOK_S)
    return True
