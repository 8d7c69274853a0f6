"""Compare runs with plain torch and with each other, in cases that reveal an inexact batch."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset, default_collate, random_split

from isobatch.conf.compose import compose
from isobatch.conf.rundir.directory import RunDir
from isobatch.conf.rundir.outcome import Outcome
from isobatch.scaling.order import indices
from isobatch.scaling.plan import crossed
from isobatch.scaling.planning.resolve import resolve
from isobatch.scaling.rules import Rule
from isobatch.scaling.schedule import Segment
from isobatch.trainers.data.loader import Loader
from isobatch.trainers.data.state import TrainState
from isobatch.trainers.tasks.task import Task
from tests.ranks.test_parts import ALONE
from tests.support.harness import ROUNDING, Run, Runs, distance, evaluator, in_ranks
from tests.support.steps import walk
from tests.support.tasks import Counted, OneByOne

PLAIN = ("task=custom", "duration=12st", "lr.peak=0.05", "log.every=1st", "evaluate.every=null", "batch.global_size=41")


def task(name: str, *overrides: str) -> tuple[str, ...]:
    return (*PLAIN, f"task._target_=tests.ranks.test_exact.{name}", *overrides)


@pytest.mark.parametrize("optimizer", [(), ("optimizer=adamw", "lr.peak=0.01")])
def test_run_equals_plain_torch(runs: Runs, optimizer: tuple[str, ...]) -> None:
    """Losses, gradient norms and weights equal those of a handwritten loop over the whole batch."""
    clipped = (*task("Counted", "task.args.dropout=0.0", "clip_norm=0.5"), *optimizer)
    config = compose(clipped)
    torch.manual_seed(config.seed)
    counted = Counted(dropout=0.0)
    model = counted.model().train()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": config.optimizer.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    plain: Any = torch.optim.AdamW(groups) if optimizer else torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    losses, norms = [], []
    for step in walk(resolve(config, 1, 500)):
        rows = torch.from_numpy(indices(config.seed, 500, step.start, step.stop))
        loss, units = counted.loss(model, tuple(tensor[rows] for tensor in counted.train_data().tensors))
        (loss / units).backward()
        losses.append((loss / units).item())
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        for group in plain.param_groups:
            group["lr"] = step.recipe.lr
        plain.step()
        plain.zero_grad()
    for world, per_gpu in ((1, 41), (3, 7)):
        run = runs(world, *clipped, f"batch.per_gpu={per_gpu}")
        assert distance(dict(model.state_dict()), run.weights()) < ROUNDING
        assert run.losses() == pytest.approx(losses, rel=1e-5)
        assert [line["grad_norm"] for line in run.metrics() if "loss" in line] == pytest.approx(norms, rel=1e-5)


class Weighted(Counted):
    """A task with the importance weight ``weight`` on every unit."""

    def __init__(self, weight: float = 1.0, as_tensor: bool = False, **args: Any) -> None:
        super().__init__(**args)
        self.weight, self.as_tensor = weight, as_tensor

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        loss, units = super().loss(model, batch)
        units = units * self.weight
        return loss * self.weight, units if self.as_tensor else float(units)


@pytest.mark.parametrize("weight", [1e-6, 0.3, 1e6])
def test_units_may_have_any_size(runs: Runs, weight: float) -> None:
    """Units are counted even if they differ much from the plan's."""
    same = task("Weighted", f"task.args.weight={weight}")
    assert distance(runs(1, *same).weights(), runs(3, *same, "batch.per_gpu=5").weights()) < ROUNDING


@pytest.mark.parametrize(("world", "as_tensor"), [(1, False), (3, True), (7, False)])
def test_zero_units_are_rejected_at_once(runs: Runs, world: int, as_tensor: bool) -> None:
    run = runs(world, *task("Weighted", "task.args.weight=0", f"task.args.as_tensor={as_tensor}"))
    assert {end["raised"] for end in run.ends} == {"UserError"}
    assert all("step 1 (samples 0 to 40 of the run) has 0 units" in end["message"] for end in run.ends)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_negative_units_are_rejected(runs: Runs, as_tensor: bool) -> None:
    run = runs(2, *task("Weighted", "task.args.weight=-1", f"task.args.as_tensor={as_tensor}"))
    assert all("not a number of 0 or more" in end["message"] for end in run.ends)


class Random(Counted):
    """A task whose dataset draws from all default generators, like torchvision's transforms."""

    def __init__(self, split: bool = False, **args: Any) -> None:
        super().__init__(**args)
        self.split = split

    def train_data(self) -> Any:
        data = Drawing(self)
        return random_split(data, [400, 100], torch.Generator().manual_seed(0))[0] if self.split else data


class Drawing(OneByOne):
    def __getitem__(self, index: int) -> Any:
        inputs, targets, units = super().__getitem__(index)
        noise = torch.randn(8) + random.random() + float(np.random.rand())
        return inputs + 0.1 * noise, targets, units


@pytest.mark.parametrize("split", [False, True])
def test_draws_of_a_dataset_follow_the_sample(runs: Runs, split: bool) -> None:
    same = task("Random", f"task.args.split={split}")
    here = runs(1, *same)
    assert distance(here.weights(), runs(3, *same, "batch.per_gpu=6").weights()) < ROUNDING
    assert distance(here.weights(), runs(2, *same, "data.workers=2").weights()) < ROUNDING
    assert distance(here.weights(), runs(1, *same, "seed=1").weights()) > 1e-3


def test_augmentation_differs_between_epochs(runs: Runs) -> None:
    """A sample's augmentation is keyed by its position in the run, not by its index in the data."""
    slow = ("task=custom", "task._target_=tests.support.tasks.Slow", "task.args.samples=20", "task.args.dropout=0.0")
    one = runs(1, *slow, "batch.global_size=20", "duration=3ep", "lr.peak=1e-9", "log.every=1st")
    assert len({round(loss, 6) for loss in one.losses()}) == 3


class Partial(Counted):
    """A task whose loss doesn't use the second half of the model."""

    def model(self) -> nn.Module:
        return nn.ModuleList([super().model(), nn.Linear(3, 3)])

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        return super().loss(model[0], batch)  # type: ignore[index]


def test_unused_parameters_get_a_zero_gradient(runs: Runs) -> None:
    """This holds on any cut, with empty micro-batches, and with find_unused_parameters."""
    same = task("Partial", "batch.global_size=4", "optimizer.weight_decay=0.1")
    one = runs(1, *same).weights()
    for more in ((), ("engine.config.find_unused_parameters=true",)):
        assert distance(one, runs(5, *same, *more).weights()) < ROUNDING


class SomeClasses(Counted):
    """A task whose names of metrics depend on the batch."""

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, tuple[Any, Any]]:
        return {f"units{n}": (1.0, 1) for n in batch[2].tolist()}


def test_names_of_metrics_may_come_from_any_rank(runs: Runs) -> None:
    counted = SomeClasses()
    names = {f"units{n}" for n in range(1, 8)}
    for world in (1, 2, 5):
        values = in_ranks(world, lambda ranks: evaluator(counted, counted.model(), ranks, 3)(), runs.folder / "n")
        assert [set(value) for value in values] == [names] * world


class Normed(Counted):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 7))


def test_evaluated_buffers_are_those_in_final(runs: Runs) -> None:
    """Ranks have different running statistics. Rank 0's are evaluated, and saved in final/."""
    run = runs(3, *task("Normed"))
    counted = Normed()
    model = counted.model()
    model.load_state_dict(run.weights())
    model.eval()
    loss, units = counted.loss(model, tuple(tensor for tensor in counted.val_data().tensors))
    assert run.metrics()[-1]["val/loss"] == pytest.approx((loss / units).item(), rel=1e-5)


class Failing(Dataset):
    def __init__(self, counted: Counted) -> None:
        self.counted = counted

    def __len__(self) -> int:
        return 500

    def __getitem__(self, index: int) -> Any:
        if index == 7:
            raise ValueError("sample 7 is broken")
        return OneByOne(self.counted)[index]


class Broken(Counted):
    def train_data(self) -> Any:
        return Failing(self)


def test_error_in_a_data_worker_is_raised_unchanged(runs: Runs) -> None:
    run = runs(1, *task("Broken", "data.workers=2", "duration=1ep"))
    assert run.ends == [{"raised": "ValueError", "message": "sample 7 is broken"}]


def warnings_of(run: Run) -> list[str]:
    events = [json.loads(line) for line in (run.run.path / "events.jsonl").read_text().splitlines()]
    return [event["reason"] for event in events if event["event"] == "depends_on_cut"]


class Attention(Counted):
    def model(self) -> nn.Module:
        return nn.ModuleList([super().model(), nn.MultiheadAttention(8, 2, dropout=0.1), nn.LSTM(8, 8, 2, dropout=0.1)])

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        inputs = model[1](batch[0], batch[0], batch[0])[0] + model[2](batch[0])[0]  # type: ignore[index]
        return super().loss(model[0], (inputs, *batch[1:]))  # type: ignore[index]


def test_dependence_on_the_cut_is_reported(runs: Runs, capfd: pytest.CaptureFixture[str]) -> None:
    assert warnings_of(runs(1, *task("Counted"))) == []
    assert warnings_of(runs(2, *task("Normed"))) == [
        "1 BatchNorm layer with statistics of one micro-batch: batchnorm.mode=ghost batchnorm.ghost_size=N takes them "
        "from N samples on any hardware"
    ]
    assert warnings_of(runs(2, *task("Attention"))) == [
        "dropout inside of 1, 2, which isn't an nn.Dropout",
        "the forward draws random numbers outside of nn.Dropout modules",
    ]
    assert capfd.readouterr().out.count("warning: this run isn't the same on other hardware") == 3


def test_metrics_have_the_right_values(runs: Runs) -> None:
    """Check the logged steps, the mean loss per unit, the epoch and the schedule's LR."""
    run = runs(2, *task("Counted", "duration=20st", "log.every=100sa", "evaluate.every=1ep"))
    steps = [line for line in run.metrics() if "loss" in line]
    assert [line["step"] for line in steps] == [1, *(s for s in range(2, 20) if crossed(100, 41 * (s - 1), 41 * s)), 20]
    plan = resolve(compose(task("Counted", "duration=20st")), 2, 500)
    for line in steps:
        assert line["samples"] == 41 * line["step"]
        assert line["epoch"] == pytest.approx(line["samples"] / 500)
        assert line["lr"] == plan.step_at(line["samples"] - 41).recipe.lr  # type: ignore[union-attr]
        assert line["global_size"] == 41
        assert 0.3 < line["loss"] < 3
        assert line["samples_per_s"] > 0
    evaluated = [line["step"] for line in run.metrics() if "val/loss" in line]
    assert evaluated == [13, 20]


def test_another_seed_is_another_run(runs: Runs) -> None:
    same = task("Counted", "lr.peak=1e-12")
    assert distance(runs(1, *same).weights(), runs(1, *same, "seed=1").weights()) > 0.1


def test_stopped_replaces_no_other_outcome_of_its_attempt(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.write_outcome(Outcome("crashed", "rank 1", 3, 30, "a"))
    run.write_outcome(Outcome("stopped", "SIGTERM", 4, 40, "a"))
    assert run.outcome() == Outcome("crashed", "rank 1", 3, 30, "a")
    run.write_outcome(Outcome("stopped", "SIGTERM", 4, 40, "b"))
    assert run.outcome() == Outcome("stopped", "SIGTERM", 4, 40, "b")


def test_samples_fetched_one_by_one_give_the_same_run(runs: Runs) -> None:
    """A TensorDataset is fetched many rows at once."""
    assert isinstance(Counted().train_data(), TensorDataset)
    slow = task("OneAtATime")
    assert distance(runs(1, *task("Counted")).weights(), runs(2, *slow).weights()) < ROUNDING


class OneAtATime(Counted):
    def train_data(self) -> Any:
        return OneByOne(self)


def test_loader_follows_an_extended_plan() -> None:
    """The batch changes after the prefetched ranges, with and without data workers."""
    for workers in (0, 1):
        whole = resolve(compose([*task("Counted", "duration=40st", "batch.global_size=10")]), 1, 500)
        state, counted = TrainState(whole), Counted()
        loader = Loader(counted.train_data(), Task(counted), state, ALONE, workers)
        sizes = []
        while step := state.plan.step_at(state.samples):
            sizes += [len(micro.batch[2]) for micro in loader(step) if micro.batch is not None]
            state.samples = step.stop
            if step.index == 0:
                state.plan = state.plan.extend(Segment(200, 50, Rule("none")))
        loader.close()
        assert sizes == [10] * 20 + [50] * 4


class ByRank(Counted):
    """A task whose data depends on the rank."""

    def __init__(self, val: bool = False) -> None:
        rank = int(os.environ["RANK"])
        super().__init__(samples=500 if val or rank == 0 else 400)
        self.val_samples = 37 if rank == 0 or not val else 30

    def val_data(self) -> Any:
        return TensorDataset(*(tensor[: self.val_samples] for tensor in (self.inputs, self.targets, self.units)))


@pytest.mark.parametrize(
    ("val", "expected"), [(False, "500 on rank 0, 400 on rank 1"), (True, "37 on rank 0, 30 on rank 1")]
)
def test_ranks_with_different_data_are_rejected(runs: Runs, val: bool, expected: str) -> None:
    run = runs(2, *task("ByRank", f"task.args.val={val}"))
    assert [end["raised"] for end in run.ends] == ["UserError"] * 2
    assert expected in run.ends[0]["message"]


def test_rejected_start_overwrites_nothing(runs: Runs) -> None:
    """The files of an earlier attempt stay until the next attempt has passed all checks."""
    before = runs(1, *task("Counted"))
    before.run.write_outcome(Outcome("stopped", "SIGTERM", 12, 492, "before"))
    files = [before.run.path / name for name in ("metrics.jsonl", "plan.json", "config.yaml")]
    contents = [file.read_bytes() for file in files]
    runs.count -= 1
    refused = runs(1, *task("Counted", "task.args.no_such=1"))
    assert refused.ends[0]["raised"] == "UserError"
    assert [file.read_bytes() for file in files] == contents


class Mixup(Counted):
    """A task that draws from numpy in its loss, from the fourth call on."""

    calls = 0

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        self.calls += 1
        factor = np.random.rand() if self.calls > 3 else 1.0
        return super().loss(model, (batch[0] * factor, *batch[1:]))


class DrawingMany(OneByOne):
    def __getitems__(self, rows: list[int]) -> list[Any]:
        return [(inputs + random.random(), *others) for inputs, *others in map(self.__getitem__, rows)]


class ManyDrawn(Counted):
    def train_data(self) -> Any:
        return DrawingMany(self)


class CollateDraws(OneAtATime):
    def collate(self, samples: list[Any]) -> Any:
        inputs, targets, units = default_collate(samples)
        return inputs + torch.rand(1), targets, units


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Mixup", "the forward draws"), ("ManyDrawn", "__getitems__ draws"), ("CollateDraws", "collate draws")],
)
def test_draws_that_follow_the_micro_batch_are_reported(runs: Runs, name: str, expected: str) -> None:
    """Draws in data workers are reported, too. They repeat on the same cut."""
    local = runs(1, *task(name))
    loaded = runs(1, *task(name, "data.workers=2"))
    for run in (local, loaded):
        assert {reason.startswith(expected) for reason in warnings_of(run)} == {True}
    assert distance(local.weights(), loaded.weights()) < ROUNDING
    assert distance(local.weights(), runs(1, *task(name, "batch.per_gpu=7")).weights()) > 1e-3


def test_stated_units_are_checked(runs: Runs, capfd: pytest.CaptureFixture[str]) -> None:
    runs(2, *task("Weighted", "task.units_per_sample=9"))
    assert "warning: task.units_per_sample=9, but the first step has 3." in capfd.readouterr().out


class Odd(Exception):
    """An exception that can be pickled, but not unpickled."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code}: {text}")


class OddlyBroken(OneAtATime):
    def augment(self, sample: Any, generator: torch.Generator) -> Any:
        raise Odd(404, "image 7 is broken")


def test_exception_that_cannot_be_pickled_keeps_its_message(runs: Runs) -> None:
    run = runs(1, *task("OddlyBroken", "data.workers=1"))
    assert run.ends == [{"raised": "RuntimeError", "message": "Odd: 404: image 7 is broken"}]
