"""The note that rides along with the gradients: what all ranks have to know of a step, summed over ranks and passes.

It is the gradient of a small extra parameter, so it travels in the engine's own reduction and costs no message. Units go
as their deviation from the plan, which is exactly 0 in most runs and so loses nothing in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

FIELDS = ("loss", "units", "stop")


class NoteCarrier(nn.Module):
    """Holds the extra parameter; belongs to no optimizer, norm or checkpoint."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.note = nn.Parameter(torch.zeros(len(FIELDS), device=device))

    def attach(self, loss: Tensor, note: Tensor) -> Tensor:
        """``loss`` unchanged, with ``note`` (float32 [3]) as the carrier's gradient once backward runs."""
        return _Attach.apply(loss, self.note, note)

    def take(self) -> Tensor:
        """The accumulated (and, by the engine, reduced) note; leaves none behind."""
        taken, self.note.grad = self.note.grad, None
        assert taken is not None, "no backward since the last take"
        return taken


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, carrier: Tensor, note: Tensor) -> Tensor:
        ctx.save_for_backward(note)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        return grad, ctx.saved_tensors[0], None


@dataclass(frozen=True, slots=True)
class Total:
    """The notes of all ranks and passes of one step, summed: 0-dim tensors on the training device.

    Attributes:
        loss: sum of the losses over all units of the global batch.
        units: their number.
        stop: above 0 where some rank was asked to stop.
    """

    loss: Tensor
    units: Tensor
    stop: Tensor
