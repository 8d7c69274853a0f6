"""The one exception for mistakes of the user."""

from __future__ import annotations

from typing import Any


class UserError(ValueError):
    """Something the user gave can't work. It is printed once, without a traceback, and the command ends with code 2.

    It is a ValueError so that pydantic, too, reports it as what is wrong with a value.

    Args:
        problem: what is wrong, with the value; lower case, no final period.
        fix: what works instead; printed behind the problem.
        key: the config key that it is about; empty where it is about none.
        value: the key's value.
    """

    def __init__(self, problem: str, fix: str = "", key: str = "", value: Any = None) -> None:
        super().__init__(problem, fix, key, value)
        self.problem, self.fix, self.key, self.value = problem, fix, key, value

    def __str__(self) -> str:
        return f"{self.problem}; {self.fix}" if self.fix else self.problem
