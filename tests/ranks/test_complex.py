"""Test models with complex parameters and buffers: the same on any number of ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from isobatch.trainers.engines import ddp
from tests.ranks.test_engines import Bare
from tests.support.harness import ADAM_ROUNDING, ROUNDING, Runs, distance
from tests.support.tasks import Counted

TASK = (
    "task=custom",
    f"task._target_={__name__}.Spectral",
    "batch.global_size=96",
    "duration=8st",
    "lr.peak=0.05",
    "clip_norm=0.5",
    "ema=200sa",
    "noise.every=3st",
)


class Filter(nn.Module):
    """A filter of the frequencies of the inputs."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(5, dtype=torch.complex64, generator=random))
        self.gain = nn.Parameter(torch.tensor(1 + 0.5j))  # FSDP doesn't shard it
        self.register_buffer("shift", torch.randn(5, dtype=torch.complex64, generator=random))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(inputs) * (self.weight + self.shift) * self.gain)


class Spectral(Counted):
    def model(self) -> nn.Module:
        return nn.Sequential(Filter(), *super().model())


@pytest.mark.parametrize(
    "engine", [["engine=ddp"], ["numerics=bitwise"], ["engine=accelerate"], ["engine=fsdp", "engine.shard=[0]"]]
)
def test_complex_parameters(runs: Runs, engine: list[str]) -> None:
    one, three = runs(1, *TASK), runs(3, *TASK, "batch.per_gpu=7", *engine)
    assert three.ends[0]["state"] == "finished", three.ends[0]
    for name in ("model.safetensors", "ema.safetensors"):
        assert distance(one.weights(name), three.weights(name)) < ROUNDING


def test_complex_parameters_of_a_bare_engine(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """It sums the gradients in one message of real numbers."""
    one = runs(1, *TASK)
    monkeypatch.setattr(ddp, "make_reducer", Bare)
    assert distance(one.weights(), runs(3, *TASK).weights()) < ROUNDING


def test_complex_parameters_with_adamw(runs: Runs) -> None:
    """torch's fused kernels take real parameters only."""
    one, two = (runs(ranks, *TASK, "optimizer=adamw", "lr.peak=0.001") for ranks in (1, 2))
    assert distance(one.weights(), two.weights()) < ADAM_ROUNDING
