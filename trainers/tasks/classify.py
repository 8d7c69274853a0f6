"""What tasks of classification share: the loss and the measures of a batch of logits."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def summed_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """Sum of the cross entropies (nats) of logits [samples, classes], and the number of samples."""
    return F.cross_entropy(logits, labels, reduction="sum"), len(labels)


def measures(logits: Tensor, labels: Tensor) -> dict[str, tuple[Tensor, int]]:
    """The loss, and how many labels [samples] have the highest logit, each with the number of samples."""
    return {"loss": summed_loss(logits, labels), "accuracy": ((logits.argmax(-1) == labels).sum(), len(labels))}
