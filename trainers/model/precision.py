"""The precision of the forward, and the loss scale that keeps gradients from vanishing in fp16."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Return a context that runs a forward under autocast to ``precision``; losses stay in fp32."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, DTYPES[precision])


class LossScale:
    """The factor on the loss: halved if the gradient overflows, doubled after 2,000 steps in a row without overflow.

    Source: Micikevicius et al. 2018, "Mixed Precision Training", arXiv:1710.03740; constants of torch.amp.GradScaler.

    Attributes:
        state: the factor and the number of steps since its last change: float64 [2], on the CPU; saved in checkpoints.
    """

    FIRST, LOWEST, PATIENCE = 2.0**16, 1.0, 2000

    def __init__(self) -> None:
        self.state = torch.tensor([self.FIRST, 0.0], dtype=torch.float64)

    @property
    def factor(self) -> float:
        return float(self.state[0])

    def kept(self) -> None:
        """Count a step with a finite gradient; double the factor after PATIENCE of them."""
        self.state[1] += 1
        if self.state[1] == self.PATIENCE:
            self.state.copy_(torch.tensor([self.factor * 2, 0]))

    def lower(self) -> bool:
        """Halve the factor after a step that wasn't finite. Return False if the factor is at its lowest already."""
        if self.factor <= self.LOWEST:
            return False
        self.state.copy_(torch.tensor([self.factor / 2, 0]))
        return True


def widened(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in at least 32 bits: the rounding of narrower sums depends on the number of ranks."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor
