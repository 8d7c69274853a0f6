"""Families of tasks: the global batches that people start from, and the optimizers that suit small and large ones."""

from __future__ import annotations

from typing import NamedTuple

LARGE = 1024  # samples a step, from which on a batch counts as large


class Family(NamedTuple):
    """What is known of a family.

    Attributes:
        usual: the least and the most that people use as global batch, in ``unit``.
        small: optimizers below LARGE, the first that has a base LR is taken; ``large``: from it on.
    """

    usual: tuple[int, int]
    unit: str
    small: tuple[str, ...]
    large: tuple[str, ...]


FAMILIES = {
    "images": Family((32, 512), "sample", ("sgd", "adamw"), ("lars", "lamb", "sgd")),
    "detection": Family((8, 32), "sample", ("sgd", "adamw"), ("lars", "adamw", "sgd")),
    "rnn": Family((16, 128), "sample", ("adamw", "sgd"), ("lamb", "adamw")),
    "finetune": Family((16, 64), "sample", ("adamw", "sgd"), ("lamb", "adamw")),
    "speech": Family((64, 256), "sample", ("adamw", "sgd"), ("lamb", "adamw")),
    "rl": Family((64, 256), "sample", ("adamw", "sgd"), ("adamw", "lamb")),
    "volumes": Family((4, 16), "sample", ("adamw", "sgd"), ("adamw", "lamb", "sgd")),
    "language": Family((250_000, 4_000_000), "token", ("adamw", "sgd"), ("adamw", "lamb")),
}


def optimizers(family: str | None, large: bool) -> tuple[str, ...]:
    """Return the optimizers that suit a family, the best first; where it isn't stated, those that suit most."""
    if family is None:
        return ("lamb", "adamw") if large else ("adamw", "sgd")
    return FAMILIES[family].large if large else FAMILIES[family].small
