"""Annotated types with the ranges of a config's and a stored plan's values, and helpers to print text safely."""

from __future__ import annotations

import re
from typing import Annotated

from annotated_types import Ge, Gt, Le, Len, Lt, Predicate

# Control characters except newline and tab, and characters that change the text's direction
_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Return ``text`` with control characters escaped as in JSON, except newlines and tabs.

    >>> print(printable("val/\x1b[2Jloss"))
    val/\u001b[2Jloss
    """
    return _COMMANDS.sub(lambda sign: f"\\u{ord(sign[0]):04x}", text)


def one_line(text: str) -> str:
    """Return ``text`` with control characters, newlines and tabs escaped."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


LARGEST = 10**15  # limit of any number: samples, tokens, ranks, passes, …
LONGEST = 4096  # characters of a name or a reason


def readable(text: str) -> bool:
    """Return True if ``text`` is one line of Unicode without control characters."""
    return one_line(text) == text


def hexadecimal(text: str) -> bool:
    """Return True if ``text`` has the form of ``isobatch.conf.identity.digest``."""
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
