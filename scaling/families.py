"""Families of tasks: usual global batches, and optimizers for small and large batches."""

from __future__ import annotations

from typing import NamedTuple

LARGE = 1024  # a global batch of at least this many samples counts as large


class Family(NamedTuple):
    """Describe a family of tasks.

    Attributes:
        usual: the smallest and largest usual global batch, in ``unit``.
        small: optimizers for batches below LARGE, the preferred one first; ``large``: for LARGE and above.
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
    """Return the optimizers for ``family``, best first; for None, those that suit most tasks."""
    if family is None:
        return ("lamb", "adamw") if large else ("adamw", "sgd")
    return FAMILIES[family].large if large else FAMILIES[family].small
