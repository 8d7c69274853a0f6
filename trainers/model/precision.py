"""What the forward computes in, and the factor on the loss that keeps gradients from vanishing in fp16."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Around a forward: autocast to ``precision``, whose losses stay in fp32; for fp32 nothing."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, DTYPES[precision])


class LossScale:
    """The factor on the loss: halved where the gradient overflowed, doubled after 2,000 steps in a row without.

    As in Micikevicius et al. 2018, "Mixed Precision Training", arXiv:1710.03740; numbers as in torch.amp.GradScaler.

    Attributes:
        state: the factor, and the steps since it was last changed: float64 [2], on the CPU; part of a checkpoint.
    """

    FIRST, LOWEST, PATIENCE = 2.0**16, 1.0, 2000

    def __init__(self) -> None:
        self.state = torch.tensor([self.FIRST, 0.0], dtype=torch.float64)

    @property
    def factor(self) -> float:
        return float(self.state[0])

    def kept(self) -> None:
        """A step was finite."""
        factor, steps = self.state.tolist()
        grows = steps + 1 == self.PATIENCE
        self._set(factor * 2 if grows else factor, 0 if grows else steps + 1)

    def lower(self) -> bool:
        """A step wasn't finite. False where the factor can't be lower: then it isn't to blame."""
        if self.factor <= self.LOWEST:
            return False
        self._set(self.factor / 2, 0)
        return True

    def _set(self, *numbers: float) -> None:
        self.state.copy_(torch.tensor(numbers))


def widened(loss: Tensor) -> Tensor:
    """A loss of fewer bits in fp32: what it is divided by would be rounded, otherwise on each number of ranks."""
    return loss.float() if loss.dtype.itemsize < 4 else loss
