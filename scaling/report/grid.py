"""Format tables, numbers and times for the terminal. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from isobatch.scaling.limits import one_line

CAUSE_CHARS = 60  # of a cause in a table
LEAST_CHARS = 12  # of a column of text


class Figure(str):
    """The text of a number, which a table aligns as one."""


def grid(
    rows: Sequence[dict[str, Any]], width: int = 0, optional: Sequence[str] = (), shortened: Sequence[str] = ()
) -> str:
    """Format rows as columns under their names, in order of first appearance; numbers are right-aligned.

    Args:
        width: the most characters of a line, if that can be reached; 0: any.
        optional: columns that are left out for it, in this order; then those of ``shortened`` lose their middle.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    texts = {name: [one_line(name), *(_cell(row.get(name)) for row in rows)] for name in names}
    widths = {name: max(map(len, texts[name])) for name in names}
    for name in (*optional, *shortened) if width else ():
        over = sum(widths.values()) + 2 * (len(widths) - 1) - width
        if over > 0 and name in widths and name in optional:
            del widths[name]
        elif over > 0 and name in widths:
            widths[name] = max(min(LEAST_CHARS, widths[name]), widths[name] - over)
    right = {name: all(isinstance(row.get(name), int | float | Figure | None) for row in rows) for name in widths}
    lines = [
        "  ".join(
            texts[name][row].rjust(w) if right[name] else cut(texts[name][row], w).ljust(w)
            for name, w in widths.items()
        ).rstrip()
        for row in range(len(rows) + 1)
    ]
    if left_out := [name for name in names if name not in widths]:
        lines.append(f"(too narrow for {', '.join(left_out)}; output=json has everything)")
    return "\n".join(lines)


def cut(text: str, width: int) -> str:
    """Return ``text`` with its middle left out if it is wider than ``width``."""
    if len(text) <= width:
        return text
    end = (width - 1) // 2
    return f"{text[: width - 1 - end]}…{text[len(text) - end :]}"


def rounded(value: float | None) -> int | None:
    return None if value is None else round(value)


def _cell(value: Any) -> str:
    if value is None:
        return "—"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else one_line(str(value))


def shortened(cause: str) -> str:
    """Return a cause that fits into a table."""
    return cause if len(cause) <= CAUSE_CHARS else f"{cause[:CAUSE_CHARS]}…"


def clock(seconds: float) -> str:
    """Format a time as ``3:05:07``, rounded up to whole seconds."""
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
