"""Compare the largest per-GPU batch that action=tune finds with the largest by trying, under five limits.

python -m benchmarks memory
"""

from __future__ import annotations

import json
import tempfile
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from isobatch.scaling.planning.automatic import configured
from isobatch.trainers.loop.opening import open_task
from isobatch.trainers.ranks.world import World
from isobatch.trainers.tasks import text
from isobatch.trainers.tasks.task import make_task
from isobatch.trainers.tuning.bench import Bench
from isobatch.trainers.tuning.memory import OneSize, OutOfMemory, measure
from isobatch.trainers.tuning.meter import Meter
from isobatch.trainers.tuning.progress import Progress
from isobatch.trainers.tuning.samples import LargeBatches
from tests.support.harness import in_ranks, session_of

LIMITS_GB = (0.5, 0.6, 0.75, 1.0, 1.3)
MARGIN = 0.2
STEP = 0.02  # of the size, between two sizes that are tried, and at least 8 samples
MODELS = ("MLP", "Conv", "GPT")
DATA = 100_000  # samples, so that the data isn't what bounds the batch


class Repeated(torch.utils.data.Dataset[Any]):
    """A few samples, repeated."""

    def __init__(self, *tensors: Tensor) -> None:
        self._few = TensorDataset(*tensors)

    def __len__(self) -> int:
        return DATA

    def __getitem__(self, index: int) -> Any:
        return self._few[index % len(self._few)]


class MLP:
    """1 million parameters, and 0.2 MB of activations per sample."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Tanh(), nn.Linear(16_384, 64), nn.ReLU(), nn.Linear(64, 10))

    def train_data(self) -> Repeated:
        return Repeated(torch.randn(16, 16_384), torch.randint(10, (16,)))

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        inputs, labels = batch
        return F.cross_entropy(model(inputs), labels, reduction="sum"), len(labels)


class Conv(MLP):
    """A convolutional net with BatchNorm for 3 × 32 × 32 images."""

    def model(self) -> nn.Module:
        sizes = (3, 24, 24, 48, 48)
        blocks = [
            layer
            for inputs, outputs in pairwise(sizes)
            for layer in (nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())
        ]
        return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(sizes[-1], 10))

    def train_data(self) -> Repeated:
        return Repeated(torch.randn(16, 3, 32, 32), torch.randint(10, (16,)))


class GPT:
    """A transformer of two layers, for 128 tokens."""

    def model(self) -> nn.Module:
        return text.GPT(128, 128, 2, 4, 0.1)

    def train_data(self) -> Repeated:
        return Repeated(torch.randint(256, (16, 129)))

    def loss(self, model: nn.Module, batch: tuple[Tensor]) -> tuple[Tensor, int]:
        tokens = batch[0]
        logits = model(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"), tokens[:, 1:].numel()


def compare(name: str, limit_gb: float, world: World) -> dict[str, Any]:
    """Return what the search finds, and the largest size that fits by trying sizes around it."""
    torch.set_num_threads(2)
    session = session_of(
        configured([
            "task=custom", f"task._target_=benchmarks.memory.{name}", "duration=1000st", "lr.peak=0.001",
            "optimizer=adamw", "batch.global_size=64", f"cluster.memory_gb={limit_gb}", "device=cpu",
        ]),
        world,
    )  # fmt: skip
    opened = open_task(session, make_task(session.config))
    assert opened
    bench = Bench(session, opened, None, Progress(shown=False))
    found = measure(bench)
    meter, batches = Meter(world.device, 1, limit_gb), LargeBatches(opened.data, opened.task, 0)
    room = limit_gb * 1e9 * (1 - MARGIN)

    def fits(size: int) -> bool:
        try:
            with bench.trial(bench.plan(size, size)) as trial:
                return OneSize(trial, meter, batches, size, single=False).peak() <= room
        except OutOfMemory:
            return False

    best = found.per_gpu
    stride = max(8, round(best * STEP / 8) * 8)
    while fits(best + stride):
        best += stride
    while best > 2 and not fits(best):
        best -= stride
    error = (found.estimate or {}).get("error")
    return {
        "model": name,
        "limit GB": limit_gb,
        "found": found.per_gpu,
        "by trying": best,
        "found / by trying": found.per_gpu / best,
        "probes": len(found.probes),
        "estimate's error": "unknown" if error is None else f"{error:+.0%}",
    }


def rows() -> list[dict[str, Any]]:
    """Return a row per model and limit."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            for limit in LIMITS_GB:
                body = partial(compare, name, limit)
                (row,) = in_ranks(1, body, Path(folder) / f"{name}-{limit}", deadline_s=600)
                if "raised" in row:
                    raise RuntimeError(json.dumps(row))
                found.append(row)
    return found
