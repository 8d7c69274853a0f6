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

from trainers.rundir import Fatal, Refused, RunDir, write_atomic

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store


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


def first_error(store: Store | None, size: int) -> dict[str, Any] | None:
    """The earliest error that any of the ranks has noted, with how far any of them had come.

    That a rank lost another is never the first, where there is anything else. Where there isn't, the ranks that left
    no word are named, and listed as ``silent``.
    """
    notes = {rank: note for rank in range(size) if (note := read_note(store, f"error/{rank}"))}
    if not notes:
        return None
    first: dict[str, Any] = min(notes.values(), key=lambda note: (note["lost"], note["time"]))
    first["silent"] = [rank for rank in range(size) if rank not in notes and first["lost"]]
    if first["silent"]:
        ranks = ", ".join(map(str, first["silent"]))
        first["cause"] = f"no word from rank {ranks} (hanging, killed, or its machine is gone): {first['cause']}"
    return first | {key: max(note.get(key, 0) for note in notes.values()) for key in ("step", "samples")}


def write_final(store: Store, note: dict[str, Any]) -> None:
    """Leave word for all later starts that there is nothing to try again, where torchrun keeps one store for them."""
    write_note(getattr(store, "underlying_store", store), "final", note)


def error_note(error: BaseException, rank: int, attempt: str, run: RunDir | None) -> dict[str, Any]:
    """What is kept of an error, and written to ``logs/error-rank-N.json`` and ``logs/rank-N.log`` of ``run``.

    ``kind`` is refused or crashed; ``again``: another try may end otherwise; ``lost``: it only says that another rank
    is gone or late.
    """
    told = isinstance(error, Refused | Fatal)  # in the message, and the same on all ranks
    note: dict[str, Any] = {
        "time": time.time(),
        "rank": rank,
        "attempt": attempt,
        "restart": restarts(),
        "kind": "refused" if isinstance(error, Refused) else "crashed",
        "again": not told,
        "lost": not told
        and isinstance(error, RuntimeError)
        and re.search("gloo|NCCL|Connection", str(error)) is not None,
        "cause": str(error) if told else _cause(error),
        "traceback": "".join(traceback.format_exception(error)),
        "step": getattr(error, "step", 0),
        "samples": getattr(error, "samples", 0),
    }
    if run:
        with suppress(OSError):
            with open(log_of(run, rank), "a") as log:
                log.write(note["traceback"])
            note["log"] = str(log_of(run, rank))
            write_atomic(run.logs / f"error-rank-{rank}.json", json.dumps(note, indent=1) + "\n")
    return note


def _cause(error: BaseException) -> str:
    """The error in a line, with the last place in the user's own code that it came by."""
    if isinstance(error, bdb.BdbQuit):
        return "breakpoint() found nobody to talk to, or was quit; it works with debug=true"
    said = "".join(traceback.format_exception_only(error)).strip()
    ours = (str(Path(__file__).parent), sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), "<")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(ours)]
    frames = [frame for frame in frames if Path(frame.filename).name != "launch.py"]
    return f"{said} ({Path(frames[-1].filename).name}:{frames[-1].lineno} in {frames[-1].name})" if frames else said


def log_of(run: RunDir, rank: int | str) -> Path:
    """What a rank printed (0: on the terminal), and its traceback."""
    return run.logs / f"rank-{rank}.log"


def restarts() -> int:
    """How often the elastic agent has started the workers again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
