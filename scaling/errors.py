"""The exception for mistakes of the user."""

from __future__ import annotations

from typing import Any


class UserError(ValueError):
    """A mistake in the user's input, printed without a traceback; the command exits with code 2.

    It is a ValueError so that pydantic reports it as a validation error.

    Args:
        problem: the problem, with the value; lower case, no final period.
        fix: what works instead; printed after the problem.
        key: the config key at fault; empty if there is none.
        value: the key's value.
    """

    def __init__(self, problem: str, fix: str = "", key: str = "", value: Any = None) -> None:
        super().__init__(problem, fix, key, value)
        self.problem, self.fix, self.key, self.value = problem, fix, key, value

    def __str__(self) -> str:
        return f"{self.problem}; {self.fix}" if self.fix else self.problem
