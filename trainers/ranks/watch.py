"""Detect a hanging worker from its heartbeats, in its agent and in a thread of its own. Torch-free."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO

from isobatch.scaling.errors import UserError
from isobatch.trainers.ranks.failure import Hangs, Reached, user_line

if TYPE_CHECKING:
    from multiprocessing.context import BaseContext

STALLED = [2**n for n in range(1, 16)]  # looks without a beat after which ranks compare the modules they ran
LOOK_S = 0.5  # longest interval between looks of the watching thread

# files that the main thread is in while it waits for other ranks, or for a device that does
_WAITING = re.compile(
    r"[/\\](torch|deepspeed)[/\\](?!utils[/\\]data)|"
    r"[/\\]trainers[/\\](engines[/\\]|loop[/\\]readback\.py|checkpoints[/\\]saver\.py)"
)
_LOADING = re.compile(r"[/\\]torch[/\\]utils[/\\]data[/\\]dataloader\.py")


class Watch:
    """Count a worker's heartbeats and record how far its run has come. Its agent reads both through shared memory.

    Time without a beat is counted in looks, not by the clock. No looks happen while a whole job is suspended, so its
    workers aren't taken for hanging when the job continues.

    Args:
        shared: multiprocessing context of the worker that shares this watch; None to use it in this process alone.
    """

    def __init__(self, shared: BaseContext | None = None) -> None:
        # beats, steps, samples, excused, training
        self._row: Any = shared.RawArray(ctypes.c_int64, 5) if shared else [0, 0, 0, 0, 0]
        self._reached: Callable[[], Reached] | None = None
        self._seen = self._looks = 0
        self._guarding = False
        self.describe_mismatch: Callable[[], str | None] | None = None  # returns why no more progress is possible

    def beat(self, steps: int | None = None, samples: int | None = None) -> None:
        """Record progress, and how far the run has come. The first beat means that signals are handled."""
        self._row[0] += 1
        if steps is not None:
            self._row[1:3] = steps, samples

    def expect_beats(self) -> None:
        """Treat missing beats as a hang from now on."""
        self._row[4] = 1
        self.beat()

    @property
    def started(self) -> bool:
        """True once the worker handles signals."""
        return bool(self._row[0])

    @property
    def training(self) -> bool:
        """True once missing beats count as a hang."""
        return bool(self._row[4])

    @property
    def reached(self) -> Reached:
        """How far the run has come."""
        return self._reached() if self._reached else Reached(int(self._row[1]), int(self._row[2]))

    @contextmanager
    def tracking(self, reached: Callable[[], Reached]) -> Iterator[None]:
        """Take the progress from ``reached`` inside this block, and after an error in it."""
        before, self._reached = self._reached, reached
        yield
        self._reached = before

    @contextmanager
    def excused(self) -> Iterator[None]:
        """Require no beats inside this block, where rank 0 may take long while the other ranks wait."""
        self._row[3] = 1
        try:
            yield
        finally:
            self._row[3] = 0

    def look(self) -> int:
        """Return the number of looks since the last beat, including this one; 0 if the worker is excused."""
        self._looks = self._looks + 1 if self._seen == self._row[0] and not self._row[3] else 0
        self._seen = self._row[0]
        return self._looks

    def reset(self) -> None:
        """Restart counting looks from 0."""
        self._looks = 0

    def guard(
        self, timeout_s: float, on_training: Callable[[], None], on_hang: Callable[[Exception], None], log: TextIO
    ) -> None:
        """Watch this process's main thread from another thread, which also handles a hang.

        Args:
            timeout_s: time without a beat after which a training worker counts as hanging. The stacks of its threads
                are written to ``log`` a little earlier, while the ranks that wait for it are still alive.
            on_training: called when the timeout starts to apply.
            on_hang: called with the hang; later in a worker that waits for other ranks.
        """
        look_s = min(LOOK_S, timeout_s / 20)
        stacks_at, hangs_at, all_at = (round(share * timeout_s / look_s) - 1 for share in (0.8, 0.9, 1))

        def watch() -> None:
            while not self.training:
                time.sleep(look_s)
            on_training()
            while True:
                time.sleep(look_s)
                looks = self.look()
                if not self._guarding:
                    return None
                if looks in STALLED and self.describe_mismatch and (mismatch := self.describe_mismatch()):
                    return on_hang(UserError(mismatch))
                if looks == stacks_at:
                    with suppress(OSError):
                        log.write(f"isobatch: no progress for {0.8 * timeout_s:g} s\n")
                        log.flush()
                    faulthandler.dump_traceback(log)
                if looks >= hangs_at and (not (error := describe_hang(timeout_s)).waiting or looks >= all_at):
                    _show_loaders()
                    return on_hang(error)

        self._guarding = True
        threading.Thread(target=watch, daemon=True).start()

    def unguard(self) -> None:
        self._guarding = False


def describe_hang(timeout_s: float) -> Hangs:
    """Describe where this process's main thread is, given that it made no progress for ``timeout_s``."""
    stack = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident or 0])
    waiting = _WAITING.search(stack[-1].filename) is not None
    loading = any(_LOADING.search(frame.filename) for frame in stack)
    state = "it waited for other ranks" if waiting else "it waited for a DataLoader worker" if loading else "it hung"
    return Hangs(f"{state}: no progress within cluster.timeout_s={timeout_s:g}{user_line(stack)}", waiting)


def _show_loaders() -> None:
    """Let DataLoader workers write their stacks too. They inherited this process's handler."""
    from multiprocessing import active_children

    for loader in active_children():
        with suppress(ProcessLookupError):
            os.kill(loader.pid or 0, signal.SIGQUIT)
