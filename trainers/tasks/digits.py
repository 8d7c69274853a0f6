"""scikit-learn's 1,797 handwritten digits (8 × 8 pixels) and a small MLP: a task that runs anywhere in seconds."""

from __future__ import annotations

import gzip
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from isobatch.scaling.errors import UserError
from isobatch.trainers.tasks.classify import Classification

VALIDATION = 360  # of 1,797 samples: a fifth


class Digits(Classification):
    """Classify digits with an MLP of ``depth`` hidden layers of ``width``."""

    def __init__(self, width: int, depth: int, dropout: float) -> None:
        self.sizes = [64, *[width] * depth]
        self.dropout = dropout
        pixels, labels = _read()
        order = np.random.default_rng(0).permutation(len(labels))
        self._train, self._val = (
            TensorDataset(torch.from_numpy(pixels[part]), torch.from_numpy(labels[part]))
            for part in (order[VALIDATION:], order[:VALIDATION])
        )

    def model(self) -> nn.Module:
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(self.sizes):
            layers += [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(self.dropout)]
        return nn.Sequential(*layers, nn.Linear(self.sizes[-1], 10))


def _read() -> tuple[np.ndarray, np.ndarray]:
    """Return pixels in [-1, 1] (float32 [1797, 64]) and labels (int64 [1797]), without importing scikit-learn."""
    package = find_spec("sklearn")
    if package is None or package.origin is None:
        raise UserError("the task digits needs scikit-learn's data", "pip install '.[tasks]' (the extra tasks)")
    with gzip.open(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    return table[:, :64] / 8 - 1, table[:, 64].astype(np.int64)
