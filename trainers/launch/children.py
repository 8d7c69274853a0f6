"""Run parts of the launcher in child processes, and forward stop signals to them. Torch-free."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isobatch.conf.rundir.outcome import EXIT_CODE
from isobatch.conf.sweep import Element
from isobatch.conf.terminal import Unwritable, say, say_if_slow, tell_torchrun
from isobatch.scaling.errors import UserError
from isobatch.scaling.report.grid import grid
from isobatch.scaling.tuning.results import Results
from isobatch.trainers.launch.worker import leave
from isobatch.trainers.ranks.signals import Stop, Stopped, die_with_parent

if TYPE_CHECKING:
    from isobatch.conf.schema import RunConfig


POLL_S = 0.05  # between two looks at a child
TUNED = {  # columns of a table of action=tune, and where their values are in tune.json
    "per GPU": ("memory", "per_gpu"),
    "fastest per GPU": ("speed", "knee"),
    "noise scale": ("noise", "scale"),
    "critical batch": ("branch", "critical_batch"),
    "LR found": ("lr", "suggestion"),
    "sharpness": ("sharpness", "sharpness"),
    "perturbed": ("sharpness", "perturbed"),
    "recommended batch": ("recommendation", "global_size"),
}

Training = Callable[[int], int]
"""Train one run of a sweep in a slot; return the exit code."""


def guarded(work: Callable[[], int]) -> int:
    """Return the exit code of ``work``. A UserError is printed by one process per machine."""
    try:
        return work()
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            say(f"isobatch: {error}", sys.stderr)
        tell_torchrun(f"isobatch: {error}")
        return EXIT_CODE["refused"]
    except Stopped as stopped:
        say(f"isobatch: {stopped}, before anything was started", sys.stderr)
        return EXIT_CODE["stopped"]
    except Unwritable as error:
        if str(error):  # empty if the reader of a pipe has gone
            say(f"isobatch: {error}", sys.stderr)
        return 1
    except SystemExit as end:
        return exit_code(end)
    except BaseException:
        say(traceback.format_exc(), sys.stderr, end="")
        return 1


class Child:
    """A forked process that runs ``work``, and gets a signal if this process is asked to stop, or ends.

    Args:
        number: the signal.
        prefix: put before each line of the child's output, which this process then relays; None leaves it alone.
    """

    def __init__(self, work: Callable[[], int], number: int = signal.SIGTERM, prefix: str | None = None) -> None:
        self._number, self._prefix, self._signalled, self._rest = number, prefix, False, b""
        parent = os.getpid()
        self._output: int | None = None
        written = None
        if prefix is not None:
            self._output, written = os.pipe()
        self._id = os.fork()
        if self._id == 0:
            die_with_parent(number)
            if written is not None:
                os.dup2(written, 1)
                os.dup2(written, 2)
            leave(guarded(work) if os.getppid() == parent else 1)
        if self._output is not None and written is not None:
            os.close(written)
            os.set_blocking(self._output, False)

    def poll(self, stop: Stop) -> int | None:
        """Relay output, and a wish to stop; return the exit code of a process that ended, else None."""
        ended, status = os.waitpid(self._id, os.WNOHANG)
        self._relay(last=bool(ended))
        if ended:
            return os.waitstatus_to_exitcode(status)
        if stop.wanted and not self._signalled:
            os.kill(self._id, self._number)
            self._signalled = True
        return None

    def _relay(self, last: bool) -> None:
        """Print the whole lines that have arrived, and close the pipe after the ``last`` ones."""
        if self._output is None:
            return
        with suppress(BlockingIOError):
            while arrived := os.read(self._output, 1 << 16):
                self._rest += arrived
        *lines, self._rest = self._rest.split(b"\n")
        for line in [*lines, *([self._rest] if last and self._rest else [])]:
            say(f"{self._prefix}{line.decode(errors='replace')}")
        if last:
            os.close(self._output)
            self._output = None


def exit_code(end: SystemExit) -> int:
    """Return the exit code of a process that ``end`` ends, after printing its text, as Python does."""
    if end.code is None or isinstance(end.code, int):
        return end.code or 0
    say(str(end.code), sys.stderr)
    return 1


def in_child(work: Callable[[], int], stop: Stop, number: int = signal.SIGTERM) -> int:
    """Return the exit code of ``work``, run in a forked process that gets ``number`` if this one stops or ends."""
    child = Child(work, number)
    while (code := child.poll(stop)) is None:
        time.sleep(POLL_S)
    return code


def count_samples(config: RunConfig, stop: Stop) -> int:
    """Count the task's training samples in a child, so that the launcher, which forks the workers, stays torch-free.

    Raises:
        Stopped: a signal came first. The child is killed, since within the user's code it would only record a signal.
    """

    def count() -> str:
        from isobatch.trainers.ranks.world import World
        from isobatch.trainers.tasks.prepare import prepare_data
        from isobatch.trainers.tasks.task import make_task, open_data

        task = make_task(config)
        prepare_data(task, World.alone(), Stop(), config.cluster.timeout_s)
        with say_if_slow("opening the data …", sys.stderr):
            return str(len(open_data(task, config)))

    return int(answer_of(count, stop, "while the training data was counted"))


def answer_of(work: Callable[[], str], stop: Stop, when: str) -> str:
    """Return the text that ``work`` returns in a child, whose output goes to stderr: stdout is for the plan.

    Args:
        when: what it does, for the message if it is killed.

    Raises:
        SystemExit: it failed, and has printed the reason.
        Stopped: a signal came first.
    """
    answer, reply = os.pipe()

    def send() -> int:
        with redirect_stdout(sys.stderr):
            text = work()
        with open(reply, "w") as pipe:
            pipe.write(text)
        return 0

    code = in_child(send, stop, signal.SIGKILL)
    os.close(reply)
    with open(answer) as pipe:
        text = pipe.read()
    if code < 0 and stop.wanted:
        raise Stopped(stop.wanted)
    if code < 0:
        say(f"isobatch: killed by {signal.Signals(-code).name} {when}", sys.stderr)
    if code:  # the child has printed the reason
        raise SystemExit(max(1, code))
    return text


def trained_columns(folder: Path) -> dict[str, Any]:
    """Return what a table tells of a trained run."""
    from isobatch.scaling.report.result import result

    return result(folder).row()


def tuned_columns(folder: Path) -> dict[str, Any]:
    """Return what a table tells of a run that action=tune measured."""
    results = Results(folder)
    results.read()
    found: dict[str, Any] = {}
    for column, (part, name) in TUNED.items():
        if part in results.parts:
            found[column] = results.parts[part].get(name)
    return found


def train_elements(
    elements: Sequence[Element],
    directories: Sequence[Path],
    trainings: Sequence[Training],
    stop: Stop,
    at_a_time: int,
    columns: Callable[[Path], dict[str, Any]],
) -> int:
    """Train or tune the runs of a sweep, each in a child. Print a table and return the exit code.

    Args:
        trainings: train one run, in a slot from 0 to ``at_a_time`` - 1.
        columns: returns what the table tells of a run directory.
    """
    codes: list[int] = []
    waiting = list(enumerate(trainings))
    free, running = list(range(at_a_time)), dict[int, Child]()

    def stopped() -> bool:
        return bool(stop.wanted) or EXIT_CODE["stopped"] in codes

    while running or (waiting and not stopped()):
        while free and waiting and not stopped():
            (index, training), slot = waiting.pop(0), free.pop(0)
            name = f"[{index + 1} of {len(elements)}]"
            say(f"\n{name} {' '.join(elements[index].swept)}")
            running[slot] = Child(partial(training, slot), prefix=None if at_a_time == 1 else f"{name} ")
        for slot, child in list(running.items()):
            if (code := child.poll(stop)) is not None:
                del running[slot]
                free.append(slot)
                codes.append(code)
        time.sleep(POLL_S)
    say("\n" + grid([e.column | columns(folder) for e, folder in zip(elements, directories, strict=True)]))
    say(str(directories[0].parent))
    if stopped():
        say("stopped (run the same command to resume)")
        return EXIT_CODE["stopped"]
    failed = set(codes) - {0}
    return EXIT_CODE["refused"] if failed == {EXIT_CODE["refused"]} else int(bool(failed))
