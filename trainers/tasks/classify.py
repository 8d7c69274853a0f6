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

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, labels = batch
        return F.cross_entropy(model(self._scaled(inputs)), labels, reduction="none")

    def evaluate(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, tuple[Tensor, int]]:
        """Return the summed cross entropy in nats, and the number of correct predictions."""
        inputs, labels = batch
        logits = model(self._scaled(inputs))
        loss, hits = F.cross_entropy(logits, labels, reduction="sum"), (logits.argmax(-1) == labels).sum()
        return {"loss": (loss, len(labels)), "accuracy": (hits, len(labels))}

    def _scaled(self, inputs: Tensor) -> Tensor:
        return inputs
