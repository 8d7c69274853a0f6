"""A typical hand-written loop: torchrun, DDP, DataLoader, DistributedSampler, clipping, a scheduler.

torchrun --nproc-per-node=2 benchmarks/plain.py --steps 2
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

SAMPLES, PER_GPU = 4096, 32


class Yardstick:
    """The work of this loop as an Isobatch task: a 784-128-10 MLP on random images."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))

    def train_data(self) -> TensorDataset:
        random = torch.Generator().manual_seed(0)
        images = torch.randn(SAMPLES, 784, generator=random)
        return TensorDataset(images, torch.randint(10, (SAMPLES,), generator=random))

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        images, labels = batch
        return F.cross_entropy(model(images), labels, reduction="sum"), len(labels)


def batches(data: TensorDataset) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this rank's batches, epoch after epoch, forever."""
    sampler: Any = DistributedSampler(data, shuffle=True)
    loader = DataLoader(data, batch_size=PER_GPU, sampler=sampler, drop_last=True)
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        yield from loader


def loop(steps: int, task: Yardstick | None = None) -> Iterator[float]:
    """Train ``steps`` steps in the initialised process group, and yield the loss of each step."""
    torch.manual_seed(0)
    task = task or Yardstick()
    model = DistributedDataParallel(task.model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / max(1, steps))
    for images, labels in itertools.islice(batches(task.train_data()), steps):
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        yield loss.item()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, required=True)
    steps = parser.parse_args().steps
    dist.init_process_group("gloo")
    for step, loss in enumerate(loop(steps), 1):
        if int(os.environ["RANK"]) == 0:
            print(f"step {step}: loss {loss:.4f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
