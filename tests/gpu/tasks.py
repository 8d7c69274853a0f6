"""Tasks for GPUs: with a loss that never needs a value on the host, that overflows in fp16, or takes much memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

CLASSES = 10


class Classes:
    """Classify random vectors with an MLP with BatchNorm and dropout."""

    def __init__(self, width: int = 64, samples: int = 512) -> None:
        self.width, self.samples = width, samples

    def model(self) -> nn.Module:
        width = self.width
        inner = [layer for _ in range(3) for layer in (nn.Linear(width, width), nn.GELU(), nn.Dropout(0.1))]
        return nn.Sequential(nn.BatchNorm1d(width), *inner, nn.Linear(width, CLASSES))

    def train_data(self) -> Any:
        random = torch.Generator().manual_seed(0)
        inputs = torch.randn(self.samples, self.width, generator=random)
        return TensorDataset(inputs, torch.randint(CLASSES, (self.samples,), generator=random))

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        inputs, labels = batch
        return F.cross_entropy(model(inputs), labels, reduction="sum"), len(labels)

    def flops_per_unit(self, model: nn.Module) -> float:
        return 6.0 * sum(parameter.numel() for parameter in model.parameters())


class NeverWaits(Classes):
    """``Classes`` in which the host must not wait for the GPU in steps 4 to 8, else torch raises."""

    calls = 0

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        self.calls += 1
        if batch[0].is_cuda:
            torch.cuda.set_sync_debug_mode("error" if 4 <= self.calls < 9 else "default")
        return super().loss(model, batch)


class Waits(NeverWaits):
    """``NeverWaits`` with a loss that waits."""

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        loss, units = super().loss(model, batch)
        return loss + 0 * float(loss.detach()), units


class Steep(Classes):
    """``Classes`` with gradients too large for fp16 and its first loss scales."""

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        loss, units = super().loss(model, batch)
        return loss * 1000, units


class Hungry(Classes):
    """``Classes`` that runs out of memory with more than ``fits`` samples in a pass."""

    BLOCK = 256 << 20  # bytes

    def __init__(self, fits: int, **args: Any) -> None:
        super().__init__(**args)
        self.fits = fits

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        loss, units = super().loss(model, batch)
        if model.training:
            free, _ = torch.cuda.mem_get_info()
            spare = free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            blocks = int(spare * units / (self.fits + 0.5) / self.BLOCK)
            _ = [torch.empty(self.BLOCK, dtype=torch.uint8, device=loss.device) for _ in range(blocks)]
        return loss, units
