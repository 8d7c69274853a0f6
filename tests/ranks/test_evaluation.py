"""Test that evaluation is the same on any cut, by action=evaluate and after a resume, and doesn't affect training."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from isobatch.conf.compose import compose
from isobatch.scaling.planning.sizes import evaluation_batch
from isobatch.trainers.checkpoints.best import Best
from isobatch.trainers.data.fetch import Fetch
from isobatch.trainers.data.validation import Validation, spread
from isobatch.trainers.loop.evaluate_weights import measure_weights
from isobatch.trainers.loop.opening import plan_of
from isobatch.trainers.model.dropout import key_dropout
from isobatch.trainers.model.randomness import Stream
from isobatch.trainers.ranks.world import World
from isobatch.trainers.tasks.task import Task
from tests.support.harness import Run, Runs, evaluator, in_ranks, session_of
from tests.support.tasks import Counted

ALONE = World(0, 1, 0, 1, torch.device("cpu"), None)
TASK = (
    "task=custom", "task._target_=tests.ranks.test_evaluation.Noisy", "batch.global_size=20", "duration=6st",
    "lr.peak=0.05", "evaluate.every=2st", "evaluate.first=true", "log.every=1st",
)  # fmt: skip


class Drawing(Dataset):
    """A dataset that adds draws of all three default generators to each row."""

    def __init__(self, task: Counted, rows: int) -> None:
        self.task, self.rows = task, rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> Any:
        drawn = random.gauss(0, 1) + np.random.normal() + float(torch.randn(()))
        return self.task.inputs[row] + drawn, self.task.targets[row], self.task.units[row]


class DrawingMany(Drawing):
    def __getitems__(self, rows: list[int]) -> Any:
        return [self[row] for row in rows]


class Noisy(Counted):
    """A task that draws in ``[index]`` of its validation data and keeps dropout on in eval mode."""

    def __init__(self, draws: str = "", dropout: float = 0.2) -> None:
        super().__init__(dropout=dropout)
        self.draws = draws
        if draws == "collate":
            self.collate = self._collate

    def model(self) -> nn.Module:
        return nn.Sequential(*([nn.BatchNorm1d(8)] if self.draws == "modes" else []), *super().model())

    def val_data(self) -> Any:
        return (DrawingMany if self.draws == "__getitems__" else Drawing)(self, 37)

    def _collate(self, samples: Any) -> Any:
        inputs, *others = default_collate(samples)
        return inputs + torch.randn(()), *others

    def augment(self, sample: Any, generator: torch.Generator) -> Any:
        assert len(sample) == 3, "only training augments"
        return (*sample[:2], sample[2], torch.zeros(()))

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        return super().loss(model, batch[:3])

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, tuple[Any, Any]]:
        assert len(batch) == 3, "validation samples are augmented"
        for module in model.modules():
            module.train(isinstance(module, nn.Dropout) or (self.draws == "modes" and not list(module.children())))
        if self.draws == "forward":
            batch = (batch[0] + torch.rand(()), *batch[1:])
        return {"loss": self.loss(model, batch)}


def values(run: Run) -> dict[int, dict[str, float]]:
    """Return the values of evaluations by step."""
    return {
        line["step"]: {name: line[name] for name in line if "/" in name} for line in run.metrics() if "loss" not in line
    }


def close(found: Any) -> Any:
    return {step: {name: pytest.approx(value, rel=1e-5) for name, value in at.items()} for step, at in found.items()}


def reported(run: Run) -> list[str]:
    return [event["reason"] for event in run.events() if event["event"] == "depends_on_cut"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Runs(tmp_path_factory.mktemp("whole"))(1, *TASK, "ema=100sa", "evaluate.per_gpu=64")


CUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one at a time": (2, ("evaluate.per_gpu=1",)),
    "fsdp, uneven": (3, ("engine=fsdp", "evaluate.per_gpu=7")),
    "zero 3": (2, ("engine=deepspeed", "engine.stage=3", "batch.per_gpu=3")),
}


@pytest.mark.parametrize("cut", CUTS)
def test_values_are_the_same_on_any_cut(runs: Runs, whole: Run, cut: str) -> None:
    """Random numbers of the dataset and of dropout follow the row. Step 0 is evaluated, too."""
    world, overrides = CUTS[cut]
    run = runs(world, *TASK, "ema=100sa", *overrides)
    assert values(run) == close(values(whole))
    assert list(values(run)) == [0, 2, 4, 6]
    assert reported(run) == []


def test_action_evaluate_gives_the_same_values(whole: Run, tmp_path: Path) -> None:
    config = compose(["action=evaluate", f"init_from={whole.run.path}", "evaluate.per_gpu=5"])
    found = in_ranks(3, lambda ranks: measure_weights(session_of(config, ranks))[1], tmp_path)
    assert found == [close(values(whole))[6]] * 3


DRAWS = {
    "__getitems__": "__getitems__ draws random numbers; draw in [index] of the validation data",
    "collate": "collate draws random numbers; draw in [index] of the validation data",
    "forward": "the forward draws random numbers outside of nn.Dropout modules",
    "modes": "evaluate changes 0.running_mean, 0.running_var, 0.num_batches_tracked of the model",
}


@pytest.mark.parametrize("draws", DRAWS)
def test_draws_of_a_batch_are_reported_and_leave_no_trace(tmp_path: Path, draws: str) -> None:
    """They are reported once, are equal only in equal batches, and buffers are restored."""
    task, reports, trained = Noisy(draws), list[str](), list[str]()
    stream = Stream(0, ALONE.device, trained.append, reports.append)
    model = key_dropout(task.model(), stream).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate, others = (evaluator(task, model, ALONE, size, stream=stream) for size in (5, 37))
    first = evaluate()
    assert evaluate() == first
    assert others() != first
    assert len(reports) == 1
    assert reports[0].startswith(DRAWS[draws])
    assert not trained
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_evaluation_does_not_affect_training(runs: Runs) -> None:
    """The weights are bitwise equal to those of a run without evaluations."""
    task = (*TASK, "task.args.draws=modes")
    without = runs(1, *task, "evaluate.every=null", "evaluate.last=false", "evaluate.first=false")
    weights, others = runs(1, *task).weights(), without.weights()
    assert all(torch.equal(weights[name], others[name]) for name in others)
    assert values(without) == {}


@pytest.mark.parametrize(
    ("stop_at", "step", "engine"), [(4, 4, ()), (1, 0, ("engine=fsdp",)), (1, 0, CUTS["zero 3"][1])]
)
def test_interrupted_evaluation_is_owed(runs: Runs, stop_at: int, step: int, engine: tuple[str, ...]) -> None:
    """After the resume it gives the same values. This includes the first evaluation, at step 0."""
    overrides = (*TASK, "checkpoint.best=val/loss:max", *engine)
    whole = runs(2, *overrides)
    run = runs(2, *overrides, stop_at=stop_at)
    assert (run.ends[0]["state"], run.ends[0]["step"]) == ("stopped", step)
    assert list(values(run)) == [done for done in (0, 2, 4) if done < step]
    run = runs(2, *overrides, resume=run)
    assert values(run) == values(whole)
    assert [line for line in run.metrics() if line["step"] == 0] == [run.metrics()[0]]
    assert (run.run.checkpoints / "best").resolve().name == (whole.run.checkpoints / "best").resolve().name


def test_out_of_memory_in_an_evaluation_does_not_change_steps() -> None:
    """The evaluation's limit may be below the smallest micro-batch of training."""
    bitwise = (*TASK, "batch.per_gpu=8", "numerics=bitwise", "evaluate.per_gpu=30")
    ghosts = (*TASK, "batch.per_gpu=8", "batchnorm.mode=ghost", "batchnorm.ghost_size=4")
    for overrides, micro, before in ((bitwise, 8, 30), (ghosts, 4, 8)):
        config = compose(list(overrides))
        plan = plan_of(config, 1, 500, per_gpu_limit=3)
        assert plan.cut.per_gpu == micro
        assert [evaluation_batch(config, plan_of(config, 1, 500), limit) for limit in (None, 3)] == [before, 3]


@pytest.mark.parametrize(("length", "samples"), [(97, 10), (97, 96), (97, 97), (97, 500), (3, 1), (97, None)])
def test_evaluated_rows_are_spread_evenly(length: int, samples: int | None) -> None:
    rows = list(spread(length, samples))
    assert len(rows) == len(set(rows)) == min(length, samples or length)
    assert rows == sorted(rows)
    gaps = np.diff([*rows, length])
    assert gaps.max() - gaps.min() <= 1


def test_a_subset_has_the_same_values_on_any_ranks(runs: Runs) -> None:
    task = Noisy()
    one, three = (
        in_ranks(world, lambda ranks: evaluator(task, task.model().double(), ranks, 4, samples=11)(), runs.folder / "s")
        for world in (1, 3)
    )
    assert three == [pytest.approx(one[0])] * 3


def test_draws_follow_the_row_and_differ_from_those_of_training() -> None:
    task: Any = Noisy()
    data = task.val_data()
    every, some = Validation(data, Task(task), 3), Validation(data, Task(task), 3, samples=5)
    for number, row in enumerate(some.rows):
        assert torch.equal(some[number, number + 1].batch[0], every[row, row + 1].batch[0])
    trained = Fetch(data, Task(task), 3)
    drawn = {float(fetched.batch[0][0, 0]) for fetched in (every[0, 1], every[1, 2], trained[0, 1], trained[1, 2])}
    assert len(drawn) == 4


class Rare(Counted):
    """A task whose loss has the name ``iou`` only from the third evaluation on."""

    evaluations = 0

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, tuple[Any, Any]]:
        Rare.evaluations += 1
        name = "iou" if Rare.evaluations > 2 else "other"
        return {name: self.loss(model, batch), "empty": (0, 0)}


def test_evaluation_without_the_best_value_is_reported_once(runs: Runs) -> None:
    """It doesn't become the best."""
    rare = (*TASK, "task._target_=tests.ranks.test_evaluation.Rare", "checkpoint.best=val/iou:max")
    run = runs(1, *rare, "evaluate.per_gpu=37", "check.contract=false")  # the trial would call evaluate, too
    assert run.ends[0]["state"] == "finished"
    warned = [event["text"] for event in run.events() if event["event"] == "warning"]
    assert warned == [
        "checkpoint.best=val/iou:max: this evaluation has no val/iou, so it doesn't count; it has val/other, val/empty"
    ]
    assert (run.run.checkpoints / "best").exists()


def test_best_value_that_never_appears_is_reported_at_the_end(runs: Runs) -> None:
    """The last step is saved without an evaluation."""
    never = (*TASK, "task._target_=tests.ranks.test_evaluation.Rare", "checkpoint.best=val/empty:max")
    run = runs(1, *never, "evaluate.last=false")
    assert list(values(run)) == [0, 2, 4]
    assert (run.run.checkpoints / "step-00000006").exists()
    assert [event["text"] for event in run.events() if event["event"] == "warning"] == [
        "checkpoint.best=val/empty:max: no evaluation of this run had a finite val/empty, so there is no "
        "checkpoints/best"
    ]


def test_best_checkpoint_has_the_extreme_finite_value() -> None:
    lowest, none = Best("val/loss:min", 0.5), Best(None)
    assert [lowest.improves({"val/loss": value}) for value in (0.6, 0.5, 0.4, float("-inf"), None)] == [
        False, False, True, False, False,
    ]  # fmt: skip
    assert not none.improves({"val/loss": 0.0})
    assert none.missing({}) is none.never() is None
    assert lowest.never() is None
    assert not lowest.improves({"ema/loss": 0.0})
    warning = Best("val/acuracy:max").missing({"val/accuracy": 0.6, "ema/acuracy": 1.0})
    assert warning
    assert warning.endswith("it has val/accuracy, ema/acuracy; did you mean val/accuracy?")
