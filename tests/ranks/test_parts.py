"""Test the loader, evaluation, optimizers and the engine by themselves."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from isobatch.conf.compose import compose
from isobatch.scaling.errors import UserError
from isobatch.scaling.order import indices
from isobatch.scaling.plan import Plan
from isobatch.scaling.planning.resolve import resolve
from isobatch.trainers.data.fetch import Fetch, to_device
from isobatch.trainers.data.loader import Loader
from isobatch.trainers.data.state import TrainState
from isobatch.trainers.engines.make import make_engine
from isobatch.trainers.engines.step_report import Note, Requests
from isobatch.trainers.loop.metrics import PlainLines
from isobatch.trainers.model.targets import build, locate
from isobatch.trainers.optim.make import make_optimizer
from isobatch.trainers.ranks.world import World
from isobatch.trainers.tasks.losses import checked
from isobatch.trainers.tasks.task import Task
from tests.support.harness import Runs, evaluator, in_ranks
from tests.support.steps import walk
from tests.support.tasks import Counted, Many, OneByOne

ALONE = World(0, 1, 0, 1, torch.device("cpu"), None)
TASK = (
    "task=custom",
    "task._target_=tests.support.tasks.Counted",
    "duration=3ep",
    "lr.peak=0.1",
    "task.train_samples=500",
)


def plan(*overrides: str, world: int = 1) -> Plan:
    return resolve(compose([*TASK, *overrides]), world)


class Indexed(Counted):
    """A task whose samples are their own indices."""

    def train_data(self) -> Any:
        return TensorDataset(torch.arange(500))


@pytest.mark.parametrize(("world", "per_gpu"), [(1, 64), (3, 10), (4, 100)])
@pytest.mark.parametrize("workers", [0, 2])
def test_loader_follows_the_plan(world: int, per_gpu: int, workers: int) -> None:
    """All ranks together get the sample order, step by step, each in exactly ``accumulation`` passes."""
    whole = plan("batch.global_size=64", f"batch.per_gpu={per_gpu}", world=world)
    task = Indexed()
    loaders = [
        Loader(task.train_data(), Task(task), TrainState(whole), replace(ALONE, rank=rank, size=world), workers)
        for rank in range(world)
    ]
    for step in walk(whole):
        seen: list[tuple[int, Tensor]] = []
        for loader in loaders:
            micros = list(loader(step))
            assert [micro.last for micro in micros] == [False] * (step.cut.accumulation - 1) + [True]
            seen += [(micro.start, micro.batch[0]) for micro in micros if micro.batch is not None]
            assert all((micro.batch is None) == (micro.start == micro.stop) for micro in micros)
        order = torch.cat([batch for _, batch in sorted(seen, key=lambda part: part[0])])
        assert order.tolist() == indices(0, 500, step.start, step.stop).tolist()
    for loader in loaders:
        loader.close()


def test_the_signal_that_killed_a_dataloader_worker_is_named() -> None:
    """Without torch's handler of SIGCHLD, which raises an error that names it, but may come too late."""
    whole, task = plan("batch.global_size=64"), Indexed()
    loader = Loader(task.train_data(), Task(task), TrainState(whole), ALONE, workers=2)
    steps, before = walk(whole), signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        list(loader(next(steps)))
        victim = multiprocessing.active_children()[0]
        victim.kill()
        victim.join()
        with pytest.raises(RuntimeError) as error:
            sum(1 for step in steps for _ in loader(step))
        assert str(error.value) == f"DataLoader worker (pid {victim.pid}) is killed by signal: Killed"
    finally:
        signal.signal(signal.SIGCHLD, before)
        loader.close()


def test_loader_gives_every_sample_once_per_epoch() -> None:
    whole = plan("batch.global_size=100", "duration=2ep")
    task = Indexed()
    loader = Loader(task.train_data(), Task(task), TrainState(whole), ALONE, 0)
    seen = Counter(int(index) for step in walk(whole) for micro in loader(step) for index in micro.batch[0])  # type: ignore[index]
    assert seen == dict.fromkeys(range(500), 2)


@pytest.mark.parametrize("data", [OneByOne, Many])
def test_all_ways_to_fetch_are_equal(data: type) -> None:
    task = Counted()
    fast = Fetch(task.train_data(), Task(task), seed=3)
    slow = Fetch(data(task), Task(task), seed=3)
    for a, b in zip(fast[490, 510].batch, slow[490, 510].batch, strict=True):  # type: ignore[arg-type]
        assert torch.equal(a, b)


def test_nested_batches_are_moved_to_the_device() -> None:
    batch = {"a": [torch.ones(1), ("text", torch.ones(2))], "b": 3}
    moved = to_device(batch, torch.device("meta"))
    assert moved["a"][0].device.type == moved["a"][1][1].device.type == "meta"
    assert (moved["a"][1][0], moved["b"]) == ("text", 3)


class Tables(Counted):
    """A task whose evaluation counts samples, with a summary that isn't a mean."""

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, tuple[Any, Any]]:
        sevens = (batch[2] == 7).sum()
        return {"units": (batch[2].sum(), len(batch[2])), "sevens": (sevens, 1)}

    def summarise(self, totals: dict[str, tuple[float, float]]) -> dict[str, float]:
        return {"sevens": totals["sevens"][0], "share": totals["sevens"][0] / totals["units"][1]}


@pytest.mark.parametrize(("world", "per_gpu"), [(1, 100), (3, 5), (4, 1)])
def test_evaluation_counts_every_sample_once(runs: Runs, world: int, per_gpu: int) -> None:
    """37 samples on 1, 3 and 4 ranks have no padded duplicates, even with unequal shares."""
    task = Tables()

    def body(ranks: World) -> Any:
        return evaluator(task, task.model(), ranks, per_gpu)()

    expected = {
        "units": pytest.approx(float(task.units[:37].sum()) / 37),
        "sevens": float((task.units[:37] == 7).sum()),
        "share": pytest.approx(float((task.units[:37] == 7).sum()) / 37),
    }
    assert in_ranks(world, body, runs.folder / "evaluate") == [expected] * world


def test_evaluation_works_with_more_ranks_than_samples(runs: Runs) -> None:
    class Few(Tables):
        def val_data(self) -> Any:
            return TensorDataset(self.inputs[:2], self.targets[:2], self.units[:2])

    task = Few()
    values = in_ranks(4, lambda ranks: evaluator(task, task.model(), ranks, 8)(), runs.folder / "few")
    assert values == [{"units": 1.5, "sevens": 0.0, "share": 0.0}] * 4


def test_evaluation_leaves_the_model_in_training() -> None:
    task = Counted()
    model = task.model().train()
    evaluate = evaluator(task, model, ALONE, 10)
    first = evaluate()
    assert model.training
    assert evaluate() == first  # dropout is off


def optimizer(*overrides: str, task: Any = None) -> Any:
    config = compose([*TASK, *overrides])
    task = task or Counted()
    return make_optimizer(config, Task(task), task.model(), resolve(config, 1).peak)


def test_biases_are_not_decayed() -> None:
    tuned = optimizer("optimizer=adamw", "optimizer.weight_decay=0.1")
    decay = {len(group["params"][0].shape): group["weight_decay"] for group in tuned.optimizer.param_groups}
    assert decay == {2: 0.1, 1: 0.0}
    tuned.tell(plan("optimizer=adamw", "optimizer.weight_decay=0.1").base)
    assert {len(g["params"][0].shape): g["weight_decay"] for g in tuned.optimizer.param_groups} == {2: 0.1, 1: 0.0}


def test_recipe_reaches_the_optimizer() -> None:
    tuned = optimizer("optimizer=adamw")
    recipe = plan("optimizer=adamw", "optimizer.betas=[0.8,0.9]", "optimizer.eps=1e-3", "lr.peak=0.7").base
    tuned.tell(recipe)
    for group in tuned.optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.7, (0.8, 0.9), 1e-3)
        assert group["fused"]
    sgd = optimizer("optimizer.momentum=0.5")
    assert {(group["momentum"], group["nesterov"]) for group in sgd.optimizer.param_groups} == {(0.5, True)}


class Groups(Counted):
    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        first, *others = model.parameters()
        return [{"params": [first], "lr": 0.1, "weight_decay": 0.5}, {"params": others}]


def test_own_groups_scale_the_lr_and_keep_their_decay() -> None:
    tuned = optimizer("optimizer.weight_decay=0.01", task=Groups())
    tuned.tell(plan("lr.peak=2.0", "optimizer.weight_decay=0.01").base)
    lrs = [(group["lr"], group["weight_decay"]) for group in tuned.optimizer.param_groups]
    assert lrs == [(pytest.approx(0.2), 0.5), (2.0, 0.01)]


def test_parameters_left_out_are_named() -> None:
    class Forgets(Groups):
        def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
            return super().param_groups(model)[:1]

    with pytest.raises(UserError, match=r"leaves out 0\.bias, 3\.weight, 3\.bias"):
        optimizer(task=Forgets())


def test_custom_optimizer_gets_its_arguments() -> None:
    tuned = optimizer("optimizer=custom", "optimizer._target_=torch.optim.RMSprop", "optimizer.args.alpha=0.5")
    assert isinstance(tuned.optimizer, torch.optim.RMSprop)
    assert tuned.optimizer.param_groups[0]["alpha"] == 0.5


def test_custom_optimizers_decay_no_biases() -> None:
    """A group's own decay stays. Without a value, the class's default applies to the other parameters."""
    adamw = ("optimizer=custom", "optimizer._target_=torch.optim.AdamW")
    for given, expected in (("optimizer.weight_decay=0.3", 0.3), ("optimizer.weight_decay=null", 0.01)):
        groups = optimizer(*adamw, given).optimizer.param_groups
        assert {group["params"][0].ndim: group["weight_decay"] for group in groups} == {2: expected, 1: 0.0}
    own = optimizer(*adamw, task=Groups()).optimizer.param_groups
    assert [group["weight_decay"] for group in own] == [0.5, 0.01]
    for name in ("RMSprop", "Adagrad", "Adafactor", "Rprop"):
        assert optimizer("optimizer=custom", f"optimizer._target_=torch.optim.{name}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("optimizer._target_=torch.optim.RMSpop",), "did you mean torch.optim.RMSprop"),
        (("optimizer._target_=torch.nn.Linear",), "is not a class of torch.optim"),
        (("optimizer._target_=torch.optim.RMSprop", "optimizer.args.beta=1"), "unexpected keyword argument 'beta'"),
        (("optimizer._target_=torch.optim.RMSprop", "optimizer.args.alpha=-1"), "Invalid alpha value"),
    ],
)
def test_invalid_custom_optimizers_are_rejected(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        optimizer("optimizer=custom", *overrides)


def test_import_errors_show_their_cause(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_task.py").write_text("import module_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"importing broken_task failed: .*module_that_is_not_there"):
        locate("task._target_", "broken_task.Task")
    with pytest.raises(UserError, match="not a class"):
        build("task", "math.pi", {})


ONE = torch.ones(1, requires_grad=True).sum()


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (ONE, "returned a tensor of shape"),
        ((ONE, 1, 2), "a tuple of 3"),
        ((ONE.detach(), 1), "without a gradient"),
        ((torch.ones(2, requires_grad=True), 1), r"a tensor of shape \[2\]"),
        ((ONE, "many"), "'many', a str"),
        ((ONE, -1), "-1, a int"),
        ((ONE, float("nan")), "nan, a float"),
        ((ONE, True), "True, a bool"),
        ((3.0, 1), "3.0, a float"),
    ],
)
def test_invalid_losses_are_rejected(result: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        checked(result)


def test_units_may_be_floats() -> None:
    """Importance weights are floats."""
    assert checked((ONE, 2.5)) == (ONE, 2.5, {})
    assert checked((ONE, torch.tensor([2.5])))[1] == 2.5


def test_note_adds_no_collective(runs: Runs) -> None:
    """A step of three passes has one reduction. Loss, units and stop flag are in DDP's own bucket."""

    def body(ranks: World) -> Any:
        task = Counted()
        config = compose([*TASK, "batch.global_size=40", "batch.per_gpu=7"])
        whole = resolve(config, ranks.size)
        model = task.model()
        engine = make_engine(config, Task(task), model, whole.peak, ranks)
        state = TrainState(whole)
        loader = Loader(task.train_data(), Task(task), state, ranks, 0)
        collectives = []
        for step in list(walk(whole))[:3]:
            with torch.profiler.profile() as profile:
                for micro in loader(step):
                    with engine.micro(step.cut, micro.last):
                        loss, units, _ = engine.loss(micro.batch, micro.samples)
                        asked = Requests(stop=ranks.rank == 1)
                        engine.backward(loss, Note(loss, units, micro.expected_units, requests=asked))
                total = engine.total(step.expected_units)
            collectives.append(sum(event.name == "gloo:all_reduce" for event in profile.events()))
        rows = indices(0, 500, step.start, step.stop)
        return collectives[-1], total.units == task.units[rows].sum().item(), total.requests.stop > 0

    results = in_ranks(2, body, runs.folder / "note")
    assert results == [[1, True, True]] * 2


def test_find_unused_parameters_reaches_ddp(runs: Runs) -> None:
    """The note doesn't count as an unused parameter."""
    same = [*TASK, "batch.global_size=30", "duration=5st"]
    run = runs(2, *same, "engine.config.find_unused_parameters=true")
    assert run.ends[0]["state"] == "finished"
    assert run.losses() == pytest.approx(runs(1, *same).losses(), rel=1e-5)


def test_metrics_are_valid_json_if_values_are_not_finite(runs: Runs) -> None:
    run = runs(1, *TASK, "task._target_=tests.ranks.test_parts.NotFinite", "duration=2st")
    assert json.loads((run.run.path / "metrics.jsonl").read_text().splitlines()[-1])["val/odd"] is None


def test_plain_lines_show_the_loss_with_an_evaluation_of_the_same_step(capsys: pytest.CaptureFixture[str]) -> None:
    lines = PlainLines(TrainState(plan()))
    for step in (3, 4):
        logged = {"step": step, "samples": 64 * step, "epoch": 0.4, "loss": 0.5, "lr": 0.1, "samples_per_s": 1.0,
                  "global_size": 64}  # fmt: skip
        lines.step(logged)
        lines.evaluation({"step": 4, "samples": 256, "epoch": 0.5, "val/loss": 0.25})
    evaluations = [line for line in capsys.readouterr().out.splitlines() if "val/loss" in line]
    assert [line.partition("  ")[2] for line in evaluations] == [
        "epoch 0.50  val/loss 0.2500",
        "epoch 0.50  loss 0.5000  val/loss 0.2500",
    ]


class NotFinite(Counted):
    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, tuple[Any, Any]]:
        return {"odd": (float("nan"), 1)}


def test_harness_kills_hanging_ranks(runs: Runs) -> None:
    """A rank that hangs is killed and fails the test."""
    with pytest.raises(AssertionError, match=r"ranks \[0\] of 1 hung"):
        in_ranks(1, lambda ranks: os.read(os.pipe()[0], 1), runs.folder / "hang", deadline_s=0.5)
