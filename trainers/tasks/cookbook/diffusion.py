"""Train a denoiser: draw the time and the noise of each sample in ``augment``.

Exact on any hardware: the generator that ``augment`` gets is keyed by the sample's position in the run, on any rank and
in any micro-batch. Evaluations don't call ``augment``: draw in the ``[index]`` of the validation data instead.

    python launch.py task=custom task._target_=isobatch.trainers.tasks.cookbook.diffusion.Denoise lr.peak=0.1
"""

from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset


class Denoise:
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(65, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 64))

    def train_data(self) -> TensorDataset:
        return TensorDataset(torch.tensor(load_digits().data / 8 - 1, dtype=torch.float32))

    def augment(self, sample: Any, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        time, noise = torch.rand(1, generator=generator), torch.randn(64, generator=generator)
        return (1 - time).sqrt() * sample[0] + time.sqrt() * noise, time, noise

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        noisy, time, noise = batch
        predicted = model(torch.cat([noisy, time], dim=1))
        return F.mse_loss(predicted, noise, reduction="none").mean(1)  # over pixels: still one loss per sample
