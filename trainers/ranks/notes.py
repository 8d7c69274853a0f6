"""Notes that ranks leave in the store they share, for each other and for the launchers. Torch-free."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import TypeAdapter

from isobatch.trainers.ranks.failure import Failure
from isobatch.trainers.ranks.trails import parting

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

GRACE_S = 3.0  # for workers to end, and to say why, after one has failed
ABORTED = "killed by SIGABRT"  # gloo does so to a process that gets a longer message than it waits for

T = TypeVar("T")
_adapter: Callable[[Any], TypeAdapter[Any]] = cache(TypeAdapter)


def to_json(value: Any) -> str:
    """Return a dataclass or a plain value as JSON."""
    return _adapter(type(value)).dump_json(value).decode()


def from_json(text: str | bytes, kind: type[T]) -> T:
    """Return a ``kind`` from its JSON. Raises ValueError for another type, as where machines run different versions."""
    value: T = _adapter(kind).validate_json(text)
    return value


def write_note(store: Store | None, key: str, value: Any) -> None:
    """Leave a note for the agents and the other ranks; nothing where there is nobody to read it any more."""
    with suppress(RuntimeError):
        if store:
            store.set(key, to_json(value))


def read_note(store: Store | None, key: str, kind: type[T]) -> T | None:
    """Return the note under ``key``; None if there is none, or the process that kept it is gone."""
    with suppress(RuntimeError):
        if store and store.check([key]):
            return from_json(store.get(key), kind)
    return None


def note_failure(store: Store | None, failure: Failure) -> None:
    """Note why a rank failed. Its first note holds: later ones are consequences, or guesses of an agent."""
    with suppress(RuntimeError):
        if store:
            store.compare_set(f"error/{failure.rank}", "", to_json(failure))


def first_failure(store: Store | None, size: int) -> Failure | None:
    """Return the earliest failure that any of ``size`` ranks has noted, with how far any of them had come.

    A rank that lost another is never the first, where there is any other failure. Where there isn't, the ranks that
    left no note of their own are named, as ``silent_ranks``. Where ranks lost each other because they ran different
    modules, that is the failure.
    """
    notes = {rank: note for rank in range(size) if (note := read_note(store, f"error/{rank}", Failure))}
    own = {rank: note for rank, note in notes.items() if not note.silent}
    if not own:
        return None
    first = min(own.values(), key=lambda note: (note.lost, note.time))
    if silent := tuple(rank for rank in range(size) if rank not in own and first.lost):
        why = f"no word from rank {', '.join(map(str, silent))} (hanging, killed, or its machine is gone)"
        cause = f"{why}; rank {first.rank}: {first.cause}"
        first = replace(first, rank=silent[0], cause=cause, silent_ranks=silent)
    if (first.lost or ABORTED in first.cause) and (cause := parting(store, range(size)) or ""):
        first = replace(first, kind="refused", again=False, cause=cause)
    furthest = {key: max(getattr(note.reached, key) for note in notes.values()) for key in ("step", "samples")}
    return replace(first, reached=replace(first.reached, **furthest))


def await_failure(store: Store | None, size: int, own: set[int] | None = None) -> Failure | None:
    """Return ``first_failure`` once all ranks but ``own`` have noted theirs, where that may change which was first."""
    deadline = time.monotonic() + GRACE_S
    while True:
        failure = first_failure(store, size)
        if failure is None or set(failure.silent_ranks) <= (own or set()) or time.monotonic() > deadline:
            return failure
        time.sleep(0.1)


def lasting(store: Store | None) -> Store | None:
    """Return the store in which later starts find notes, too: torchrun keeps one store for all of them."""
    return getattr(store, "underlying_store", store)
