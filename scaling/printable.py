"""Make text safe to print: what a file or a user's code holds doesn't command the terminal."""

from __future__ import annotations

import re

# Control characters but newline and tab, and those that turn the direction of what follows
_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Return ``text`` with its control characters written as JSON writes them; newlines and tabs stay.

    >>> print(printable("val/\x1b[2Jloss"))
    val/\u001b[2Jloss
    """
    return _COMMANDS.sub(lambda sign: f"\\u{ord(sign[0]):04x}", text)


def one_line(text: str) -> str:
    """Return ``text`` likewise, its newlines and tabs written too."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")
