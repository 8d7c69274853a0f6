"""Describe why a worker failed, for the other ranks, the launchers and ``logs/``. Torch-free."""

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
from isobatch.conf.terminal import Unwritable, answer
from isobatch.scaling.errors import UserError
from isobatch.scaling.geometry import counted

COMMANDS = ("launch.py", "isobatch")  # the scripts that launch a run
KILLED_HINT = " (Linux does that when memory runs out)"

_NO_MEMORY = re.compile("out of memory|an't allocate memory|annot allocate memory|ALLOC_FAILED|bad_alloc")
_NO_CUDA = re.compile("Torch not compiled with CUDA|No CUDA GPUs are available|Found no NVIDIA driver")
_LOADER_DIED = re.compile(r"DataLoader worker \(pid.*?\) (is killed by signal: (?P<signal>[\w ]+\w)|exited .*)")


class RunFailed(RuntimeError):
    """The run crashed and would crash the same way again, for example on a non-finite loss. Don't restart it."""


def answer_if_read(text: str) -> None:
    """Print the answer to a command, unless its reader has closed the pipe. Raises RunFailed if that fails."""
    try:
        answer(text)
    except Unwritable as error:
        if str(error):  # empty if the reader has gone
            raise RunFailed(str(error)) from None


class Hangs(RuntimeError):
    """A worker made no progress for too long. ``waiting`` is true if its stack shows a wait for other ranks."""

    def __init__(self, message: str, waiting: bool) -> None:
        super().__init__(message)
        self.waiting = waiting


@dataclass(frozen=True, slots=True)
class Reached:
    """Describe how far a run has come, and how many samples a rank holds in memory at once.

    Attributes:
        step, samples: optimizer steps and samples completed.
        per_gpu: samples in the largest pass; 0 before the first.
        granule: samples that must stay together in one pass.
        fixed: the pass size can't shrink within this run.
        probe: the pass was a probe for the largest per-GPU batch; its size isn't the run's.
    """

    step: int = 0
    samples: int = 0
    per_gpu: int = 0
    granule: int = 1
    fixed: bool = False
    probe: bool = False

    @property
    def half(self) -> int:
        """Half the samples of a pass, rounded down to whole granules; 0 if a pass can't be halved."""
        return self.per_gpu // 2 // self.granule * self.granule


@dataclass(frozen=True, slots=True)
class Failure:
    """Describe why a worker failed.

    Attributes:
        kind: refused, oom or crashed; for a whole start also stopped.
        again: a retry may succeed.
        lost: the worker only noticed that another rank is gone or late.
        silent: reported by an agent, because the rank left no note itself.
        time: when it failed, in seconds since 1970; ``restart``: during which restart of the workers.
        log: file with the traceback; empty if there is none.
        silent_ranks: the ranks that left no note, if ``lost`` is all that the other ranks know.
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
        """The failure in one line."""
        if not self.again or self.silent_ranks:
            return self.cause
        if self.kind != "oom":
            return f"rank {self.rank} crashed: {self.cause}"
        per_gpu = self.reached.per_gpu
        passing = f"with {counted(per_gpu, 'sample')} in a pass" if per_gpu else "before the first pass"
        return f"rank {self.rank} ran out of memory {passing}: {self.cause}"


def describe_failure(error: BaseException, rank: int, attempt: str, reached: Reached) -> Failure:
    """Classify the ``error`` that ended this worker."""
    final = isinstance(error, UserError | RunFailed)  # its message is complete, and the same on all ranks
    kind: State = "refused" if isinstance(error, UserError) else "oom" if not final and is_oom(error) else "crashed"
    return Failure(
        rank,
        str(error) if final or isinstance(error, Hangs) else _cause(error),
        kind,
        again=not final,
        lost=kind == "crashed" and not final and is_lost(error),
        reached=reached,
        time=time.time(),
        attempt=attempt,
        restart=restarts(),
        traceback="".join(traceback.format_exception(error)),
    )


def keep_failure(failure: Failure, run: RunDir) -> Failure:
    """Write ``logs/error-rank-N.json``, append the traceback to ``logs/rank-N.log``, and return ``failure`` with it."""
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
    """Return whether ``error`` says that host or device memory ran out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's
        return True
    return isinstance(error, RuntimeError | OSError) and _NO_MEMORY.search(str(error)) is not None


def is_lost(error: BaseException) -> bool:
    """Return whether ``error`` only says that another rank is gone or late."""
    if isinstance(error, Hangs):
        return error.waiting
    return isinstance(error, RuntimeError) and re.search("gloo|NCCL|Connection", str(error)) is not None


def _cause(error: BaseException) -> str:
    """Return the error in one line, with the innermost line of the user's own code in its traceback."""
    if isinstance(error, bdb.BdbQuit):
        return "breakpoint() has no terminal, or the debugger was quit; run it with debug=true"
    message = "".join(traceback.format_exception_only(error)).strip()
    for cause in (error.__cause__, error):
        if died := _LOADER_DIED.search(str(cause)):  # raised at an arbitrary line, so no line is named
            return died[0] + (KILLED_HINT if died["signal"] == "Killed" else "")
    hint = "; batches are already on the run's device: leave out .cuda()" if _NO_CUDA.search(message) else ""
    return message + user_line(traceback.extract_tb(error.__traceback__)) + hint


def user_line(stack: traceback.StackSummary) -> str:
    """Return the innermost line of the user's own code in ``stack``, as a suffix for a message; empty if none is."""
    ours = (str(Path(__file__).parents[2]), sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), "<")
    for frame in reversed(stack):
        if not frame.filename.startswith(ours) and (name := Path(frame.filename).name) not in COMMANDS:
            return f" ({name}:{frame.lineno} in {frame.name})"
    return ""


def log_of(run: RunDir, rank: int) -> Path:
    """Return the log file of ``rank``. Rank 0 prints to the terminal, so its log holds only tracebacks."""
    return run.logs / f"rank-{rank}.log"


def restarts() -> int:
    """Return how often the elastic agent has restarted the workers."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
