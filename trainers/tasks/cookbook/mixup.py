"""Mix pairs of samples (mixup, Zhang et al. 2018): draw the partner and its share in ``[index]``.

Exact on any hardware: torch's and numpy's default generators are keyed by the sample's position in the run, and the
partner comes from the whole dataset. A partner from the batch would change with the micro-batch.

    python launch.py task=custom task._target_=isobatch.trainers.tasks.cookbook.mixup.Mixup lr.peak=0.1
"""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, inputs: Tensor, labels: Tensor, alpha: float) -> None:
        self.inputs, self.targets, self.alpha = inputs, F.one_hot(labels).float(), alpha

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        partner, share = int(torch.randint(len(self), ())), float(np.random.beta(self.alpha, self.alpha))
        inputs, targets = self.inputs, self.targets
        return inputs[index].lerp(inputs[partner], share), targets[index].lerp(targets[partner], share)


class Mixup:
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def train_data(self) -> Pairs:
        pixels, labels = map(torch.as_tensor, load_digits(return_X_y=True))
        return Pairs(pixels.float() / 8 - 1, labels, alpha=0.2)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")  # targets are shares of classes
