"""What a run says while it works: to people who may have left, and into files whose disk may be full. Torch-free."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TextIO

from scaling.printable import printable


def say(text: str, to: TextIO | None = None, end: str = "\n") -> None:
    """Print it, by default to stdout; where that can't be, the work goes on."""
    with suppress(OSError, ValueError):
        print(printable(text), end=end, file=to or sys.stdout, flush=True)
