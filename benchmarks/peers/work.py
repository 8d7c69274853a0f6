"""Define the work that every framework does: two tasks, and the description of a training."""

from __future__ import annotations

import argparse
import os
import sys
import time
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

GLOBAL = 96  # global batch of the runs that compare cuts and resume
SEED = 0
SEEN = "ISOBATCH_BENCHMARK_SEEN"  # environment variable: folder where ranks record the samples they trained on


class Tokens:
    """A task with a label per token: sample i has 1 + i mod 7 tokens, the rest is padding."""

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
        """Return Isobatch's form of the loss: the sum and the number of units."""
        inputs, labels, index = batch
        note_seen(index)
        return cross_entropy(model(inputs), labels, "sum"), units(labels)


def cross_entropy(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Return the cross entropy over all labels except padding."""
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction=reduction)


def units(labels: Tensor) -> Tensor:
    return labels.ne(-100).sum()


def note_seen(index: Tensor) -> None:
    """Record the samples trained on in a file of this process."""
    if folder := os.environ.get(SEEN):
        with open(f"{folder}/{os.getpid()}", "a") as file:
            file.writelines(f"{sample}\n" for sample in index.tolist())


@dataclass(frozen=True)
class Job:
    """The description of a training.

    Attributes:
        per_gpu: samples per micro-batch.
        accumulation: passes per step on each rank.
        best: use the framework's best opt-in features.
        folder: folder for checkpoints and final weights, or None to write none.
        stop_at: step after which it saves a checkpoint and stops.
        resume: resume from that checkpoint.
        cpu: train on the CPU, else on a GPU.
    """

    task: Yardstick | Tokens
    steps: int
    per_gpu: int
    accumulation: int = 1
    best: bool = False
    folder: Path | None = None
    stop_at: int | None = None
    resume: bool = False
    cpu: bool = True

    @property
    def world(self) -> int:
        return int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def epochs(self) -> int:
        samples = SAMPLES if isinstance(self.task, Yardstick) else Tokens.SAMPLES
        return -(-self.steps * self.per_gpu * self.accumulation * self.world // samples)

    def begin(self) -> tuple[nn.Module, Dataset]:
        """Return the model, initialised the same for all frameworks, and the data."""
        torch.manual_seed(SEED)
        return self.task.model(), self.task.train_data()

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)

    def schedule(self, optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))

    def note_end(self, ends: list[float]) -> None:
        """Append the time at the end of a step; wait for the device first at the first and the last step."""
        if not self.cpu and len(ends) in (0, self.steps - 1):
            torch.accelerator.synchronize()
        ends.append(time.perf_counter())

    def keep(self, model: nn.Module) -> None:
        """Write the final weights on rank 0."""
        if self.folder and os.environ.get("RANK", "0") == "0":
            save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, weights(self.folder))


def weights(folder: Path) -> Path:
    return folder / "final.safetensors"


def main(train: Callable[[Job], list[float]]) -> None:
    """Run a script: train the yardstick's task for ``--steps`` steps of 32 samples per process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, required=True)
    train(Job(Yardstick(), parser.parse_args().steps, per_gpu=32))
    sys.stdout.flush()
