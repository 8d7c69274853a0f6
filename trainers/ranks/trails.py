"""Record the order of modules that each rank runs, which has to be the same on all ranks if forwards send messages.

Messages are paired by their order alone, so ranks that call different modules get each other's weights and gradients,
hang, or abort in the middle of a message. Then the trails, which lie in the ranks' store, say which modules those were.
Torch-free.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Iterable
from contextlib import suppress
from itertools import cycle, islice
from typing import TYPE_CHECKING, NamedTuple

from isobatch.scaling.errors import UserError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

BACKWARD = " (backward)"  # behind a module's name, where a message is for its gradients
SHOWN = 6  # modules or ranks that an error names
READ = "trail/read"  # how many ranks have read all trails
TOLD_S = 3.0  # for all ranks to tell their trails, once a difference has been found


class Trail:
    """Record what this rank runs in a step, and compare it with the other ranks.

    The store learns of a step where it differs from the run's first pass of its kind: a rank that is aborted can't say
    what it ran. As a context manager the trail stands for one pass, and tells where that fails.

    Args:
        instead: what the user can do where ranks run different modules.
    """

    def __init__(self, store: Store | None, rank: int, size: int, instead: str) -> None:
        self._store, self._rank, self._size, self._instead = store, rank, size, instead
        self._step, self._number = list[str](), 0
        self._start = self._written = 0  # in the step: where this pass starts, and how much the store knows
        self._known: dict[str, list[str]] = {}  # the first pass of each kind
        self._kind, self._usual = "", list[str]()
        self._lock = threading.Lock()
        self._modulus = 2**26 // size  # so that float64 holds the square of the sum over ranks exactly

    def begin(self, kind: str) -> Trail:
        """Start a pass: ``training`` or ``evaluation``."""
        self._keep_usual()
        self._start, self._kind, self._usual = len(self._step), kind, self._known.get(kind, [])
        return self

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if error:
            self.tell()

    def ran(self, name: str) -> None:
        """Add what the next message is for."""
        self._step.append(name)
        at = len(self._step) - 1 - self._start
        if self._written or at >= len(self._usual) or self._usual[at] != name:
            self.tell()

    def tell(self) -> None:
        """Leave this step's trail in the store."""
        with self._lock, suppress(RuntimeError):
            more = self._step[self._written :]
            if self._store and more:
                key, text = f"trail/{self._rank}", "".join(f"\n{name}" for name in more)
                if self._written:
                    self._store.append(key, text)  # type: ignore[attr-defined]
                else:
                    self._store.set(key, f"{self._number}\n{self._kind}\n{self._instead}{text}")
            self._written += len(more)

    def numbers(self) -> tuple[float, float]:
        """Return a hash of this step, and its square. With their sums over N ranks, all are equal if N Σh² = (Σh)²."""
        found = zlib.crc32("\n".join(self._step).encode()) % self._modulus
        return float(found), float(found * found)

    def check(self, total: float, squares: float) -> None:
        """End the step, given the sums of ``numbers`` over all ranks. Raises UserError where their modules differ."""
        if self._size * squares != total * total:
            self.tell()
            raise UserError(self._await_parting() or _sentence(self._kind, "", self._instead))
        self._keep_usual()
        with self._lock:
            self._step, self._start, self._written, self._number = [], 0, 0, self._number + 1

    def parting(self) -> str | None:
        """Say what this rank, which makes no progress, ran otherwise than rank 0; None: nothing shows that it did."""
        self.tell()
        return parting(self._store, [0, self._rank], supposing=False) if self._rank else None

    def _keep_usual(self) -> None:
        if self._kind and self._kind not in self._known and self._step:
            self._known[self._kind] = self._step[self._start :]
            if self._rank == 0 and self._store:
                with suppress(RuntimeError):
                    self._store.set(f"trail/{self._kind}", "\n".join(self._known[self._kind]))

    def _await_parting(self) -> str | None:
        """``parting``, once all ranks have told the trails of this step."""
        deadline = time.monotonic() + TOLD_S
        while time.monotonic() < deadline:
            told = _told(self._store, range(self._size))
            if [one.number for one in told.values()] == [self._number] * self._size:
                self._await_readers(deadline)
                trails = {rank: one.names for rank, one in told.items()}
                return _sentence(self._kind, _only(trails) or _first(trails, whole=True), self._instead)
            time.sleep(0.02)
        return parting(self._store, range(self._size))

    def _await_readers(self, deadline: float) -> None:
        """Let all ranks read the trails before rank 0, whose process may keep the store, ends."""
        with suppress(RuntimeError):
            read = self._store.add(READ, 1) if self._store else self._size
            while self._store and self._rank == 0 and read < self._size and time.monotonic() < deadline:
                time.sleep(0.02)
                read = self._store.add(READ, 0)


class Told(NamedTuple):
    """What the store knows of a rank's last unusual step, after ``number`` steps and evaluations."""

    number: int
    kind: str
    instead: str
    names: list[str]


def parting(store: Store | None, ranks: Iterable[int], *, supposing: bool = True) -> str | None:
    """Say where ``ranks`` ran different modules, as far as their trails show; None: they don't show that.

    Args:
        supposing: a rank that has told nothing of the latest step ran what is usual.
    """
    ranks = list(ranks)
    told = _told(store, ranks)
    latest = max(told.values(), key=lambda one: one.number, default=None)
    if latest is None:
        return None
    usual = (supposing and _read(store, latest.kind)) or []
    names = {rank: one.names for rank, one in told.items() if one.number == latest.number}
    longest = max(map(len, names.values()))
    absent = {rank: list(islice(cycle(usual), longest)) for rank in ranks if rank not in names and usual}
    found = _first(names | absent, whole=False)
    return _sentence(latest.kind, found, latest.instead) if found else None


def _sentence(kind: str, found: str, instead: str) -> str:
    where = "one step" if kind == "training" else f"one {kind}"
    return f"the ranks ran different modules in {where}{found and f': {found}'}; {instead}"


def _first(trails: dict[int, list[str]], *, whole: bool) -> str:
    """Say what ranks ran where their trails part, or else ""; ``whole`` ones part where one ends before another."""
    lengths = [len(names) for names in trails.values()]
    for at in range(max(lengths) if whole else min(lengths)):
        here = {rank: names[at] if at < len(names) else "nothing more" for rank, names in sorted(trails.items())}
        if len(set(here.values())) > 1:
            return ", ".join(f"{_ranks(here, name)} ran {name}" for name in dict.fromkeys(here.values()))
    return ""


def _only(trails: dict[int, list[str]]) -> str:
    """Say which modules only some ranks ran in complete trails; empty where they only differ in order or number."""
    ran = {rank: dict.fromkeys(name.removesuffix(BACKWARD) for name in names) for rank, names in trails.items()}
    by = {name: {rank: name for rank in sorted(ran) if name in ran[rank]} for names in ran.values() for name in names}
    some = [f"only {_ranks(which, name)} ran {name}" for name, which in by.items() if len(which) < len(trails)]
    return ", ".join(some[:SHOWN]) + (f", and {len(some) - SHOWN} more" if len(some) > SHOWN else "")


def _ranks(ran: dict[int, str], name: str) -> str:
    """Name the ranks that ran ``name``."""
    ranks = [str(rank) for rank, its in ran.items() if its == name]
    more = f" and {len(ranks) - SHOWN} more" if len(ranks) > SHOWN else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks[:SHOWN])}{more}"


def _told(store: Store | None, ranks: Iterable[int]) -> dict[int, Told]:
    found = {rank: lines for rank in ranks if (lines := _read(store, rank))}
    return {rank: Told(int(lines[0]), lines[1], lines[2], lines[3:]) for rank, lines in found.items()}


def _read(store: Store | None, of: int | str) -> list[str] | None:
    with suppress(RuntimeError):
        if store and store.check([f"trail/{of}"]):
            return str(store.get(f"trail/{of}").decode()).split("\n")
    return None
