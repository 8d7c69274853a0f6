"""Ranges that numbers and texts of a config and of a stored plan have to be in, and text made safe to print."""

from __future__ import annotations

import re
from typing import Annotated

from annotated_types import Ge, Gt, Le, Len, Lt, Predicate

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


LARGEST = 10**15  # of a number of samples, tokens, ranks or passes, and of any other number
LONGEST = 4096  # characters of a name or a reason


def readable(text: str) -> bool:
    """Tell whether ``text`` is one line of Unicode without control characters."""
    return one_line(text) == text


def hexadecimal(text: str) -> bool:
    """Tell whether ``text`` is what ``isobatch.conf.identity.digest`` makes."""
    return len(text) == 12 and set(text) <= set("0123456789abcdef")


Size = Annotated[int, Ge(1), Le(LARGEST)]
Count = Annotated[int, Ge(0), Le(LARGEST)]
Seed = Annotated[int, Ge(0), Lt(2**63)]
Number = Annotated[float, Ge(-LARGEST), Le(LARGEST)]
Positive = Annotated[float, Gt(0), Le(LARGEST)]
NotNegative = Annotated[float, Ge(0), Le(LARGEST)]
Share = Annotated[float, Ge(0), Le(1)]
Memory = Annotated[float, Ge(0), Lt(1)]  # decay rate of a moment
Text = Annotated[str, Len(1, LONGEST), Predicate(readable)]
Identity = Annotated[str, Predicate(hexadecimal)]
