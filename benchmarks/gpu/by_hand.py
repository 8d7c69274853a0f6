"""Train with a DDP loop written by hand for a GPU, as a good practitioner does it.

torchrun --nproc-per-node=1 -m benchmarks.gpu.by_hand --steps 2
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from benchmarks.plain import PER_GPU, Yardstick
from benchmarks.step import kept, synchronize


class Plain:
    """A hand-written loop: autocast, torch.compile, a fused optimizer, clipping, pinned asynchronous copies.

    It never reads a value from the device. On one GPU, DDP can be left out.

    Args:
        passes: passes per step; DDP reduces in each.
        skip: number of steps at the start of a turn that aren't timed.
    """

    def __init__(
        self,
        task: Any,
        device: torch.device,
        *,
        per_gpu: int,
        steps: int,
        optimizer: Any,
        bf16: bool = True,
        compiled: bool = True,
        passes: int = 1,
        skip: int = 0,
        ddp: bool = True,
    ) -> None:
        self.task, self.device, self.per_gpu, self.steps = task, device, per_gpu, steps
        self.passes, self.skip, self.bf16 = passes, skip, bf16
        self.model: nn.Module = task.model().to(device)
        matrices, vectors = ([p for p in self.model.parameters() if (p.ndim > 1) is many] for many in (True, False))
        groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
        options: Any = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
        self.optimizer = optimizer(groups, lr=1e-4, fused=True, **options)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 0.5 ** (step / 1000))
        if compiled:
            self.model = torch.compile(self.model)  # type: ignore[assignment]
        if ddp:
            self.model = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        self.batches: dict[int, Iterator[tuple[Tensor, ...]]] = {}  # by the number of workers
        kept.append(self)  # DataLoader waits for workers that gloo keeps from ending

    def _batches(self, workers: int) -> Iterator[tuple[Tensor, ...]]:
        data = self.task.train_data()
        sampler: Any = DistributedSampler(data)
        loader = DataLoader(
            data, self.per_gpu, sampler=sampler, drop_last=True, num_workers=workers, persistent_workers=workers > 0,
            pin_memory=self.device.type != "cpu",
        )  # fmt: skip
        for epoch in itertools.count():
            sampler.set_epoch(epoch)
            for batch in loader:
                yield tuple(tensor.to(self.device, non_blocking=True) for tensor in batch)

    def __call__(self, workers: int = 0, save: Path | None = None) -> float:
        """Train a turn's steps and return the seconds.

        Args:
            workers: processes that load data.
            save: file for the state after the first timed step; training waits while it is written.
        """
        began, batches = time.perf_counter(), self.batches.setdefault(workers, self._batches(workers))
        for step in range(self.skip + self.steps):
            if step == self.skip:
                synchronize(self.device)
                began = time.perf_counter()
            for batch in itertools.islice(batches, self.passes):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                    loss, units = self.task.loss(self.model, batch)
                (loss / (units * self.passes)).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()
            if save and step == self.skip:
                torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, save)
        synchronize(self.device)
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, required=True)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    dist.init_process_group(dist.get_default_backend_for_device(device))
    steps = parser.parse_args().steps
    sgd: Any = torch.optim.SGD
    Plain(Yardstick(), device, per_gpu=PER_GPU, steps=steps, optimizer=sgd, bf16=False, compiled=False)()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
