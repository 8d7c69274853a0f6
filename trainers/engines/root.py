"""The module that engines wrap, and what may come back from a task's loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, TypeVar

from torch import Tensor, nn

from isobatch.scaling.errors import UserError
from isobatch.scaling.geometry import counted
from isobatch.trainers.model.precision import widened

Found = TypeVar("Found")


class Root(nn.Module):
    """A module whose forward is whatever is to be done with the model: so a task may call it twice, or only a part."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], Found]) -> Found:
        return work()


WANTED = "task.loss has to return (sum of the losses over units, number of units), or one loss per sample"


def checked(result: Any, samples: int | None = None) -> tuple[Tensor, float | Tensor]:
    """Return what ``summed`` does, for a loss that is to be trained on.

    Raises:
        UserError: it is no loss, or has no gradient.
    """
    loss, units = summed(result, samples)
    if not loss.requires_grad:
        raise UserError(f"{WANTED}; it returned {_shown(result)} without a gradient")
    return loss, units


def summed(result: Any, samples: int | None = None) -> tuple[Tensor, float | Tensor]:
    """Return the sum of losses (0-dim) and the number of units that a task's loss stands for.

    Args:
        result: what the loss returned: (sum over units, number of units), or one loss per sample, [samples].
        samples: of the batch; None: not known.

    Raises:
        UserError: it is neither.
    """
    if isinstance(result, Tensor):
        return _summed_samples(result, samples), float(len(result))
    if not isinstance(result, tuple) or len(result) != 2:
        raise UserError(f"{WANTED}; it returned {_shown(result)}")
    loss, units = result
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise UserError(f"{WANTED}; its sum is {_shown(loss)}, not a scalar tensor")
    loss = widened(loss.reshape(()) if loss.ndim else loss)
    if isinstance(units, Tensor) and units.numel() == 1:
        if units.device.type != "cpu":  # a look would wait for the device; the step's total is looked at later
            return loss, units.detach().reshape(())
        units = units.item()
    if isinstance(units, Real) and not isinstance(units, bool) and 0 <= float(units) < math.inf:
        return loss, float(units)
    raise UserError(f"{WANTED}; its number of units is {_shown(units)}, not a number of 0 or more")


def _summed_samples(losses: Tensor, samples: int | None) -> Tensor:
    if losses.ndim == 1 and samples in (None, len(losses)):
        return widened(losses).sum()
    fix = "return the sum with the number of units, or use reduction='none'"
    if losses.ndim:
        fix = "add up the losses of each sample, as losses.flatten(1).sum(1) does"
    batch = "" if samples is None else f" for {counted(samples, 'sample')}"
    raise UserError(f"{WANTED}; it returned {_shown(losses)}{batch}", fix)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return (
        f"{value!r:.60}, a {type(value).__name__}"
        if isinstance(value, Real | str | None)
        else f"a {type(value).__name__}"
    )


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
