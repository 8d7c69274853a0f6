"""What every peer is asked to do: two tasks, and one training of either."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from benchmarks.plain import SAMPLES, Yardstick

GLOBAL = 96  # samples a step of the cuts and the resuming
SEED = 0
SEEN = "ISOBATCH_BENCHMARK_SEEN"  # in the environment: the folder in which ranks write down what they trained on


class Tokens:
    """Labels for the tokens of short texts: sample i has 1 + i mod 7 of them, the rest is padding."""

    SAMPLES, LENGTH, FEATURES, CLASSES = 960, 7, 8, 10

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(self.FEATURES, 32), nn.Tanh(), nn.Linear(32, self.CLASSES))

    def train_data(self) -> TensorDataset:
        random = torch.Generator().manual_seed(1)
        inputs = torch.randn(self.SAMPLES, self.LENGTH, self.FEATURES, generator=random)
        labels = torch.randint(self.CLASSES, (self.SAMPLES, self.LENGTH), generator=random)
        index = torch.arange(self.SAMPLES)
        labels[torch.arange(self.LENGTH) > (index % self.LENGTH)[:, None]] = -100
        return TensorDataset(inputs, labels, index)

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """Ours: a sum and its number of units."""
        inputs, labels, index = batch
        note_seen(index)
        return cross_entropy(model(inputs), labels, "sum"), units(labels)


def cross_entropy(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Over all labels that aren't padding."""
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction=reduction)


def units(labels: Tensor) -> Tensor:
    return labels.ne(-100).sum()


def note_seen(index: Tensor) -> None:
    """Write down which samples are trained on, in a file of this process."""
    if folder := os.environ.get(SEEN):
        with open(f"{folder}/{os.getpid()}", "a") as file:
            file.writelines(f"{one}\n" for one in index.tolist())


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        per_gpu, accumulation: of the world that the environment speaks of.
        best: the peer's opt-in way, not its usual one.
        folder: for its checkpoints and final weights; None: it leaves nothing.
        stop_at: the step after which it saves a checkpoint and ends.
        resume: go on from that checkpoint.
    """

    task: Yardstick | Tokens
    steps: int
    per_gpu: int
    accumulation: int = 1
    best: bool = False
    folder: Path | None = None
    stop_at: int | None = None
    resume: bool = False

    @property
    def world(self) -> int:
        return int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def epochs(self) -> int:
        samples = SAMPLES if isinstance(self.task, Yardstick) else Tokens.SAMPLES
        return -(-self.steps * self.per_gpu * self.accumulation * self.world // samples)

    def begin(self) -> tuple[nn.Module, Dataset]:
        """The model as all start with it, and the data."""
        torch.manual_seed(SEED)
        return self.task.model(), self.task.train_data()

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)

    def schedule(self, optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))

    def keep(self, model: nn.Module) -> None:
        """Leave the final weights, from rank 0."""
        if self.folder and os.environ.get("RANK", "0") == "0":
            save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, weights(self.folder))


def weights(folder: Path) -> Path:
    return folder / "final.safetensors"


def main(train: Callable[[Job], list[float]]) -> None:
    """A script's body: the yardstick's task, as many steps as it is told, 32 samples per process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, required=True)
    train(Job(Yardstick(), parser.parse_args().steps, per_gpu=32))
    sys.stdout.flush()
