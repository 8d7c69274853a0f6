"""Test that weights and running statistics of BatchNorm don't depend on how a global batch is cut."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from isobatch.scaling.errors import UserError
from isobatch.trainers.engines.riders import attach
from isobatch.trainers.model.batchnorm import statistics_of, swap_batchnorm
from isobatch.trainers.model.randomness import Stream
from tests.support.harness import ROUNDING, Run, Runs, distance
from tests.support.tasks import Counted

CPU = torch.device("cpu")

NORMED = (
    "task=custom", "task._target_=tests.ranks.test_batchnorm.Normed", "batch.global_size=24", "duration=8st",
    "lr.peak=0.02", "evaluate.every=null", "log.every=1st",
)  # fmt: skip
GHOST = (*NORMED, "batchnorm.mode=ghost", "batchnorm.ghost_size=4")
SYNC = (*NORMED, "batchnorm.mode=sync")


class Normed(Counted):
    """A task with images of 3 × 3, and BatchNorm layers of all kinds."""

    def model(self) -> nn.Module:
        return Net(self.width, self.dropout)

    def train_data(self) -> Any:
        images = torch.randn(len(self.inputs), 2, 3, 3, generator=torch.Generator().manual_seed(3)) * 2 + 5
        return TensorDataset(images, self.targets, self.units)

    def val_data(self) -> Any:
        return TensorDataset(*self.train_data()[:37])


class Net(nn.Module):
    """A model with norms that have an activation, are frozen, have no weights, run twice, or keep no statistics."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, width, 2), Activated(width)
        self.frozen = nn.BatchNorm2d(width)
        self.block = nn.Sequential(nn.Conv2d(width, width, 1), nn.BatchNorm2d(width, affine=False), nn.Dropout(dropout))
        self.twice = nn.BatchNorm1d(width, momentum=None)
        self.bare = nn.BatchNorm1d(width, track_running_stats=False)
        self.out = nn.Linear(width, 7)

    def train(self, mode: bool = True) -> Net:
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        x = self.block(self.frozen(self.norm(self.conv(images))).relu()).mean((2, 3))
        x = self.twice(self.twice(x) * 2)
        return self.out(self.bare(x) if self.training else x)


class Activated(nn.BatchNorm2d):
    """BatchNorm and an activation in one module, as in some libraries."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        mean, variance, momentum = self.running_mean, self.running_var, self.momentum or 0.0
        out = nn.functional.batch_norm(input, mean, variance, self.weight, self.bias, self.training, momentum, self.eps)
        return nn.functional.silu(out)


class NaNOnce(Normed):
    """A task in which one pass of the last rank has NaN inputs."""

    calls = 0

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        self.calls += model.training
        images = batch[0] * float("nan") if self.calls == 4 and os.environ["RANK"] == "1" else batch[0]
        return super().loss(model, (images, *batch[1:]))


def largest_distance(one: Run, other: Run) -> float:
    """Return the distance of the weights or of the running statistics, whichever is larger."""

    def only(run: Run, running: bool) -> dict[str, Tensor]:
        floats = {name: weight for name, weight in run.weights().items() if weight.is_floating_point()}
        return {name: weight for name, weight in floats.items() if (".running_" in name) == running}

    return max(distance(only(one, running), only(other, running)) for running in (False, True))


def test_ghosts_are_the_same_on_all_cuts(runs: Runs) -> None:
    """The cuts have uneven shares and accumulation. The runs have a moving average, and evaluations in between."""
    more = ("ema=30sa", "evaluate.every=3st")
    first = runs(1, *GHOST, *more)
    assert not [event for event in first.events() if event["event"] == "depends_on_cut"]
    assert first.weights()["norm.num_batches_tracked"] == first.weights()["twice.num_batches_tracked"] == 8
    assert first.weights()["frozen.num_batches_tracked"] == 0
    for world, per_gpu in ((1, 8), (2, 4), (3, 12), (3, 4)):
        other = runs(world, *GHOST, *more, f"batch.per_gpu={per_gpu}")
        assert largest_distance(first, other) < ROUNDING, (world, per_gpu)
        for name in ("val/loss", "ema/loss"):
            assert other.metrics()[-1][name] == pytest.approx(first.metrics()[-1][name], rel=1e-5)


def test_ghosts_resume_on_other_ranks(runs: Runs) -> None:
    """Stop on one rank and resume on three, including the running statistics."""
    whole = runs(2, *GHOST)
    stopped = runs(1, *GHOST, "batch.per_gpu=8", stop_at=5)
    assert stopped.ends[0]["step"] == 5
    assert largest_distance(runs(3, *GHOST, resume=stopped), whole) < ROUNDING


def test_skipped_step_updates_no_statistics(runs: Runs) -> None:
    """Neither the pass with NaN on one of two ranks nor the step's other passes change the statistics."""
    skip = ("on_nonfinite=skip", "task._target_=tests.ranks.test_batchnorm.NaNOnce")
    weights = runs(2, *GHOST, *skip).weights()
    assert weights["norm.num_batches_tracked"] == 7
    assert all(weight.isfinite().all() for weight in weights.values())


def test_synced_is_the_same_on_any_number_of_ranks(runs: Runs) -> None:
    """This holds for steps of one pass, also with uneven shares. Accumulation changes the run."""
    synced = (*SYNC, "batch.global_size=25", "duration=6st")
    one = runs(1, *synced)
    assert largest_distance(one, runs(3, *synced)) < ROUNDING
    twice = [runs(ranks, *synced, "batch.accumulation=2") for ranks in (1, 2)]
    assert largest_distance(*twice) < ROUNDING < 1e-4 < largest_distance(twice[0], one)


def test_single_sample_is_rejected(runs: Runs) -> None:
    end = runs(1, *NORMED, "batch.per_gpu=1").ends[0]
    assert end["raised"] == "UserError"
    assert "larger batch.per_gpu or batch.global_size, or batchnorm.mode=ghost" in end["message"]


def test_mode_without_layers_is_reported(runs: Runs) -> None:
    run = runs(2, *GHOST, "task._target_=tests.support.tasks.Counted", "duration=1st")
    warnings = [event["text"] for event in run.events() if event["event"] == "warning"]
    assert warnings == ["batchnorm.mode=ghost, but the model trains no BatchNorm layer: leave it out"]
    assert not [event for event in runs(2, *GHOST, "duration=1st").events() if event["event"] == "warning"]


def test_synced_needs_a_sample_on_every_rank(runs: Runs) -> None:
    end = runs(3, *SYNC, "batch.global_size=2").ends[0]
    assert end["raised"] == "UserError"
    assert "2 samples per step are fewer than 3 ranks × accumulation 1" in end["message"]


def swapped(layer: nn.Module, size: int = 4) -> tuple[nn.Module, Stream]:
    stream = Stream(0, CPU)
    return swap_batchnorm(layer, "ghost", size, stream, 1), stream


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d(5), (12, 5)),
        (nn.BatchNorm1d(5, affine=False), (12, 5, 3)),
        (nn.BatchNorm2d(5, track_running_stats=False).double(), (12, 5, 2, 2)),
        (nn.BatchNorm3d(5, eps=0.1).bfloat16(), (12, 5, 2, 2, 2)),
        (nn.SyncBatchNorm(5), (12, 5, 2, 2)),
        (Activated(5), (12, 5, 2, 2)),
    ],
)
def test_ghost_equals_torch_on_its_samples_alone(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """Compare the output and all gradients. In eval mode the layer is torch's own."""
    plain, ghosts = copy.deepcopy(layer), copy.deepcopy(layer)
    ghosts, stream = swapped(ghosts)
    dtype = next((parameter.dtype for parameter in layer.parameters()), torch.float32)
    torch.manual_seed(0)
    x, gradient = (torch.randn(shape, dtype=dtype) * 3 + 7 for _ in range(2))
    found = []
    for model in (ghosts, plain):
        stream.start(0, 12)
        at = x.clone().requires_grad_()
        out = model(at) if model is ghosts else torch.cat([model(part) for part in at.split(4)])
        out.backward(gradient)
        found.append([out, at.grad, *(parameter.grad for parameter in model.parameters())])
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(ghosts.eval()(x), copy.deepcopy(layer).eval()(x))
    assert ghosts.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics_are_the_mean_of_all_ghosts(momentum: float | None) -> None:
    """Two steps of two passes of two calls each give one update per step, by the formula over all ghosts."""
    layer, stream = swapped(nn.BatchNorm1d(3, momentum=momentum).double())
    statistics, x = statistics_of(layer, CPU), torch.randn(2, 12, 3).double()
    assert isinstance(layer, nn.BatchNorm1d)
    assert statistics
    mean, variance = torch.zeros(3).double(), torch.ones(3).double()
    for number, step in enumerate(x, 1):
        for part in step.split([8, 4]):
            stream.start(0, len(part))
            statistics.begin()
            attach((layer(part) + layer(part)).sum(), statistics.sums, statistics.of_this_pass()).backward()
        statistics.update()
        share = 1 / number if momentum is None else momentum
        ghosts = step.view(3, 4, 3)
        mean = (1 - share) * mean + share * ghosts.mean((0, 1))
        variance = (1 - share) * variance + share * ghosts.var(1).mean(0)
    torch.testing.assert_close(layer.running_mean, mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.running_var, variance, rtol=1e-6, atol=1e-6)
    assert layer.num_batches_tracked == 2


def test_rows_that_are_no_multiple_of_the_samples_are_reported() -> None:
    reports: list[str] = []
    stream = Stream(0, CPU, reports.append)
    layer = swap_batchnorm(nn.Sequential(nn.BatchNorm1d(3)), "ghost", 2, stream, 1)
    stream.start(0, 4)
    x = torch.randn(20, 3)
    out = layer(x)
    assert not reports
    torch.testing.assert_close(out[10:], (x[10:] - x[10:].mean(0)) / (x[10:].var(0, correction=0) + 1e-5).sqrt())
    layer(torch.randn(7, 3))
    assert reports == ["the rows of BatchNorm layer 0 aren't a multiple of the samples"]


def test_forward_without_batch_norm_is_rejected() -> None:
    class Own(nn.BatchNorm1d):
        def forward(self, input: Tensor) -> Tensor:
            return input - input.mean(0)

    layer, _ = swapped(nn.Sequential(Own(3)))
    with pytest.raises(UserError, match=r"batchnorm.mode doesn't reach 0, a Own: its forward doesn't call"):
        layer(torch.randn(4, 3))


def test_halves_that_change_the_statistics_are_reported(runs: Runs) -> None:
    halves = ("noise.every=1st", "noise.parts=2", "duration=1st")
    (warning,) = [event["text"] for event in runs(2, *NORMED, *halves).events() if event["event"] == "warning"]
    assert "4 BatchNorm layers take statistics" in warning
    assert "batchnorm.mode=ghost" in warning
    assert not [event for event in runs(2, *GHOST, *halves).events() if event["event"] == "warning"]
