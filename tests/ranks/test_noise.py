"""Compare the gradient noise scale of real models with plain torch on the same micro-batches and samples."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isobatch.conf.compose import compose
from isobatch.scaling.noise import Estimate, Smoothed
from isobatch.scaling.order import indices
from isobatch.scaling.planning.resolve import resolve
from isobatch.trainers.model.precision import autocast
from isobatch.trainers.model.randomness import seed_generators
from tests.support.harness import Run, Runs
from tests.support.steps import walk
from tests.support.tasks import Counted

NAMES = ("noise/scale", "noise/low", "noise/high", "noise/grad_sq", "noise/trace")
FROZEN = ("lr.peak=1e-12", "evaluate.every=null", "log.every=1st", "noise.every=1st")  # constant weights

TRAINED = (
    "task=custom", "task._target_=tests.support.tasks.Counted", "task.args.dropout=0.1", "batch.global_size=94",
    "batch.per_gpu=24", "duration=20st", "lr.peak=0.001", "log.every=1st", "evaluate.every=null",
)  # fmt: skip


class Kinds(Counted):
    """A task without dropout whose model has an unusual kind of parameters."""

    def __init__(self, kind: str = "plain", **args: Any) -> None:
        super().__init__(dropout=0.0, **args)
        self.kind = kind

    def model(self) -> nn.Module:
        model = super().model()
        assert isinstance(model, nn.Sequential)
        if self.kind == "tied":
            model.insert(0, nn.Linear(8, 8))
            model.insert(1, model[0])
        if self.kind == "frozen":
            model[0].bias.requires_grad_(False)
        if self.kind == "unused":
            model.register_parameter("spare", nn.Parameter(torch.ones(3)))
        if self.kind == "mixed":
            model[3] = nn.Sequential(Doubled(), nn.Linear(self.width, 7).double())
        return model.bfloat16() if self.kind == "bf16" else model

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        inputs, targets, units = batch
        outputs = model(inputs.bfloat16() if self.kind == "bf16" else inputs)
        mask = torch.arange(7, device=units.device) < units[:, None]
        return ((outputs.float() - targets)[mask] ** 2).sum(), units.sum()


class Doubled(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.double()


def command(kind: str, *overrides: str) -> tuple[str, ...]:
    return ("task=custom", "task._target_=tests.ranks.test_noise.Kinds", f"task.args.kind={kind}", *FROZEN, *overrides)


def noise(run: Run) -> list[list[float | None]]:
    return [[line[name] for name in NAMES] for line in run.metrics() if "loss" in line]


def by_hand(world: int, overrides: tuple[str, ...]) -> list[Smoothed]:
    """Return tr Σ after each step by definition, from the micro-batches' gradients and their mean."""
    config = compose(list(overrides))
    seed_generators(config.seed)
    task = Kinds(**config.task.args)
    model, data, known, found = task.model(), task.train_data().tensors, Smoothed(), []
    for step in walk(resolve(config, world, len(task.units))):
        rows = torch.from_numpy(indices(config.seed, len(task.units), step.start, step.stop))
        sizes, gradients, units = [], [], 0
        for number in range(world * step.cut.accumulation):
            start, stop = step.cut.micro(number % world, number // world)
            if start < stop:
                with autocast(config.precision, torch.device("cpu")):
                    loss, count = task.loss(model, tuple(tensor[rows[start:stop]] for tensor in data))
                sizes, gradients, units = [*sizes, stop - start], [*gradients, gradient(model, loss)], units + count
        means = [part * (step.cut.global_size / size / units) for part, size in zip(gradients, sizes, strict=True)]
        whole = sum(mean * size for mean, size in zip(means, sizes, strict=True)) / step.cut.global_size
        spread = sum(size * (mean - whole).square().sum() for mean, size in zip(means, sizes, strict=True))
        trace = float(spread) / (len(sizes) - 1)
        found_sq = float(whole.square().sum()) - trace / step.cut.global_size
        known = known.updated(Estimate(found_sq, trace).of_data(len(task.units)))
        found.append(known)
    return found


def gradient(model: nn.Module, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.double().reshape(-1) for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    ("world", "overrides", "off"),
    [
        (1, command("plain", "batch.global_size=24", "batch.per_gpu=6"), 1e-5),
        (2, command("plain", "batch.global_size=24", "clip_norm=0.01"), 1e-5),
        (3, command("plain", "batch.global_size=20", "batch.per_gpu=3", "clip_norm=0.01"), 1e-5),
        (4, command("plain", "batch.global_size=3"), 1e-5),
        (3, command("plain", "batch.global_size=4", "batch.per_gpu=1"), 1e-5),
        (2, command("tied", "batch.global_size=21", "batch.per_gpu=6"), 1e-5),
        (2, command("frozen", "batch.global_size=21", "batch.per_gpu=6"), 1e-5),
        (2, command("unused", "batch.global_size=21", "+engine.config.find_unused_parameters=true"), 1e-5),
        (2, command("mixed", "batch.global_size=21", "batch.per_gpu=6"), 1e-5),
        (2, command("bf16", "batch.global_size=21", "batch.per_gpu=6"), 1e-2),
        (2, command("plain", "batch.global_size=21", "batch.per_gpu=6", "precision=bf16"), 1e-2),
        (2, command("plain", "batch.global_size=21", "batch.per_gpu=6", "precision=fp16", "clip_norm=0.01"), 1e-2),
    ],
)
def test_noise_equals_that_of_the_micro_batches(
    runs: Runs, world: int, overrides: tuple[str, ...], off: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Micro-batches are accumulated or on ranks, may be uneven or stand-ins, and have unequal units and any dtype."""
    # allow fp16 on the CPU
    monkeypatch.setattr("isobatch.trainers.engines.make.check_device", lambda config, device: None)
    some = (*overrides, "duration=3st")
    run = runs(world, *some)
    assert run.ends[0].get("step") == 3, run.ends
    for (*_, grad_sq, trace), known in zip(noise(run), by_hand(world, some), strict=True):
        assert trace == pytest.approx(known.trace, rel=off)
        assert grad_sq == pytest.approx(known.grad_sq, rel=off, abs=off * known.trace)


def test_noise_equals_that_of_the_samples(runs: Runs) -> None:
    """Compare ten epochs at fixed weights with the gradients of all samples one by one.

    Batches are drawn from N samples without replacement: uncorrected, |G|² would read tr Σ/N too low.
    """
    size = 1000
    seed_generators(0)
    task = Kinds(samples=size)
    model, data = task.model(), task.train_data().tensors
    losses = (task.loss(model, tuple(tensor[i : i + 1] for tensor in data))[0] for i in range(size))
    gradients = torch.stack([gradient(model, loss) for loss in losses]) / float(task.units.double().mean())
    trace = float(gradients.var(0).sum())
    grad_sq = float(gradients.mean(0).square().sum())
    assert trace / size > 0.15 * grad_sq  # the correction
    many = ("batch.global_size=50", "batch.per_gpu=5", "duration=10ep", "log.every=1ep")
    run = runs(2, *command("plain", f"task.args.samples={size}", *many))
    scale, low, high, found_grad_sq, found_trace = noise(run)[-1]
    assert found_trace == pytest.approx(trace, rel=0.03)
    assert found_grad_sq == pytest.approx(grad_sq, rel=0.1)
    assert scale == found_trace / found_grad_sq
    assert scale / 1.5 < low < trace / grad_sq < high < scale * 1.5


def test_noise_is_the_same_on_any_ranks(runs: Runs) -> None:
    """Train with dropout on 1 rank with 4 passes, 2 ranks with 2, and 4 ranks with 1."""
    first, *others = (noise(runs(world, *TRAINED, "noise.every=1st")) for world in (1, 2, 4))
    assert first[8][:3] == [None] * 3
    assert None not in first[-1]
    for other in others:
        assert [line[3:] for line in other] == [pytest.approx(line[3:], rel=1e-5) for line in first]
        assert other[-1] == pytest.approx(first[-1], rel=1e-4)


def test_measuring_follows_its_interval_and_changes_no_weight(runs: Runs) -> None:
    without, every = runs(2, *TRAINED, "clip_norm=0.5"), runs(2, *TRAINED, "clip_norm=0.5", "noise.every=7st")
    assert all(torch.equal(tensor, every.weights()[name]) for name, tensor in without.weights().items())
    assert not any(name in line for line in without.metrics() for name in NAMES)
    traces = [line[4] for line in noise(every)]
    assert [step for step, (a, b) in enumerate(pairwise(traces), 2) if a != b] == [7, 14]
    assert traces[5] is None


def test_resumed_run_keeps_the_noise(runs: Runs) -> None:
    """Stop after 14 of 20 steps. The noise is bitwise equal on the same ranks, and equal to rounding on others."""
    whole = noise(runs(2, *TRAINED, "noise.every=1st"))
    assert None not in whole[-1]
    for world, off in ((2, 0), (1, 1e-4)):
        run = runs(world, *TRAINED, "noise.every=1st", resume=runs(2, *TRAINED, "noise.every=1st", stop_at=14))
        assert len(noise(run)) == 20
        assert noise(run)[-1] == pytest.approx(whole[-1], rel=off, abs=0)


def test_one_micro_batch_per_step_is_reported(runs: Runs) -> None:
    run = runs(1, *command("plain", "batch.global_size=24", "duration=2st"))
    assert noise(run) == [[None] * 5] * 2
    warnings = [event["text"] for event in run.events() if event["event"] == "warning"]
    assert ["give batch.per_gpu=12, or more ranks" in text for text in warnings] == [True]


def test_nonfinite_step_is_not_measured(runs: Runs) -> None:
    """The second step is skipped, and all values stay finite."""
    bad = (
        "task=custom",
        "task._target_=tests.support.tasks.BecomesNaN",
        "task.args.call=3",
        "task.args.dropout=0.0",
        *FROZEN,
    )
    many = ("batch.global_size=24", "batch.per_gpu=6", "duration=4st", "on_nonfinite=skip")
    lines = noise(runs(2, *bad, *many))
    clean = noise(runs(2, *bad, *many, "task.args.rank=7"))
    assert lines[:2] == [clean[0], clean[0]]
    assert lines[2][4] not in (lines[1][4], clean[2][4])
