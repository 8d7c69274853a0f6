"""What tasks of classification share: the measures of a batch of logits."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def measures(logits: Tensor, labels: Tensor) -> dict[str, tuple[Tensor, int]]:
    """Return the sum of the cross entropies (nats), and how many labels have the highest logit, with their number.

    Args:
        logits: [samples, classes].
        labels: int64 [samples].
    """
    loss, hits = F.cross_entropy(logits, labels, reduction="sum"), (logits.argmax(-1) == labels).sum()
    return {"loss": (loss, len(labels)), "accuracy": (hits, len(labels))}
