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
        """Count a step that was finite; raise the factor after PATIENCE of them."""
        self.state[1] += 1
        if self.state[1] == self.PATIENCE:
            self.state.copy_(torch.tensor([self.factor * 2, 0]))

    def lower(self) -> bool:
        """Lower the factor, as a step wasn't finite; False: it can't be lower, and so isn't to blame."""
        if self.factor <= self.LOWEST:
            return False
        self.state.copy_(torch.tensor([self.factor / 2, 0]))
        return True


def widened(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in at least 32 bits: sums of fewer are rounded, otherwise on each number of ranks."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor
