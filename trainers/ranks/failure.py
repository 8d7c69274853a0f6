"""Describe why a worker failed: what ranks and launchers tell each other, and keep in ``logs/``. Torch-free."""

from __future__ import annotations

import bdb
import json
import os
import re
import sysconfig
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from isobatch.conf.rundir.directory import RunDir
from isobatch.conf.rundir.files import write_atomic
from isobatch.conf.rundir.outcome import EXIT_CODE, State
from isobatch.scaling.errors import UserError
from isobatch.scaling.geometry import counted

COMMANDS = ("launch.py", "isobatch")  # the scripts that a run is launched with
KILLED_HINT = " (Linux does that where memory runs out)"

_NO_MEMORY = re.compile("out of memory|an't allocate memory|annot allocate memory|ALLOC_FAILED|bad_alloc")
_NO_CUDA = re.compile("Torch not compiled with CUDA|No CUDA GPUs are available|Found no NVIDIA driver")
_LOADER_DIED = re.compile(r"DataLoader worker \(pid.*?\) (is killed by signal: (?P<signal>[\w ]+\w)|exited .*)")


class RunFailed(RuntimeError):
    """The run crashed and would crash again the same way, for example on a loss that isn't finite: don't restart it."""


class Hangs(RuntimeError):
    """A worker made no progress for too long; ``waiting``: for other ranks, as far as its stack tells."""

    def __init__(self, message: str, waiting: bool) -> None:
        super().__init__(message)
        self.waiting = waiting


@dataclass(frozen=True, slots=True)
class Reached:
    """Describe how far a run has come, and how many samples a rank has in memory at once there.

    Attributes:
        step, samples: optimizer steps and samples completed.
        per_gpu: samples of the largest pass; 0 before the first.
        granule: samples that stay together in one pass.
        fixed: a pass can't be smaller in the same run.
    """

    step: int = 0
    samples: int = 0
    per_gpu: int = 0
    granule: int = 1
    fixed: bool = False

    @property
    def half(self) -> int:
        """Half the samples of a pass, in whole granules; 0: there is no half."""
        return self.per_gpu // 2 // self.granule * self.granule


@dataclass(frozen=True, slots=True)
class Failure:
    """Describe why a worker failed.

    Attributes:
        kind: refused, oom or crashed; of a whole start also stopped.
        again: another try may end differently.
        lost: the worker only noticed that another rank is gone or late.
        silent: an agent reports this of a rank that said nothing itself.
        time: when it failed, in seconds since 1970; ``restart``: in which restart of the workers.
        log: file with the traceback; empty where there is none.
        silent_ranks: the ranks that said nothing, where ``lost`` is all that the other ranks know.
    """

    rank: int
    cause: str
    kind: State = "crashed"
    again: bool = True
    lost: bool = False
    silent: bool = False
    reached: Reached = Reached()
    time: float = 0.0
    attempt: str = ""
    restart: int = 0
    traceback: str = ""
    log: str = ""
    silent_ranks: tuple[int, ...] = ()

    @property
    def exit_code(self) -> int:
        return EXIT_CODE[self.kind]

    @property
    def summary(self) -> str:
        """What failed, in one line."""
        if not self.again or self.silent_ranks:
            return self.cause
        if self.kind != "oom":
            return f"rank {self.rank} crashed: {self.cause}"
        per_gpu = self.reached.per_gpu
        passing = f"with {counted(per_gpu, 'sample')} in a pass" if per_gpu else "before the first pass"
        return f"rank {self.rank} ran out of memory {passing}: {self.cause}"


def describe_failure(error: BaseException, rank: int, attempt: str, reached: Reached) -> Failure:
    """Classify ``error``, which ended this worker."""
    told = isinstance(error, UserError | RunFailed)  # in the message, and the same on all ranks
    kind: State = "refused" if isinstance(error, UserError) else "oom" if not told and is_oom(error) else "crashed"
    return Failure(
        rank,
        str(error) if told or isinstance(error, Hangs) else _cause(error),
        kind,
        again=not told,
        lost=kind == "crashed" and not told and _is_lost(error),
        reached=reached,
        time=time.time(),
        attempt=attempt,
        restart=restarts(),
        traceback="".join(traceback.format_exception(error)),
    )


def keep_failure(failure: Failure, run: RunDir) -> Failure:
    """Write ``logs/error-rank-N.json`` and append the traceback to ``logs/rank-N.log``; return it with its log."""
    log = log_of(run, failure.rank)
    with suppress(OSError):
        with open(log, "a") as file:
            file.write(failure.traceback)
        failure = replace(failure, log=str(log))
        fields = asdict(failure) | asdict(failure.reached)
        del fields["reached"], fields["silent_ranks"]
        write_atomic(run.logs / f"error-rank-{failure.rank}.json", json.dumps(fields, indent=1) + "\n")
    return failure


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
    """Return the error in one line, with the last place in the user's own code that it came by."""
    if isinstance(error, bdb.BdbQuit):
        return "breakpoint() found nobody to talk to, or was quit; it works with debug=true"
    said = "".join(traceback.format_exception_only(error)).strip()
    for cause in (error.__cause__, error):
        if died := _LOADER_DIED.search(str(cause)):  # noticed wherever this process was meanwhile
            return died[0] + (KILLED_HINT if died["signal"] == "Killed" else "")
    hint = "; batches are on the run's device already: leave out .cuda()" if _NO_CUDA.search(said) else ""
    return said + place(traceback.extract_tb(error.__traceback__)) + hint


def place(stack: traceback.StackSummary) -> str:
    """Return the innermost line of the user's own code, to append to what happened there; empty where there is none."""
    ours = (str(Path(__file__).parents[2]), sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), "<")
    for frame in reversed(stack):
        if not frame.filename.startswith(ours) and (name := Path(frame.filename).name) not in COMMANDS:
            return f" ({name}:{frame.lineno} in {frame.name})"
    return ""


def log_of(run: RunDir, rank: int) -> Path:
    """Return the file with a rank's output (rank 0: only its tracebacks, since it prints to the terminal)."""
    return run.logs / f"rank-{rank}.log"


def restarts() -> int:
    """Return how often the elastic agent has started the workers again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
