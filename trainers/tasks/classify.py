"""What tasks of classification share."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


class Classification:
    """Classify inputs by logits [samples, classes]; samples are (inputs, label).

    A subclass sets ``_train`` and ``_val``, map-style datasets, and has ``model()``.
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
        """Return the sum of the cross entropies (nats), and how many labels have the highest logit."""
        inputs, labels = batch
        logits = model(self._scaled(inputs))
        loss, hits = F.cross_entropy(logits, labels, reduction="sum"), (logits.argmax(-1) == labels).sum()
        return {"loss": (loss, len(labels)), "accuracy": (hits, len(labels))}

    def _scaled(self, inputs: Tensor) -> Tensor:
        return inputs
