"""Look at data in a process that is thrown away, so that no look moves a dataset's state or its place in a file."""

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

from isobatch.trainers.data.loader import begin_worker
from isobatch.trainers.model.randomness import generators_kept
from isobatch.trainers.tasks.task import Task

LOOK_S = 60.0  # at most, for one look: a dataset that can't be used after a fork may hang


@dataclass(frozen=True, slots=True)
class Unseen:
    """Say why a look saw nothing."""

    why: str


def look(
    works: Sequence[Callable[[], Any]], beat: Callable[[], None] = lambda: None, *, here: bool = False
) -> list[Any]:
    """Return what each of ``works`` returns in a forked process, or ``Unseen`` where that failed.

    Args:
        beat: called after each of them.
        here: they change nothing but the default generators, so this process can do them.
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
        except (OSError, RuntimeError) as error:  # the process died, was too slow, or couldn't be had
            found += [Unseen(str(error).splitlines()[0])] * (len(works) - len(found))
    return found


def has_no_state(data: Any, task: Task) -> bool:
    """Tell whether fetching a sample of ``data`` changes nothing, so that this process can look at it."""
    return type(data) is TensorDataset and not task.has("augment") and not task.has("collate")


def _forked(works: Sequence[Callable[[], Any]]) -> Generator[bytes, None, None]:
    """Yield what each of ``works`` returns in a DataLoader's worker, pickled."""
    loader: Any = DataLoader(
        works,  # type: ignore[arg-type]
        batch_size=None,
        num_workers=1,
        timeout=LOOK_S,
        collate_fn=_packed,  # type: ignore[arg-type]
        worker_init_fn=begin_worker,
        multiprocessing_context="fork",
        generator=torch.Generator(),  # else it draws from the default one
    )
    results = iter(loader)
    try:
        yield from results
    finally:
        results._shutdown_workers()


def _packed(work: Callable[[], Any]) -> bytes:
    """Pickle what ``work`` returns, here: what can't be pickled would be lost on the way, and waited for."""
    packed = _seen(pickle.dumps, _seen(work), failing="a sample or batch can't be pickled: ")
    return packed if isinstance(packed, bytes) else pickle.dumps(packed)


def _seen(work: Callable[..., Any], *args: Any, failing: str = "") -> Any:
    try:
        return work(*args)
    except Exception as error:
        return Unseen(f"{failing}{type(error).__name__}: {error}")


@contextmanager
def _places_in_files_kept() -> Iterator[None]:
    """Put back where open files are read next: a forked process shares that with this one."""
    places = dict(_places_in_files())
    try:
        yield
    finally:
        for descriptor, place in places.items():
            with suppress(OSError):
                os.lseek(descriptor, place, os.SEEK_SET)


def _places_in_files() -> Iterator[tuple[int, int]]:
    """Every regular file that is open for reading alone: where others are written, other ranks may write, too."""
    with suppress(OSError):
        for name in map(int, os.listdir("/proc/self/fd")):
            with suppress(OSError):
                reads = fcntl.fcntl(name, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
                if reads and stat.S_ISREG(os.fstat(name).st_mode):
                    yield name, os.lseek(name, 0, os.SEEK_CUR)
