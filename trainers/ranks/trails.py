"""Record the order of modules that each rank runs, which must be the same on all ranks if forwards send messages.

Messages are paired by order alone. Ranks that call different modules therefore get each other's weights and gradients,
hang, or abort in the middle of a message. The trails in the ranks' store then show which modules differed. Torch-free.
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
    from isobatch.trainers.ranks.internals import Store

BACKWARD = " (backward)"  # appended to a module's name if the message carries its gradients
SHOWN = 6  # most modules or ranks named in an error
READ = "trail/read"  # number of ranks that have read all trails
PUBLISH_S = 3.0  # for all ranks to publish their trails, once a difference has been found


class Trail:
    """Record the modules that this rank runs in a step, and compare them with the other ranks.

    A step is published to the store as soon as it differs from the run's first pass of its kind, because an aborted
    rank can't publish afterwards. Used as a context manager, the trail covers one pass and is published if it fails.

    Args:
        instead: the fix to suggest if ranks run different modules.
    """

    def __init__(self, store: Store | None, rank: int, size: int, instead: str) -> None:
        self._store, self._rank, self._size, self._instead = store, rank, size, instead
        self._step, self._number = list[str](), 0
        self._start = self._written = 0  # in the step: where this pass starts, and how many names are published
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
            self.publish()

    def ran(self, name: str) -> None:
        """Record the module that the next message belongs to."""
        self._step.append(name)
        at = len(self._step) - 1 - self._start
        if self._written or at >= len(self._usual) or self._usual[at] != name:
            self.publish()

    def publish(self) -> None:
        """Write this step's trail to the store."""
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
        """Return a hash of this step and its square. The hashes of N ranks are all equal if N Σh² = (Σh)²."""
        found = zlib.crc32("\n".join(self._step).encode()) % self._modulus
        return float(found), float(found * found)

    def check(self, total: float, squares: float) -> None:
        """End the step, given the sums of ``numbers`` over all ranks. Raises UserError if their modules differ."""
        if self._size * squares != total * total:
            self.publish()
            raise UserError(self._await_mismatch() or _sentence(self._kind, "", self._instead))
        self._keep_usual()
        with self._lock:
            self._step, self._start, self._written, self._number = [], 0, 0, self._number + 1

    def describe_mismatch(self) -> str | None:
        """Describe how this stalled rank's modules differ from rank 0's; None if their trails show no difference."""
        self.publish()
        return describe_mismatch(self._store, [0, self._rank], assume_usual=False) if self._rank else None

    def _keep_usual(self) -> None:
        if self._kind and self._kind not in self._known and self._step:
            self._known[self._kind] = self._step[self._start :]
            if self._rank == 0 and self._store:
                with suppress(RuntimeError):
                    self._store.set(f"trail/{self._kind}", "\n".join(self._known[self._kind]))

    def _await_mismatch(self) -> str | None:
        """Return ``describe_mismatch`` after all ranks have published the trails of this step."""
        deadline = time.monotonic() + PUBLISH_S
        while time.monotonic() < deadline:
            published = _published(self._store, range(self._size))
            if [trail.number for trail in published.values()] == [self._number] * self._size:
                self._await_readers(deadline)
                trails = {rank: trail.names for rank, trail in published.items()}
                return _sentence(self._kind, _only(trails) or _first(trails, whole=True), self._instead)
            time.sleep(0.02)
        return describe_mismatch(self._store, range(self._size))

    def _await_readers(self, deadline: float) -> None:
        """Wait until all ranks have read the trails, since the store may end with rank 0's process."""
        with suppress(RuntimeError):
            read = self._store.add(READ, 1) if self._store else self._size
            while self._store and self._rank == 0 and read < self._size and time.monotonic() < deadline:
                time.sleep(0.02)
                read = self._store.add(READ, 0)


class Published(NamedTuple):
    """A rank's last unusual step, as published in the store. ``number`` steps and evaluations came before it."""

    number: int
    kind: str
    instead: str
    names: list[str]


def describe_mismatch(store: Store | None, ranks: Iterable[int], *, assume_usual: bool = True) -> str | None:
    """Describe where ``ranks`` ran different modules; None if their trails show no difference.

    Args:
        assume_usual: assume that a rank that published nothing for the latest step ran the usual modules.
    """
    ranks = list(ranks)
    published = _published(store, ranks)
    latest = max(published.values(), key=lambda trail: trail.number, default=None)
    if latest is None:
        return None
    usual = (assume_usual and _read(store, latest.kind)) or []
    names = {rank: trail.names for rank, trail in published.items() if trail.number == latest.number}
    longest = max(map(len, names.values()))
    absent = {rank: list(islice(cycle(usual), longest)) for rank in ranks if rank not in names and usual}
    found = _first(names | absent, whole=False)
    return _sentence(latest.kind, found, latest.instead) if found else None


def _sentence(kind: str, found: str, instead: str) -> str:
    unit = "one step" if kind == "training" else f"one {kind}"
    return f"the ranks ran different modules in {unit}{found and f': {found}'}; {instead}"


def _first(trails: dict[int, list[str]], *, whole: bool) -> str:
    """Describe the first difference between ``trails``, or return "". A ``whole`` trail may also end too early."""
    lengths = [len(names) for names in trails.values()]
    for at in range(max(lengths) if whole else min(lengths)):
        here = {rank: names[at] if at < len(names) else "nothing more" for rank, names in sorted(trails.items())}
        if len(set(here.values())) > 1:
            return ", ".join(f"{_ranks(here, name)} ran {name}" for name in dict.fromkeys(here.values()))
    return ""


def _only(trails: dict[int, list[str]]) -> str:
    """Describe the modules that only some ranks ran, given complete trails; "" if only order or count differ."""
    ran = {rank: dict.fromkeys(name.removesuffix(BACKWARD) for name in names) for rank, names in trails.items()}
    by = {name: {rank: name for rank in sorted(ran) if name in ran[rank]} for names in ran.values() for name in names}
    some = [f"only {_ranks(ranks, name)} ran {name}" for name, ranks in by.items() if len(ranks) < len(trails)]
    return ", ".join(some[:SHOWN]) + (f", and {len(some) - SHOWN} more" if len(some) > SHOWN else "")


def _ranks(ran: dict[int, str], name: str) -> str:
    """List the ranks that ran module ``name``."""
    ranks = [str(rank) for rank, module in ran.items() if module == name]
    more = f" and {len(ranks) - SHOWN} more" if len(ranks) > SHOWN else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks[:SHOWN])}{more}"


def _published(store: Store | None, ranks: Iterable[int]) -> dict[int, Published]:
    found = {rank: lines for rank in ranks if (lines := _read(store, rank))}
    return {rank: Published(int(lines[0]), lines[1], lines[2], lines[3:]) for rank, lines in found.items()}


def _read(store: Store | None, rank_or_kind: int | str) -> list[str] | None:
    with suppress(RuntimeError):
        if store and store.check([f"trail/{rank_or_kind}"]):
            return str(store.get(f"trail/{rank_or_kind}").decode()).split("\n")
    return None
