"""Run parts of the launcher in child processes, one at a time, and forward stop signals to them. Torch-free."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from isobatch.conf.rundir.outcome import EXIT_CODE
from isobatch.conf.sweep import Element
from isobatch.conf.terminal import Unwritable, say, say_if_slow, tell_torchrun
from isobatch.scaling.errors import UserError
from isobatch.scaling.report.result import grid, result
from isobatch.trainers.launch.worker import leave
from isobatch.trainers.ranks.signals import Stop, Stopped, die_with_parent

if TYPE_CHECKING:
    from isobatch.conf.schema import RunConfig


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
        return int(end.code or 0)
    except BaseException:
        say(traceback.format_exc(), sys.stderr, end="")
        return 1


def in_child(work: Callable[[], int], stop: Stop, number: int = signal.SIGTERM) -> int:
    """Return the exit code of ``work``, run in a forked process that gets ``number`` if this one stops or ends."""
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        die_with_parent(number)
        leave(guarded(work) if os.getppid() == parent else 1)
    signalled = False
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if stop.wanted and not signalled:
            os.kill(child, number)
            signalled = True
        time.sleep(0.05)
    return os.waitstatus_to_exitcode(ended[1])


def count_samples(config: RunConfig, stop: Stop) -> int:
    """Count the task's training samples in a child, so that the launcher, which forks the workers, stays torch-free.

    Raises:
        Stopped: a signal came first. The child is killed, since within the user's code it would only record a signal.
    """
    answer, reply = os.pipe()

    def count() -> int:
        from isobatch.trainers.ranks.world import World
        from isobatch.trainers.tasks.prepare import prepare_data
        from isobatch.trainers.tasks.task import make_task, open_data

        with redirect_stdout(sys.stderr):  # stdout is reserved for the plan
            task = make_task(config)
            prepare_data(task, World.alone(), Stop(), config.cluster.timeout_s)
            with say_if_slow("opening the data …", sys.stderr):
                samples = len(open_data(task, config))
        os.write(reply, str(samples).encode())
        return 0

    code = in_child(count, stop, signal.SIGKILL)
    if code < 0 and stop.wanted:
        raise Stopped(stop.wanted)
    if code < 0:
        say(f"isobatch: killed by {signal.Signals(-code).name} while the training data was counted", sys.stderr)
    if code:  # the child has printed the reason
        raise SystemExit(max(1, code))
    return int(os.read(answer, 20))


def in_turn(
    elements: Sequence[Element], directories: Sequence[Path], trainings: Sequence[Callable[[], int]], stop: Stop
) -> int:
    """Train the runs of a sweep one after another, each in a child. Print a table and return the exit code."""
    codes: list[int] = []
    for element, training in zip(elements, trainings, strict=True):
        if stop.wanted or EXIT_CODE["stopped"] in codes:
            break
        say(f"\n[{len(codes) + 1} of {len(elements)}] {' '.join(element.swept)}")
        codes.append(in_child(training, stop))
    say("\n" + grid([e.column | result(folder).row() for e, folder in zip(elements, directories, strict=True)]))
    say(str(directories[0].parent))
    if stop.wanted or EXIT_CODE["stopped"] in codes:
        say("stopped (run the same command to resume)")
        return EXIT_CODE["stopped"]
    failed = set(codes) - {0}
    return EXIT_CODE["refused"] if failed == {EXIT_CODE["refused"]} else int(bool(failed))
