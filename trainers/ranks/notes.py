"""Notes that ranks leave in the store they share, for each other and for the launchers: how they ended, and why."""

from __future__ import annotations

import bdb
import json
import os
import re
import sysconfig
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isobatch.conf.rundir.directory import Fatal, RunDir, write_atomic
from isobatch.scaling.errors import UserError
from isobatch.trainers.ranks.trails import parting

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store


GRACE_S = 3.0  # for workers to end, and to say why, after one has failed
KILLED_HINT = " (Linux does that where memory runs out)"
ABORTED = "killed by SIGABRT"  # gloo does so to a process that gets a longer message than it waits for

_NO_MEMORY = re.compile("out of memory|an't allocate memory|annot allocate memory|ALLOC_FAILED|bad_alloc")
_LOADER_DIED = re.compile(r"DataLoader worker \(pid.*?\) (is killed by signal: (?P<signal>[\w ]+\w)|exited .*)")


class Hangs(RuntimeError):
    """A worker made no progress for too long; ``waiting``: for other ranks, as far as its stack tells."""

    def __init__(self, message: str, waiting: bool) -> None:
        super().__init__(message)
        self.waiting = waiting


def write_note(store: Store | None, key: str, content: Any) -> None:
    """Leave a note for the agents and the other ranks; nothing where there is nobody to read it any more."""
    with suppress(RuntimeError):
        if store:
            store.set(key, json.dumps(content))


def read_note(store: Store | None, key: str) -> Any:
    """What was left under this key; None if nothing was, or who kept it is gone."""
    with suppress(RuntimeError):
        if store and store.check([key]):
            return json.loads(store.get(key))
    return None


def leave_word(store: Store | None, rank: int, note: dict[str, Any]) -> None:
    """Note why a rank ended. The first word holds: what follows from it, or is said of the rank later, says less."""
    with suppress(RuntimeError):
        if store:
            store.compare_set(f"error/{rank}", "", json.dumps(note))


def first_error(store: Store | None, size: int) -> dict[str, Any] | None:
    """The earliest error that any of the ranks has noted, with how far any of them had come.

    That a rank lost another is never the first, where there is anything else. Where there isn't, the ranks that left
    no word of their own are named, and listed as ``silent``. Where ranks lost each other because they ran different
    modules, that is the error.
    """
    notes = {rank: note for rank in range(size) if (note := read_note(store, f"error/{rank}"))}
    said = {rank: note for rank, note in notes.items() if not note["silent"]}
    if not said:
        return None
    first: dict[str, Any] = min(said.values(), key=lambda note: (note["lost"], note["time"]))
    first["silent"] = [rank for rank in range(size) if rank not in said and first["lost"]]
    if first["silent"]:
        ranks = ", ".join(map(str, first["silent"]))
        why = f"no word from rank {ranks} (hanging, killed, or its machine is gone)"
        first |= {"rank": first["silent"][0], "cause": f"{why}; rank {first['rank']}: {first['cause']}"}
    if (first["lost"] or ABORTED in first["cause"]) and (cause := parting(store, range(size))):
        first |= {"kind": "refused", "again": False, "cause": cause}
    return first | {key: max(note[key] for note in notes.values()) for key in ("step", "samples")}


def await_words(store: Store | None, size: int, own: set[int] | None = None) -> dict[str, Any] | None:
    """``first_error``, once there is word from all ranks but ``own`` where that may change what was first."""
    deadline = time.monotonic() + GRACE_S
    while True:
        error = first_error(store, size)
        if error is None or set(error["silent"]) <= (own or set()) or time.monotonic() > deadline:
            return error
        time.sleep(0.1)


def others_word(rank: int, cause: str, reached: dict[str, int], at: float, **more: Any) -> dict[str, Any]:
    """What an agent notes of a rank that can't say itself what became of it."""
    plain = {"kind": "crashed", "again": True, "lost": False, "silent": False}
    sizes = {"per_gpu": 0, "granule": 1, "fixed": False}
    return {"time": at, "rank": rank, "cause": cause, **plain, **sizes, **reached, **more}


def lasting(store: Store | None) -> Store | None:
    """Where notes are found by later starts, too: torchrun keeps one store for all of them."""
    return getattr(store, "underlying_store", store)


def error_note(
    error: BaseException, rank: int, attempt: str, run: RunDir | None, reached: dict[str, int]
) -> dict[str, Any]:
    """What is kept of an error, and written to ``logs/error-rank-N.json`` and ``logs/rank-N.log`` of ``run``.

    ``kind`` is refused, oom or crashed; ``again``: another try may end otherwise; ``lost``: it only says that another
    rank is gone or late; ``silent``: it isn't the rank's own word; ``per_gpu``: samples of the largest micro-batch, 0
    before the first; ``granule``: samples that stay together in one; ``fixed``: it can't be smaller in the same run.

    Args:
        reached: ``step`` and ``samples`` completed, where the error doesn't say it.
    """
    told = isinstance(error, UserError | Fatal)  # in the message, and the same on all ranks
    kind = "refused" if isinstance(error, UserError) else "oom" if not told and is_oom(error) else "crashed"
    note: dict[str, Any] = {
        "time": time.time(),
        "rank": rank,
        "attempt": attempt,
        "restart": restarts(),
        "kind": kind,
        "again": not told,
        "lost": kind == "crashed" and not told and _is_lost(error),
        "silent": False,
        "cause": str(error) if told or isinstance(error, Hangs) else _cause(error),
        "traceback": "".join(traceback.format_exception(error)),
        "step": getattr(error, "step", reached["step"]),
        "samples": getattr(error, "samples", reached["samples"]),
        "per_gpu": getattr(error, "per_gpu", 0),
        "granule": getattr(error, "granule", 1),
        "fixed": getattr(error, "fixed", False),
    }
    if run:
        with suppress(OSError):
            with open(log_of(run, rank), "a") as log:
                log.write(note["traceback"])
            note["log"] = str(log_of(run, rank))
            write_atomic(run.logs / f"error-rank-{rank}.json", json.dumps(note, indent=1) + "\n")
    return note


def is_oom(error: BaseException) -> bool:
    """Return whether memory ran out, of whichever kind."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's
        return True
    return isinstance(error, RuntimeError | OSError) and _NO_MEMORY.search(str(error)) is not None


def _is_lost(error: BaseException) -> bool:
    if isinstance(error, Hangs):
        return error.waiting
    return isinstance(error, RuntimeError) and re.search("gloo|NCCL|Connection", str(error)) is not None


def _cause(error: BaseException) -> str:
    """The error in a line, with the last place in the user's own code that it came by."""
    if isinstance(error, bdb.BdbQuit):
        return "breakpoint() found nobody to talk to, or was quit; it works with debug=true"
    said = "".join(traceback.format_exception_only(error)).strip()
    for cause in (error.__cause__, error):
        if died := _LOADER_DIED.search(str(cause)):  # noticed wherever this process was meanwhile
            return died[0] + (KILLED_HINT if died["signal"] == "Killed" else "")
    return said + place(traceback.extract_tb(error.__traceback__))


def place(stack: traceback.StackSummary) -> str:
    """The innermost line of the user's own code, to be put behind what happened there; empty where there is none."""
    ours = (str(Path(__file__).parents[2]), sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), "<")
    frames = [frame for frame in stack if not frame.filename.startswith(ours)]
    frames = [frame for frame in frames if Path(frame.filename).name != "launch.py"]
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno} in {frames[-1].name})" if frames else ""


def log_of(run: RunDir, rank: int | str) -> Path:
    """What a rank printed (0: on the terminal), and its traceback."""
    return run.logs / f"rank-{rank}.log"


def restarts() -> int:
    """How often the elastic agent has started the workers again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
