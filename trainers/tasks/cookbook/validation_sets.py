"""Evaluate on several validation sets: one dataset whose samples carry the number of their set.

Exact on any hardware: each batch gives a sum and a count per set, both 0 if it has no samples of the set. They are
summed over ranks, then divided. ``summarise`` gets the totals; ``checkpoint.best=val/worst:max`` works, too.

    python launch.py task=custom task._target_=isobatch.trainers.tasks.cookbook.validation_sets.Sets lr.peak=0.1
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset


class Sets:
    def __init__(self) -> None:
        pixels, self.labels = map(torch.as_tensor, load_digits(return_X_y=True))
        self.images = pixels.float() / 8 - 1

    def model(self) -> nn.Module:
        return nn.Linear(64, 10)

    def train_data(self) -> TensorDataset:
        return TensorDataset(self.images[360:], self.labels[360:])

    def val_data(self) -> TensorDataset:
        clean, labels, sets = self.images[:360], self.labels[:360].repeat(3), torch.arange(3).repeat_interleave(360)
        return TensorDataset(torch.cat([clean, clean.view(-1, 8, 8).flip(2).flatten(1), -clean]), labels, sets)

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    def evaluate(self, model: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, tuple[Tensor, Tensor]]:
        hits = model(batch[0]).argmax(1) == batch[1]
        inside = {name: batch[2] == number for number, name in enumerate(("clean", "mirrored", "negative"))}
        return {name: (hits[mask].sum(), mask.sum()) for name, mask in inside.items()}

    def summarise(self, totals: dict[str, tuple[float, float]]) -> dict[str, float]:
        return {"worst": min(hits / count for hits, count in totals.values() if count)}
