"""Format tables in Markdown, and silence the output of measured code."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

Rows = list[dict[str, Any]]


def cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def markdown(rows: Rows) -> str:
    """Format rows with the same keys as a table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@contextmanager
def silenced() -> Iterator[None]:
    """Discard the output of this process and its forks."""
    sys.stdout.flush()
    null = os.open(os.devnull, os.O_WRONLY)
    saved = [os.dup(stream) for stream in (1, 2)]
    try:
        for stream in (1, 2):
            os.dup2(null, stream)
        yield
    finally:
        for stream, original in zip((1, 2), saved, strict=True):
            os.dup2(original, stream)
        for descriptor in (null, *saved):
            os.close(descriptor)
