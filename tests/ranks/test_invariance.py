"""Test the second promise: the trajectory of a global batch doesn't depend on how it is cut."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.support.harness import ROUNDING, Run, Runs, distance
from tests.support.tasks import Counted, OneByOne

COUNTED = (
    "task=custom", "task._target_=tests.support.tasks.Counted", "batch.global_size=96", "duration=8st", "lr.peak=0.05",
    "evaluate.every=null", "log.every=1st",
)  # fmt: skip
CUTS = [(1, 32), (2, 7), (3, 32), (4, 2)]  # ranks, per-GPU batch at most; the first is 1 × 96


def cut(per_gpu: int) -> tuple[str, ...]:
    return (*COUNTED, f"batch.per_gpu={per_gpu}")


class All(Counted):
    """A task with everything that follows the sample.

    It has ghost BatchNorm, dropout of numbers and channels, augmentation, draws of ``[index]``, a model that is called
    twice in a forward, and samples of 0 to 6 units, or ``weight`` times as many. It is in float64, since BatchNorm
    amplifies rounding: ghosts of two samples whose values are close have a tiny variance.
    """

    def __init__(self, weight: float = 1.0, double: bool = True, bias: bool = False, **args: Any) -> None:
        super().__init__(**args)
        self.weight, self.dtype, self.bias = weight, torch.float64 if double else torch.float32, bias
        self.units = torch.arange(len(self.units)) % 7 * (torch.arange(len(self.units)) // 8 % 4 > 0)

    def model(self) -> nn.Module:
        return Twice(self.width, self.dropout, self.bias).to(self.dtype)

    def train_data(self) -> Any:
        return Drawing(self)

    def val_data(self) -> Any:
        return None

    def augment(self, sample: Any, generator: torch.Generator) -> Any:
        inputs, targets, units = sample
        return inputs + 0.01 * torch.randn(inputs.shape, generator=generator), targets, units

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        inputs, targets, units = batch
        loss, units = super().loss(model, (inputs.to(self.dtype), targets.to(self.dtype), units))
        return loss * self.weight, units * self.weight if self.weight != 1 else units


class Drawing(OneByOne):
    def __getitem__(self, index: int) -> Any:
        inputs, targets, units = super().__getitem__(index)
        return inputs + 0.01 * (torch.rand(8) + random.random() + float(np.random.rand())), targets, units


class Twice(nn.Module):
    def __init__(self, width: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.into, self.norm = nn.Linear(8, width, bias), nn.BatchNorm1d(width)
        self.out = nn.Linear(width, 7)
        self.dropout, self.channels = nn.Dropout(dropout), nn.Dropout1d(dropout)

    def part(self, inputs: Tensor) -> Tensor:
        x = self.dropout(self.norm(self.into(inputs)).tanh())
        return self.channels(x.view(len(x), 4, -1)).flatten(1)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.out(self.part(inputs) + self.part(inputs.flip(1)))
        return outputs


ALL = (
    "task=custom", "task._target_=tests.ranks.test_invariance.All", "batch.global_size=48", "duration=12st",
    "lr.peak=0.02", "evaluate.every=null", "log.every=1st", "batchnorm.mode=ghost", "batchnorm.ghost_size=4",
    "ema=96sa", "clip_norm=1.0",
)  # fmt: skip
# A step rounds by 1e-16 in float64, which may be amplified 10,000 times. A sum over another set of samples, or in
# float32, differs by more than 1e-8.
EXACT = 1e-12
# Ranks and largest per-GPU batch. 12 ghosts are dealt evenly, unevenly (5 passes for 2 ranks), and one by one.
ALL_CUTS = [(1, 8), (2, 10), (3, 4), (4, 12)]


def same(one: Run, other: Run, within: float) -> float:
    """Check that two runs are at most ``within`` apart in weights and averages, and return their distance."""
    from safetensors.torch import load_file

    assert {end["state"] for end in (*one.ends, *other.ends)} == {"finished"}
    averages = [load_file(run.run.final / "ema.safetensors") for run in (one, other)]
    difference = max(distance(floats(one.weights()), floats(other.weights())), distance(*map(floats, averages)))
    assert difference < within, difference
    assert one.weights()["norm.num_batches_tracked"] == other.weights()["norm.num_batches_tracked"]
    return difference


def floats(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}


def test_weights_are_the_same_on_all_cuts(runs: Runs) -> None:
    """The task has dropout and unequal units. Some cuts have uneven shares, and the run enters a second epoch."""
    first = runs(1, *cut(96))
    assert first.ends[0]["step"] == 8
    for world, per_gpu in CUTS:
        other = runs(world, *cut(per_gpu))
        assert distance(first.weights(), other.weights()) < ROUNDING, (world, per_gpu)
        assert other.losses() == pytest.approx(first.losses(), rel=1e-5)
        assert other.metrics()[-1]["val/loss"] == pytest.approx(first.metrics()[-1]["val/loss"], rel=1e-5)


def test_everything_that_follows_the_sample_is_the_same_on_all_cuts(runs: Runs) -> None:
    first = runs(1, *ALL)
    assert not [event for event in first.events() if event["event"] == "depends_on_cut"]
    for world, per_gpu in ALL_CUTS:
        other = runs(world, *ALL, f"batch.per_gpu={per_gpu}")
        same(first, other, EXACT)
        assert other.losses() == pytest.approx(first.losses(), rel=1e-6)  # summed in float32: 12 passes × 2^-24
    for other_run in ("task.args.dropout=0.3", "batchnorm.ghost_size=8", "seed=1", "clip_norm=null", "ema=960sa"):
        with pytest.raises(AssertionError):
            same(first, runs(1, *ALL, other_run), 1e-3)


@pytest.mark.parametrize(
    "overrides",
    [
        ("batch.global_size=24", "batch.schedule='0sa:24 120sa:60'"),
        ("task.args.weight=0.37",),
        ("batch.global_size=8", "batchnorm.ghost_size=2", "task.args.samples=56"),  # some passes have no units
        ("recompute=[channels,norm]", "data.workers=1"),
    ],
)
def test_other_batches_and_units_are_the_same_on_all_cuts(runs: Runs, overrides: tuple[str, ...]) -> None:
    """Test a batch schedule, float weights, few units, and recomputed activations."""
    first = runs(1, *ALL, *overrides)
    for world, per_gpu in ((2, 4), (3, 8)):
        same(first, runs(world, *ALL, *overrides, f"batch.per_gpu={per_gpu}"), EXACT)


@pytest.mark.parametrize("optimizer", ["adamw", "lamb", "lars", "adafactor", "muon"])
def test_every_optimizer_is_the_same_on_all_cuts(runs: Runs, optimizer: str) -> None:
    """This includes Muon, whose float64 inputs round to the same numbers for its iteration in bfloat16."""
    chosen = (*ALL, f"optimizer={optimizer}", "lr.peak=0.003")
    same(runs(1, *chosen), runs(4, *chosen, "batch.per_gpu=4"), EXACT)


def test_adam_amplifies_only_rounding(runs: Runs) -> None:
    """The gradient of a bias before BatchNorm is only rounding, which AdamW scales to a full step.

    These biases walk at random, at most by the learning rate in each step of each of the two runs: 12 × 2 × 0.003, or
    0.072. In float64 rounding is 1e-8 of Adam's ε, so a step of a bias is at most 1e-8 of the learning rate.
    """
    adam = (*ALL, "optimizer=adamw", "lr.peak=0.003", "task.args.bias=true")
    single = (*adam, "task.args.double=false")
    assert same(runs(1, *single), runs(4, *single, "batch.per_gpu=4"), 0.072) > 1e-5
    same(runs(1, *adam), runs(4, *adam, "batch.per_gpu=4"), 0.072 * 1e-8)


def test_clipping_sees_the_whole_gradient(runs: Runs) -> None:
    """Clipping at every step changes the run in the same way on any cut."""
    whole = runs(1, *cut(96), "clip_norm=0.05")
    parts = runs(3, *cut(7), "clip_norm=0.05")
    assert distance(whole.weights(), runs(1, *cut(96)).weights()) > 1e-2
    assert all(line["grad_norm"] > 0.05 for line in whole.metrics() if "grad_norm" in line)
    assert distance(whole.weights(), parts.weights()) < ROUNDING


def test_more_ranks_than_samples_give_the_same_run(runs: Runs) -> None:
    """Ranks without a sample run stand-ins."""
    two = ("batch.global_size=2", "task.args.samples=50", "duration=10st")
    assert distance(runs(1, *COUNTED, *two).weights(), runs(4, *COUNTED, *two).weights()) < ROUNDING


def test_dataset_shorter_than_a_batch_wraps(runs: Runs) -> None:
    short = ("task.args.samples=40", "duration=7st")
    one, three = runs(1, *cut(96), *short), runs(3, *cut(7), *short)
    assert distance(one.weights(), three.weights()) < ROUNDING


@pytest.mark.parametrize("many", [False, True])
def test_data_workers_change_nothing(runs: Runs, many: bool) -> None:
    """Augmentation is keyed by the sample, so it doesn't depend on workers, ranks, or how samples are fetched."""
    slow = (*COUNTED, "task._target_=tests.support.tasks.Slow", "duration=8st")
    direct = runs(1, *slow, "batch.per_gpu=50")
    loaded = runs(2, *slow, "batch.per_gpu=9", "data.workers=2", f"task.args.many={many}")
    assert distance(direct.weights(), loaded.weights()) < ROUNDING
