"""Watch a worker's signs of life, from its agent and from a thread of its own. Torch-free."""

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
from isobatch.trainers.ranks.failure import Hangs, Reached, place

if TYPE_CHECKING:
    from multiprocessing.context import BaseContext

STALLED = [2**n for n in range(1, 16)]  # looks without a beat at which ranks compare what they ran
LOOK_S = 0.5  # at most, between the looks of the watching thread

# where the main thread stands while it waits for other ranks, or for a device that does
_WAITING = re.compile(
    r"[/\\](torch|deepspeed)[/\\](?!utils[/\\]data)|"
    r"[/\\]trainers[/\\](engines[/\\]|loop[/\\]readback\.py|checkpoints[/\\]saver\.py)"
)
_LOADING = re.compile(r"[/\\]torch[/\\]utils[/\\]data[/\\]dataloader\.py")


class Watch:
    """Count a worker's heartbeats, and keep how far its run has come. Its agent sees both, through shared memory.

    Time without a beat is counted in looks, not by the clock: in a job that is suspended as a whole nobody looks, so
    nothing in it is taken for hanging when it goes on.

    Args:
        shared: how the process is started that is to share it; None: it is for this process alone.
    """

    def __init__(self, shared: BaseContext | None = None) -> None:
        # beats, steps, samples, whether it is excused, whether it trains
        self._row: Any = shared.RawArray(ctypes.c_int64, 5) if shared else [0, 0, 0, 0, 0]
        self._reached: Callable[[], Reached] | None = None
        self._seen = self._looks = 0
        self._guarding = False
        self.parting: Callable[[], str | None] | None = None  # says why no more progress can come, if it can't

    def beat(self, steps: int | None = None, samples: int | None = None) -> None:
        """Record that this worker makes progress, and how far the run has come; first of all, that it heeds signals."""
        self._row[0] += 1
        if steps is not None:
            self._row[1:3] = steps, samples

    def expect_beats(self) -> None:
        """From now on, take this worker for hanging where beats are missing."""
        self._row[4] = 1
        self.beat()

    @property
    def started(self) -> bool:
        """Whether the worker heeds signals."""
        return bool(self._row[0])

    @property
    def training(self) -> bool:
        """Whether missing beats are taken for hanging."""
        return bool(self._row[4])

    @property
    def reached(self) -> Reached:
        """How far the run has come."""
        return self._reached() if self._reached else Reached(int(self._row[1]), int(self._row[2]))

    @contextmanager
    def tracking(self, reached: Callable[[], Reached]) -> Iterator[None]:
        """Ask ``reached`` how far the run has come: within, and after an error within."""
        before, self._reached = self._reached, reached
        yield
        self._reached = before

    @contextmanager
    def excused(self) -> Iterator[None]:
        """Miss no beats within: for what may take rank 0 long, while the other ranks wait."""
        self._row[3] = 1
        try:
            yield
        finally:
            self._row[3] = 0

    def look(self) -> int:
        """Return the number of looks since the last beat, with this one; 0 where the worker is excused."""
        self._looks = self._looks + 1 if self._seen == self._row[0] and not self._row[3] else 0
        self._seen = self._row[0]
        return self._looks

    def reset(self) -> None:
        """Count looks from 0 again."""
        self._looks = 0

    def guard(
        self, timeout_s: float, on_training: Callable[[], None], on_hang: Callable[[Exception], None], log: TextIO
    ) -> None:
        """Watch this process's main thread from another thread, which also handles a hang.

        Args:
            timeout_s: time without a beat, in a worker that is training, after which it hangs. A little before, the
                stacks of its threads are written to ``log``: while the others, which wait for it, still do so, too.
            on_training: called once time counts.
            on_hang: called with a hang; last in a worker that waits for other ranks.
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
                if looks in STALLED and self.parting and (why := self.parting()):
                    return on_hang(UserError(why))
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
    """Describe where this process's main thread stands, which has made no progress for ``timeout_s``."""
    stack = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident or 0])
    waiting = _WAITING.search(stack[-1].filename) is not None
    loading = any(_LOADING.search(frame.filename) for frame in stack)
    what = "it waited for other ranks" if waiting else "it waited for a DataLoader worker" if loading else "it hung"
    return Hangs(f"{what}: no progress within cluster.timeout_s={timeout_s:g}{place(stack)}", waiting)


def _show_loaders() -> None:
    """Let DataLoader's workers write their stacks, too: they have this process's handler."""
    from multiprocessing import active_children

    for loader in active_children():
        with suppress(ProcessLookupError):
            os.kill(loader.pid or 0, signal.SIGQUIT)
