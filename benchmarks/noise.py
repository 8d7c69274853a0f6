"""Time steps that measure the gradient noise against the same steps without it, taking turns.

python -m benchmarks.noise
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from benchmarks.step import Loop, compare_turns
from isobatch.trainers.ranks.world import World

TURNS = 11
SAMPLES, WIDTH, CLASSES = 1024, 1024, 10
VOCABULARY, LENGTH = 256, 64
PER_GPU = {"MLP": 128, "Transformer": 8}
STEPS = {"MLP": 5, "Transformer": 2}  # per turn
WAYS: tuple[tuple[str, Literal[2] | None, str], ...] = (
    ("micro-batches", None, "sgd"),
    ("halves", 2, "sgd"),
    ("halves", 2, "adamw"),
)


class MLP:
    """A task with 3.2 million parameters and 128 vectors per micro-batch."""

    def model(self) -> nn.Module:
        hidden = [layer for _ in range(3) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
        return nn.Sequential(*hidden, nn.Linear(WIDTH, CLASSES))

    def train_data(self) -> TensorDataset:
        random = torch.Generator().manual_seed(0)
        inputs = torch.randn(SAMPLES, WIDTH, generator=random)
        return TensorDataset(inputs, torch.randint(CLASSES, (SAMPLES,), generator=random))

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        inputs, labels = batch
        return F.cross_entropy(model(inputs), labels, reduction="sum"), len(labels)


class Transformer:
    """A task with 3.3 million parameters in 52 tensors and 8 sequences of 64 tokens per micro-batch."""

    def model(self) -> nn.Module:
        layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
        encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        return nn.Sequential(nn.Embedding(VOCABULARY, 256), encoder, nn.Linear(256, VOCABULARY))

    def train_data(self) -> TensorDataset:
        return TensorDataset(
            torch.randint(VOCABULARY, (SAMPLES, LENGTH + 1), generator=torch.Generator().manual_seed(0))
        )

    def loss(self, model: nn.Module, batch: tuple[Tensor]) -> tuple[Tensor, int]:
        inputs, targets = batch[0][:, :-1], batch[0][:, 1:]
        return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="sum"), targets.numel()


def turns(name: str, optimizer: str, parts: Literal[2] | None, passes: int, world: World) -> list[tuple[float, float]]:
    """Return seconds per step, (measured, not measured), of each turn."""
    loop = Loop(
        world, f"task._target_=benchmarks.noise.{name}", f"batch.per_gpu={PER_GPU[name]}", f"optimizer={optimizer}",
        f"batch.accumulation={passes}", f"duration={STEPS[name]}st", "lr.peak=0.001",
    )  # fmt: skip
    both = PER_GPU[name] * passes * world.size, None  # every step, no step
    loop(both[0], noise_parts=parts)
    found = []
    for turn in range(TURNS):
        order = both if turn % 2 else both[::-1]  # alternate
        took = {every: loop(every, noise_parts=parts) / STEPS[name] for every in order}
        found.append((took[both[0]], took[None]))
    return found


def rows() -> list[dict[str, Any]]:
    """Return a row per model, way to measure, and ranks × passes: medians, and the median of the turns' ratios."""
    found = []
    for name in PER_GPU:
        for way, parts, optimizer in WAYS:
            for ranks, passes in ((1, 2), (2, 1)):
                body = partial(turns, name, optimizer, parts, passes)
                cells = compare_turns(ranks, body, "measured ms", "step ms", "measured / not")
                what = {"model": name, "measured": way, "optimizer": optimizer, "ranks × passes": f"{ranks} × {passes}"}
                found.append({**what, **cells, "with noise.every=10st": 1 + (cells["measured / not"] - 1) / 10})
    return found


if __name__ == "__main__":
    for row in rows():
        print(json.dumps(row, ensure_ascii=False))
