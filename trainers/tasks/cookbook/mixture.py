"""Mix datasets: draw in ``[index]`` which dataset a sample comes from, by weights, then one of its rows.

Exact on any hardware: the default generators are keyed by the sample's position in the run, so a position gets the
same dataset and row on any rank and in any micro-batch. Rows are drawn with replacement.

    python launch.py task=custom task._target_=isobatch.trainers.tasks.cookbook.mixture.Mixed lr.peak=0.1
"""

from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset


class Mixture(Dataset[Any]):
    def __init__(self, parts: list[TensorDataset], weights: list[float]) -> None:
        self.parts, self.weights = parts, torch.tensor(weights)

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)  # samples of an epoch

    def __getitem__(self, index: int) -> Any:
        part = self.parts[int(torch.multinomial(self.weights, 1))]
        return part[int(torch.randint(len(part), ()))]


class Mixed:
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))

    def train_data(self) -> Mixture:
        pixels, labels = map(torch.as_tensor, load_digits(return_X_y=True))
        images = pixels.float() / 8 - 1
        return Mixture([TensorDataset(images, labels), TensorDataset(-images[:500], labels[:500])], [0.7, 0.3])

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")
