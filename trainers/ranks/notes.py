"""Exchange notes between ranks and launchers through the ranks' store. Torch-free."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import TypeAdapter

from isobatch.trainers.ranks.failure import Failure
from isobatch.trainers.ranks.trails import describe_mismatch

if TYPE_CHECKING:
    from isobatch.trainers.ranks.internals import Store

GRACE_S = 3.0  # for the other workers to end and report why, once one has failed
ABORTED = "killed by SIGABRT"  # gloo aborts a process that receives a longer message than it expects

T = TypeVar("T")
_adapter: Callable[[Any], TypeAdapter[Any]] = cache(TypeAdapter)


def to_json(value: Any) -> str:
    """Return a dataclass or a plain value as JSON."""
    return _adapter(type(value)).dump_json(value).decode()


def from_json(text: str | bytes, kind: type[T]) -> T:
    """Parse JSON as a ``kind``. Raises ValueError if it doesn't match, such as JSON from another version."""
    value: T = _adapter(kind).validate_json(text)
    return value


def write_note(store: Store | None, key: str, value: Any) -> None:
    """Write a note for the agents and the other ranks. Does nothing if the store is gone."""
    with suppress(RuntimeError):
        if store:
            store.set(key, to_json(value))


def read_note(store: Store | None, key: str, kind: type[T]) -> T | None:
    """Return the note at ``key``; None if there is none, or if the store is gone."""
    with suppress(RuntimeError):
        if store and store.check([key]):
            return from_json(store.get(key), kind)
    return None


def note_failure(store: Store | None, failure: Failure) -> None:
    """Record why a rank failed. Only the first note counts: later ones are consequences, or an agent's guesses."""
    with suppress(RuntimeError):
        if store:
            store.compare_set(f"error/{failure.rank}", "", to_json(failure))


def first_failure(store: Store | None, size: int) -> Failure | None:
    """Return the earliest failure recorded by any of ``size`` ranks, with the furthest step that any rank reached.

    A rank that only lost another one counts as first if nothing else failed; ``silent_ranks`` then lists the ranks
    that left no note of their own. If ranks lost each other because they ran different modules, that mismatch is
    the failure.
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
    if (first.lost or ABORTED in first.cause) and (cause := describe_mismatch(store, range(size)) or ""):
        first = replace(first, kind="refused", again=False, cause=cause)
    furthest = {key: max(getattr(note.reached, key) for note in notes.values()) for key in ("step", "samples")}
    return replace(first, reached=replace(first.reached, **furthest))


def await_failure(store: Store | None, size: int, own: set[int] | None = None) -> Failure | None:
    """Return ``first_failure``, after waiting for notes of ranks outside ``own`` that could change which was first."""
    deadline = time.monotonic() + GRACE_S
    while True:
        failure = first_failure(store, size)
        if failure is None or set(failure.silent_ranks) <= (own or set()) or time.monotonic() > deadline:
            return failure
        time.sleep(0.1)


def store_of_all_starts(store: Store | None) -> Store | None:
    """Return the store that later starts also read. torchrun keeps one store for all of them."""
    return getattr(store, "underlying_store", store)
