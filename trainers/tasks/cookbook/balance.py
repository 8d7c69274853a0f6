"""Balance classes: draw the class of each sample in ``[index]``, then one of the class's rows.

Exact on any hardware: Isobatch keys the default generators by the sample's position in the run before it calls
``[index]``. A position gets the same row on any rank and in any micro-batch, and each epoch draws other rows.

    python launch.py task=custom task._target_=isobatch.trainers.tasks.cookbook.balance.Balanced lr.peak=0.1
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset


class Balance(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels = inputs, labels
        self.rows = [torch.where(labels == label)[0] for label in labels.unique()]

    def __len__(self) -> int:
        return len(self.labels)  # samples of an epoch

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        rows = self.rows[int(torch.randint(len(self.rows), ()))]
        row = rows[torch.randint(len(rows), ())]
        return self.inputs[row], self.labels[row]


class Balanced:
    def model(self) -> nn.Module:
        return nn.Linear(64, 10)

    def train_data(self) -> Balance:
        pixels, labels = map(torch.as_tensor, load_digits(return_X_y=True))
        kept = (labels > 0) | (torch.arange(len(labels)) % 20 == 0)  # keep few zeros, so that classes are unbalanced
        return Balance(pixels[kept].float() / 8 - 1, labels[kept])

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")
