"""The module that engines wrap, and torch's errors in our words."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from isobatch.scaling.errors import UserError

Found = TypeVar("Found")


class Root(nn.Module):
    """A module whose forward is whatever is to be done with the model: so a task may call it twice, or only a part."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], Found]) -> Found:
        return work()


class Explained:
    """Within, an error of torch's is raised as a UserError that says what to do.

    Args:
        explain: returns it, for the error's text; None: nothing better than the text.
    """

    def __init__(self, explain: Callable[[str], UserError | None]) -> None:
        self._explain = explain

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, RuntimeError | ValueError) and (explained := self._explain(str(error))):
            raise explained from error


def explain(text: str) -> UserError | None:
    """Return what to say for an error of a forward or a backward, by its text; None: nothing better."""
    if "Expected more than 1 value per channel" not in text:
        return None
    return UserError(
        "BatchNorm has no statistics of a single sample, which a micro-batch is here",
        "use a larger batch.per_gpu or batch.global_size, or batchnorm.mode=ghost batchnorm.ghost_size=N, which takes "
        "them from N samples on any hardware",
        key="batch.per_gpu",
    )
