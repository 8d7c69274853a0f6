"""Ranges that numbers and texts of a config and of a stored plan have to be in, each written once."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt, Le, Len, Lt, Predicate

from isobatch.scaling.printable import one_line

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
