"""Convert the result of a task's loss to a sum of losses and a number of units."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from torch import Tensor

from isobatch.scaling.errors import UserError
from isobatch.scaling.geometry import counted
from isobatch.scaling.stopping import refuse_unnameable
from isobatch.trainers.model.precision import widened

WANTED = "task.loss has to return (sum of the losses over units, number of units), or one loss per sample"


Sum = tuple[Tensor | float, Tensor | float]
"""A sum and the number of units that it is over."""


def checked(result: Any, samples: int | None = None) -> tuple[Tensor, float | Tensor, dict[str, Sum]]:
    """Return ``summed(result, samples)`` for training. Raises UserError like ``summed``, and if it has no gradient."""
    loss, units, measures = summed(result, samples)
    if not loss.requires_grad:
        raise UserError(f"{WANTED}; it returned {_shown(result)} without a gradient")
    return loss, units, measures


def summed(result: Any, samples: int | None = None) -> tuple[Tensor, float | Tensor, dict[str, Sum]]:
    """Return the sum of a task's losses (0-dim), the number of units, and the measures.

    Args:
        result: the loss's result: (sum over units, number of units), or one loss per sample, [samples]; either may be
            followed by measures {name: (sum, count)}.
        samples: samples of the batch; None: not known.

    Raises:
        UserError: the result has none of these forms.
    """
    if not (isinstance(result, tuple) and len(result) > 1 and isinstance(result[-1], dict)):
        return *_summed(result, samples), {}
    *losses, measures = result
    return *_summed(losses[0] if len(losses) == 1 else tuple(losses), samples), _measures(measures)


def _measures(measures: dict[Any, Any]) -> dict[str, Sum]:
    """Return measures as numbers and 0-dim tensors without gradients."""
    found: dict[str, Sum] = {}
    for name, pair in measures.items():
        numbers = pair if isinstance(pair, tuple) and len(pair) == 2 and isinstance(name, str) else ()
        if not numbers or not all(isinstance(n, Real) or (isinstance(n, Tensor) and n.numel() == 1) for n in numbers):
            problem = f"task.loss has to return measures as {{name: (sum, count)}}; {name!r:.60} has {pair!r:.60}"
            raise UserError(problem, "give two numbers, such as (correct.sum(), len(labels))", "task._target_")
        refuse_unnameable(name, "task.loss")
        total, count = (n.detach().reshape(()) if isinstance(n, Tensor) else float(n) for n in numbers)
        found[name] = total, count
    return found


def _summed(result: Any, samples: int | None) -> tuple[Tensor, float | Tensor]:
    if isinstance(result, Tensor):
        return _summed_samples(result, samples), float(len(result))
    if not isinstance(result, tuple) or len(result) != 2:
        raise UserError(f"{WANTED}; it returned {_shown(result)}")
    loss, units = result
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise UserError(f"{WANTED}; its sum is {_shown(loss)}, not a scalar tensor")
    loss = widened(loss.reshape(()) if loss.ndim else loss)
    if isinstance(units, Tensor) and units.numel() == 1:
        if units.device.type != "cpu":  # reading it would wait for the device; the step's total is checked later
            return loss, units.detach().reshape(())
        units = units.item()
    if isinstance(units, Real) and not isinstance(units, bool) and 0 <= float(units) < math.inf:
        return loss, float(units)
    raise UserError(f"{WANTED}; its number of units is {_shown(units)}, not a number of 0 or more")


def _summed_samples(losses: Tensor, samples: int | None) -> Tensor:
    if losses.ndim == 1 and samples in (None, len(losses)):
        return widened(losses).sum()
    fix = "return the sum with the number of units, or use reduction='none'"
    if losses.ndim == 2 and losses.shape[0] == losses.shape[1] == samples:
        fix = "outputs [n, 1] and targets [n] broadcast to [n, n]: give them one shape, such as by outputs.squeeze(1)"
    elif losses.ndim:
        fix = "add up the losses of each sample, such as by losses.flatten(1).sum(1)"
    batch = "" if samples is None else f" for {counted(samples, 'sample')}"
    raise UserError(f"{WANTED}; it returned {_shown(losses)}{batch}", fix)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return (f"{value!r:.60}, " if isinstance(value, Real | str | None) else "") + f"a {type(value).__name__}"
