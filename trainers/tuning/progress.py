"""Show the progress of action=tune on rank 0: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from isobatch.conf.terminal import say

PLAIN_EVERY_S = 2.0  # seconds between two plain lines of one part


class Progress:
    """Show what is measured, and what was found so far; on other ranks than 0 nothing.

    Args:
        shown: this is rank 0.
        live: show a bar, if stdout is a terminal.
    """

    def __init__(self, *, shown: bool, live: bool = True) -> None:
        self._shown, self._part, self._next = shown, "", 0.0
        self._bar: Any = None
        self._task: Any = None
        self._live = shown and live and sys.stdout.isatty()

    def __enter__(self) -> Progress:
        if self._live:
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bars

            text = TextColumn("{task.description}", markup=False)
            self._bar = Bars(text, BarColumn(bar_width=20), TimeElapsedColumn(), transient=True)
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None

    def part(self, name: str, doing: str) -> None:
        """Begin a part."""
        self._part, self._next = name, 0.0
        self.tell(f"{name}: {doing} …")
        if self._bar:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(name, total=None)

    def say(self, text: str, share: float | None = None) -> None:
        """Show an intermediate result.

        Args:
            share: of the part that is done; None: not known.
        """
        if self._bar:
            known = {} if share is None else {"completed": share, "total": 1.0}
            self._bar.update(self._task, description=f"{self._part}  {text}", **known)
        elif self._shown and (time.monotonic() >= self._next or share == 1.0):
            self._next = time.monotonic() + PLAIN_EVERY_S
            say(f"{self._part}  {text}")

    def tell(self, text: str) -> None:
        """Print a line that stays."""
        if self._bar:
            self._bar.console.print(text, highlight=False, markup=False)
        elif self._shown:
            say(text)
