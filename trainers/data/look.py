"""Run functions on data in a forked process, so that they don't change a dataset's state or its file positions."""

from __future__ import annotations

import fcntl
import os
import pickle
import stat
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from isobatch.scaling.errors import UserError
from isobatch.trainers.data.loader import begin_worker
from isobatch.trainers.model.randomness import generators_kept
from isobatch.trainers.tasks.task import Task

LOOK_S = 60.0  # time limit of one function: a dataset that doesn't survive a fork may hang


@dataclass(frozen=True, slots=True)
class Unseen:
    """Hold the reason why a function failed in the forked process.

    Attributes:
        refused: the parts of the UserError that it raised; None: it raised another error.
    """

    why: str
    refused: tuple[Any, ...] | None = None


def look(
    works: Sequence[Callable[[], Any]], beat: Callable[[], None] = lambda: None, *, here: bool = False
) -> list[Any]:
    """Run each of ``works`` in a forked process, and return its result, or ``Unseen`` if it failed.

    Args:
        beat: called after each function.
        here: run the functions in this process, because they change nothing but the default generators.
    """
    if here or not works or sys.platform != "linux":
        with generators_kept():
            return [_seen(work) for work in works]
    found: list[Any] = []
    with _places_in_files_kept(), closing(_forked(works)) as results:
        try:
            for _ in works:
                found.append(_seen(pickle.loads, next(results), failing="a sample or batch can't be unpickled: "))
                beat()
        except (OSError, RuntimeError) as error:  # the process died, was too slow, or couldn't be started
            found += [Unseen(str(error).splitlines()[0])] * (len(works) - len(found))
    return found


def has_no_state(data: Any, task: Task) -> bool:
    """Return whether fetching a sample of ``data`` changes no state, so that no fork is needed."""
    return type(data) is TensorDataset and not task.has("augment") and not task.has("collate")


def _forked(works: Sequence[Callable[[], Any]]) -> Generator[bytes, None, None]:
    """Yield the pickled result of each of ``works``, run in a DataLoader worker."""
    loader: Any = DataLoader(
        works,  # type: ignore[arg-type]
        batch_size=None,
        num_workers=1,
        timeout=LOOK_S,
        collate_fn=_packed,  # type: ignore[arg-type]
        worker_init_fn=begin_worker,
        multiprocessing_context="fork",
        generator=torch.Generator(),  # else DataLoader draws from the default generator
    )
    results = iter(loader)
    try:
        yield from results
    finally:
        results._shutdown_workers()


def _packed(work: Callable[[], Any]) -> bytes:
    """Pickle the result of ``work`` in the worker: DataLoader would wait forever for one that can't be pickled."""
    packed = _seen(pickle.dumps, _seen(work), failing="a sample or batch can't be pickled: ")
    return packed if isinstance(packed, bytes) else pickle.dumps(packed)


def _seen(work: Callable[..., Any], *args: Any, failing: str = "") -> Any:
    try:
        return work(*args)
    except Exception as error:
        refused = error.args if isinstance(error, UserError) else None
        return Unseen(f"{failing}{type(error).__name__}: {error}", refused)


@contextmanager
def _places_in_files_kept() -> Iterator[None]:
    """Restore the positions of open files afterwards: a forked process shares them with this process."""
    places = dict(_places_in_files())
    try:
        yield
    finally:
        for descriptor, place in places.items():
            with suppress(OSError):
                os.lseek(descriptor, place, os.SEEK_SET)


def _places_in_files() -> Iterator[tuple[int, int]]:
    """Yield descriptor and position of each regular file that is open for reading only; ranks may share other files."""
    with suppress(OSError):
        for name in map(int, os.listdir("/proc/self/fd")):
            with suppress(OSError):
                reads = fcntl.fcntl(name, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
                if reads and stat.S_ISREG(os.fstat(name).st_mode):
                    yield name, os.lseek(name, 0, os.SEEK_CUR)
