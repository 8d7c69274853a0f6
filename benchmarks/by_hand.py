"""Use each engine without Isobatch, as in its documentation, on the same work as plain.py.

torchrun --nproc-per-node=2 -m benchmarks.by_hand fsdp --steps 2
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from benchmarks.plain import PER_GPU, Yardstick, batches, loop

MAX_NORM = 1.0


class Block(nn.Module):
    """A residual block of 0.5 million parameters."""

    WIDTH = 256

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(self.WIDTH)
        self.enter, self.leave = nn.Linear(self.WIDTH, 4 * self.WIDTH), nn.Linear(4 * self.WIDTH, self.WIDTH)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = inputs + self.leave(F.gelu(self.enter(self.norm(inputs))))
        return outputs


class Tower(nn.Module):
    """Blocks between two layers."""

    def __init__(self, blocks: int = 4) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(784, Block.WIDTH), nn.Linear(Block.WIDTH, 10)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden: Tensor = self.enter(inputs)
        for block in (*self.blocks, self.leave):
            hidden = block(hidden)
        return hidden


class OneGroup(Yardstick):
    """A task with one parameter group, as in code by hand, since ZeRO sends each group separately."""

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        return [{"params": list(model.parameters())}]


class Blocks(OneGroup):
    """A task with the yardstick's data and a model that is worth sharding."""

    def model(self) -> nn.Module:
        return Tower()


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True)


def falling(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))


def fsdp(steps: int, task: Yardstick) -> Iterator[float]:
    """Train with FSDP2, which shards the blocks and the root. The optimizer gets DTensors."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    model = task.model()
    for module in (*getattr(model, "blocks", ()), model):
        fully_shard(module)
        assert isinstance(module, FSDPModule)
        module.set_force_sum_reduction_for_comms(True)  # gloo doesn't support averaging
    optimizer = sgd(model.parameters())
    scheduler = falling(optimizer, steps)
    for images, labels in batches(task.train_data()):
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        yield loss.item()


def deepspeed(stage: int, steps: int, task: Yardstick) -> Iterator[float]:
    """Train with DeepSpeed, which clips gradients and steps the scheduler itself."""
    import deepspeed

    model = task.model()
    optimizer = sgd(model.parameters())
    config = {
        "train_micro_batch_size_per_gpu": PER_GPU,
        "gradient_clipping": MAX_NORM,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=falling(optimizer, steps), config=config
    )
    for images, labels in batches(task.train_data()):
        loss = F.cross_entropy(engine(images), labels)
        engine.backward(loss)
        engine.step()
        yield loss.item()


def accelerate(steps: int, task: Yardstick) -> Iterator[float]:
    """Train with Accelerate, which prepares every object."""
    from accelerate import Accelerator

    accelerator, bare = Accelerator(cpu=True), task.model()
    optimizer: Any = sgd(bare.parameters())
    # Accelerate steps a scheduler once per process
    schedule: Any = falling(optimizer, steps * accelerator.num_processes)
    loader: Any = DataLoader(task.train_data(), batch_size=PER_GPU, shuffle=True, drop_last=True)
    model, optimizer, loader, schedule = accelerator.prepare(bare, optimizer, loader, schedule)
    for epoch in itertools.count():
        loader.set_epoch(epoch)
        for images, labels in loader:
            loss = F.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            yield loss.item()


LOOPS: dict[str, Callable[[int, Yardstick], Iterator[float]]] = {
    "ddp": loop,
    "fsdp": fsdp,
    "accelerate": accelerate,
    **{f"deepspeed {stage}": partial(deepspeed, stage) for stage in range(4)},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("engine", choices=LOOPS)
    parser.add_argument("--steps", type=int, required=True)
    args = parser.parse_args()
    if args.engine != "accelerate":  # Accelerate initialises the group itself
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    for step, loss in enumerate(itertools.islice(LOOPS[args.engine](args.steps, Yardstick()), args.steps), 1):
        if int(os.environ["RANK"]) == 0:
            print(f"step {step}: loss {loss:.4f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
