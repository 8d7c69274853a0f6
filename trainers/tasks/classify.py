"""Shared base of the classification tasks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


class Classification:
    """Base class of tasks whose samples are (inputs, label) and whose model returns logits [samples, classes].

    A subclass sets ``_train`` and ``_val``, map-style datasets, and defines ``model()``.
    """

    _train: Any
    _val: Any

    def train_data(self) -> Any:
        return self._train

    def val_data(self) -> Any:
        return self._val if len(self._val) else None

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, tuple[Tensor, int]]]:
        """Return the cross entropy in nats of each sample, and the accuracy as a measure."""
        inputs, labels = batch
        logits = model(self._scaled(inputs))
        hits = (logits.argmax(-1) == labels).sum()
        return F.cross_entropy(logits, labels, reduction="none"), {"accuracy": (hits, len(labels))}

    def _scaled(self, inputs: Tensor) -> Tensor:
        return inputs
