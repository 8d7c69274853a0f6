"""Test the trial of a task's contract before step 1: its findings, and that it changes no state."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
from collections import Counter, OrderedDict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from isobatch.scaling.errors import UserError
from isobatch.scaling.geometry import solve
from isobatch.trainers.data.fetch import Fetch
from isobatch.trainers.model.randomness import generators_state
from isobatch.trainers.tasks.task import Task
from isobatch.trainers.trial.halves import halves, own_generators
from isobatch.trainers.trial.sandbox import Sandbox, exact_fp32
from isobatch.trainers.trial.training import DRAWS, Found, batches_of, try_loss
from isobatch.trainers.trial.untouched import Copies
from tests.support.harness import Runs, distance
from tests.support.tasks import Counted, OneByOne

CPU = torch.device("cpu")


class Base:
    """A classification of noise into five classes, without a loss."""

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 5))

    def train_data(self) -> Any:
        random = torch.Generator().manual_seed(1)
        return TensorDataset(torch.randn(200, 8, generator=random), torch.randint(5, (200,), generator=random))

    def loss(self, model: nn.Module, batch: Any) -> Any:
        return self.of(model(batch[0]), batch[1], model)

    def of(self, logits: Tensor, labels: Tensor, model: nn.Module) -> Any:
        raise NotImplementedError


def task_of(function: Any, model: Any = None) -> Any:
    """Return a task whose loss is this function of logits, labels and model."""
    made = Base()
    made.of = function  # type: ignore[method-assign]
    if model is not None:
        made.model = model  # type: ignore[method-assign]
    return made


def tried(task: Any, per_gpu: int = 64, device: torch.device = CPU) -> Found:
    fetch = Fetch(task.train_data(), Task(task), seed=0)
    model = task.model()
    batches = batches_of(solve(1, global_size=per_gpu, per_gpu=per_gpu), fetch.length)
    sandbox = Sandbox(Task(task), model, device, 0, lambda: None)
    return try_loss(sandbox, [halves(fetch, *batch) for batch in batches], model.train)


def ce(logits: Tensor, labels: Tensor, **how: Any) -> Tensor:
    return F.cross_entropy(logits, labels, **how)


def info_nce(z: Tensor) -> Tensor:
    z = F.normalize(z, dim=-1)
    return ce(z @ (z + 0.1).T / 0.1, torch.arange(len(z), device=z.device), reduction="sum")


def triplet(z: Tensor, labels: Tensor) -> Tensor:
    far, same = torch.cdist(z, z), labels[:, None] == labels
    return F.relu((far * same).amax(1) - (far + 9 * same).amin(1) + 0.2).sum()


def entropy(p: Tensor) -> Tensor:
    return -(p.mean(0) * p.mean(0).log()).sum()


def signed(logits: Tensor, labels: Tensor) -> Tensor:
    return ce(logits, labels, reduction="none") * torch.where(labels % 2 == 0, 1.0, -1.0)


SOUND = {
    "sum": lambda x, y, m: (ce(x, y, reduction="sum"), len(y)),
    "one loss per sample": lambda x, y, m: ce(x, y, reduction="none"),
    "signed advantages": lambda x, y, m: signed(x, y),
    "units of the sample": lambda x, y, m: ((ce(x, y, reduction="none") * y).sum(), y.sum()),
    "masked": lambda x, y, m: (ce(x, y.where(y != 2, -100), reduction="sum", ignore_index=-100), (y != 2).sum()),
    "class weights": lambda x, y, m: (ce(x, y, reduction="sum", weight=torch.arange(1.0, 6).to(x)), len(y)),
    "zero": lambda x, y, m: (0 * x.sum(), len(y)),
    "not a number": lambda x, y, m: (x.sum() * float("nan"), len(y)),
    "functional dropout": lambda x, y, m: ce(F.dropout(x, 0.5, m.training), y, reduction="none"),
    "a sum of noisy samples": lambda x, y, m: ce(x + 0.1 * torch.randn_like(x), y, reduction="none"),
    "a sum in bf16": lambda x, y, m: ce(x.bfloat16() * 1.0, y, reduction="none").float(),
}
MEANS = {
    "mean and samples": lambda x, y, m: (ce(x, y), len(y)),
    "mean and 1": lambda x, y, m: (ce(x, y), 1),
    "masked mean": lambda x, y, m: (ce(x, y.where(y > 1, -100), ignore_index=-100), (y > 1).sum()),
    "masked mean and samples": lambda x, y, m: (ce(x, y.where(y > 1, -100), ignore_index=-100), len(y)),
    "mean with class weights": lambda x, y, m: (ce(x, y, weight=torch.arange(1.0, 6).to(x)), len(y)),
    "root of a mean square": lambda x, y, m: (ce(x, y, reduction="none").square().mean().sqrt(), len(y)),
    "half a mean": lambda x, y, m: (0.5 * ce(x, y), len(y)),
    "mean of noisy samples": lambda x, y, m: (ce(x + 0.1 * torch.randn_like(x), y), len(y)),
    "mean under functional dropout": lambda x, y, m: (ce(F.dropout(x, 0.5, m.training), y), len(y)),
}
COUPLED = {
    "negatives of the batch": lambda x, y, m: (info_nce(x), len(y)),
    "mean over negatives of the batch": lambda x, y, m: (info_nce(x) / len(y), len(y)),
    "triplets": lambda x, y, m: (triplet(x, y), len(y)),
    "masked mean times samples": lambda x, y, m: (ce(x, y.where(y > 1, -100), ignore_index=-100) * len(y), len(y)),
    "entropy of the batch": lambda x, y, m: (ce(x, y, reduction="sum") + len(y) * 0.1 * entropy(x.softmax(1)), len(y)),
    "a penalty once per call": lambda x, y, m: (
        ce(x, y, reduction="sum") + 1e-3 * sum(p.square().sum() for p in m.parameters()), len(y),
    ),
    "hardest quarter": lambda x, y, m: (ce(x, y, reduction="none").topk(max(1, len(y) // 4))[0].sum(), len(y) // 4),
    "largest loss": lambda x, y, m: (ce(x, y, reduction="none").max(), len(y)),
    "root of a sum of squares": lambda x, y, m: (ce(x, y, reduction="none").square().sum().sqrt(), len(y)),
    "weights by frequency": lambda x, y, m: (
        (ce(x, y, reduction="none") / torch.bincount(y, minlength=5)[y]).sum() * len(y), len(y),
    ),
    "normalised over the batch": lambda x, y, m: ce((x - x.mean(0)) / x.std(0), y, reduction="none"),
    "only in the gradient": lambda x, y, m: ce(x, y, reduction="none") * (1 + (x.mean(0) - x.mean(0).detach()).sum()),
    "units that aren't those of samples": lambda x, y, m: (ce(x, y, reduction="sum"), 1),
    "fails on half": lambda x, y, m: (ce(x, y, reduction="none").topk(5)[0].sum(), len(y)),
}  # fmt: skip


@pytest.mark.parametrize("name", SOUND)
def test_valid_loss_is_accepted(name: str) -> None:
    assert tried(task_of(SOUND[name])) == Found()


@pytest.mark.parametrize("name", MEANS)
def test_mean_is_rejected(name: str) -> None:
    with pytest.raises(UserError, match="returns a mean"):
        tried(task_of(MEANS[name]))


@pytest.mark.parametrize("name", COUPLED)
@pytest.mark.parametrize("per_gpu", [64, 24])
def test_samples_that_depend_on_each_other_are_reported(name: str, per_gpu: int) -> None:
    found = tried(task_of(COUPLED[name]), per_gpu)
    assert len(found.depends) == 1, found


def test_two_samples_are_enough() -> None:
    for per_gpu in (2, 3, 5):
        assert tried(task_of(SOUND["masked"]), per_gpu) == Found()
        with pytest.raises(UserError, match="returns a mean"):
            tried(task_of(MEANS["mean and samples"]), per_gpu)
        assert tried(task_of(COUPLED["negatives of the batch"]), per_gpu).depends


LAYERS = {
    "BatchNorm": lambda: nn.BatchNorm1d(16),
    "BatchNorm without running statistics": lambda: nn.BatchNorm1d(16, track_running_stats=False),
    "frozen BatchNorm": lambda: nn.BatchNorm1d(16).eval(),
    "LayerNorm": lambda: nn.LayerNorm(16),
    "alpha dropout": lambda: nn.AlphaDropout(0.5),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_couple_samples_by_design_are_switched_off(name: str) -> None:
    """They are recognised by type, and reported separately."""

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16), LAYERS[name](), nn.Linear(16, 5))

    assert tried(task_of(SOUND["sum"], model)) == Found()
    with pytest.raises(UserError, match="returns a mean"):
        tried(task_of(MEANS["mean and samples"], model))


class Recurrent(nn.Module):
    """A model with attention and an LSTM, both with dropout inside."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
        self.lstm = nn.LSTM(8, 8, 2, dropout=0.5, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None].expand(-1, 3, -1)
        return self.head(self.lstm(self.attention(x, x, x)[0])[0][:, -1])  # type: ignore[no-any-return]


def test_dropout_inside_layers_is_switched_off() -> None:
    task = task_of(SOUND["sum"], Recurrent)
    model = task.model()
    assert tried(task) == Found()
    assert (model.attention.dropout, model.lstm.dropout) == (0.5, 0.5)


class Annealed(nn.Module):
    """A model with numbers of every visible kind that change with every call, and caches, which change once."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 5)
        self.calls, self.seen, self.plain = 0, {"samples": 0}, torch.zeros(1)
        self.register_buffer("ticks", torch.zeros((), dtype=torch.int64))
        self.longest, self.cache = 0, torch.zeros(0)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen["samples"] += len(x)
        self.plain += 1
        self.ticks = self.ticks + 1
        if self.longest < 64:
            self.longest, self.cache = 64, torch.ones(64)
        return self.linear(x) * (1 - 0.9**self.calls)  # type: ignore[no-any-return]


def test_counters_are_named_and_restored() -> None:
    model = Annealed()
    task = task_of(SOUND["sum"], lambda: model)
    task.count, task.kinds, task.annealing = 0, Counter(calls=2), type("Annealing", (), {})()
    task.annealing.steps = np.int64(0)

    def loss(x: Tensor, y: Tensor, m: nn.Module) -> Any:
        task.count += 1
        task.kinds["calls"] += 1
        task.annealing.steps += 1
        task.new = itertools.count()
        return ce(x, y, reduction="none")

    task.of = loss
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = tried(task)
    moved = [
        "task.count",
        "task.kinds",
        "task.annealing.steps",
        "model.calls",
        "model.seen",
        "model.plain",
        "model.ticks",
    ]
    assert sorted(reason.split()[0] for reason in found.counters) == sorted(moved)
    assert not found.depends, "counters aren't restored before each call, so the losses differ"
    assert (model.calls, model.seen, float(model.plain), model.longest) == (0, {"samples": 0}, 0.0, 0)
    assert (task.count, task.kinds, int(task.annealing.steps), hasattr(task, "new")) == (0, Counter(calls=2), 0, False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Holder:
    """An object with a number and other attributes."""

    def __init__(self, **held: Any) -> None:
        self.calls = 0
        vars(self).update(held)


def test_generators_and_nested_state_of_the_loss_are_named_and_restored() -> None:
    task, torchs = task_of(SOUND["sum"]), torch.Generator().manual_seed(0)
    task.torchs, task.numpys, task.pythons = torchs, np.random.default_rng(0), random.Random(0)
    task.older, task.last, task.pair = np.random.RandomState(0), deque([1.0], maxlen=2), (0, 1.0)
    task.holder, task.holders = Holder(inner=Holder()), [Holder(), Holder()]
    task.trained, task.still = 0, [torch.ones(3), torch.Generator(), np.random.default_rng(0), random.Random(0)]

    def loss(x: Tensor, y: Tensor, model: nn.Module) -> Any:
        noise = float(torch.rand((), generator=task.torchs)) + task.numpys.random() + task.pythons.random()
        task.last.append(noise + task.older.random())
        task.pair = (task.pair[0] + 1, 1.0)
        for holder in (task.holder.inner, task.holders[1]):
            holder.calls += 1
        task.trained += torch.is_grad_enabled()
        return ce(x, y, reduction="none") * sum(task.last)

    task.of = loss
    found = tried(task)
    moved = ["torchs", "numpys", "pythons", "older", "last", "pair", "holder.inner.calls", "holders.1.calls", "trained"]
    assert sorted(reason.split()[0] for reason in found.counters) == sorted(f"task.{name}" for name in moved)
    assert not found.depends
    first = float(torch.rand((), generator=torch.Generator().manual_seed(0)))
    assert float(torch.rand((), generator=torchs)) == first
    assert task.numpys.random() == np.random.default_rng(0).random()
    assert (task.pythons.random(), task.older.random()) == (
        random.Random(0).random(),
        np.random.RandomState(0).random(),
    )
    assert (list(task.last), task.pair, task.holder.inner.calls, task.trained) == ([1.0], (0, 1.0), 0, 0)


class Hooked(Base):
    """A task whose loss reads a layer's output from containers that it shares with a forward hook."""

    def __init__(self, mean: bool = False) -> None:
        self.mean = mean

    def model(self) -> nn.Module:
        model = super().model()
        seen, counts, order = {}, Counter(a=1), OrderedDict(a=0)
        self.seen, self.counts, self.order, self.bank = seen, counts, order, (bank := [])

        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            seen["hidden"] = output
            counts["a"] += 1
            order.update(b=1)
            bank.append(len(bank))

        model[0].register_forward_hook(hook)
        return model

    def of(self, logits: Tensor, labels: Tensor, model: nn.Module) -> Any:
        losses = ce(logits, labels, reduction="none") + 1e-3 * self.seen["hidden"].square().mean(1)
        return (losses.mean(), len(labels)) if self.mean else losses


def test_closure_may_share_attributes_with_the_task() -> None:
    """They are restored in place and stay one object. A valid loss is accepted, and a mean is rejected."""
    task = Hooked()
    found = tried(task)
    assert not found.skipped
    assert not found.depends
    assert {name.split()[0] for name in found.counters} == {"task.counts", "task.bank"}
    assert (task.seen, task.bank, task.counts, list(task.order)) == ({}, [], Counter(a=1), ["a"])
    with pytest.raises(UserError, match="returns a mean"):
        tried(Hooked(mean=True))


def test_attributes_that_cannot_be_copied_do_not_change() -> None:
    task = task_of(lambda x, y, m: ce(x, y, reduction="none"))
    task.tree = {"name": "root"}
    task.tree["child"] = {"parent": task.tree}
    task.ragged = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged)
    task.sparse = torch.eye(3).to_sparse()
    assert tried(task) == Found()
    assert task.tree["child"]["parent"] is task.tree


def test_unregistered_modules_do_not_change() -> None:
    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.teachers = nn.Linear(8, 5), [nn.BatchNorm1d(8, affine=False)]

        def forward(self, x: Tensor) -> Tensor:
            return self.body(self.teachers[0](x))  # type: ignore[no-any-return]

    model, task = Student(), task_of(lambda x, y, m: ce(task.nets["norm"](x), y, reduction="none"))
    task.model, task.nets = (lambda: model), {"norm": nn.BatchNorm1d(5, affine=False)}
    norms = [model.teachers[0], task.nets["norm"]]
    tried(task)
    assert [float(norm.running_mean.abs().sum()) for norm in norms] == [0.0, 0.0]
    assert [int(norm.num_batches_tracked) for norm in norms] == [0, 0]


class OwnLayers(nn.Module, Base):
    """A task that is a module itself, with a layer that writes to its weight and its buffers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5))
        self.layers.calls = 0

    def of(self, logits: Tensor, labels: Tensor, model: nn.Module) -> Any:
        self.layers.calls += 1
        self.layers[0].weight.data.fill_(0.5)  # type: ignore[union-attr, operator]
        return ce(self.layers(logits), labels, reduction="none")


def test_modules_of_a_task_that_is_a_module_do_not_change() -> None:
    task = OwnLayers()
    before = {name: value.clone() for name, value in task.state_dict().items()}
    found = tried(task)
    assert [reason.split()[0] for reason in found.counters] == ["task.layers.calls"]
    assert task.layers.calls == 0
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())


@pytest.mark.parametrize("kind", [Base, OwnLayers])
def test_tensors_that_a_task_shares_with_the_model_are_on_its_device(
    monkeypatch: pytest.MonkeyPatch, kind: type[Base]
) -> None:
    """The task's other tensors stay on their device."""
    task, model = kind(), nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(5))
    task.teacher = teacher = nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(5))  # type: ignore[attr-defined]
    teacher[0].weight = model[0].weight
    teacher[1].running_mean = model[1].running_mean
    places = dict[int, Any]()

    def to(tensor: Tensor, place: Any, copy: bool) -> Tensor:
        places[tensor.data_ptr()] = place
        return tensor.clone()

    copies = Copies(task, model, device := torch.device("cuda"))
    monkeypatch.setattr(Tensor, "to", to)
    with copies.held():
        pass
    shared, own = (model[0].weight, model[1].running_mean), (teacher[0].bias, teacher[1].running_var)
    assert [places[tensor.data_ptr()] for tensor in (*shared, *own)] == [device, device, None, None]


def test_trial_restores_all_state() -> None:
    """It restores weights that the forward writes to, buffers, modes, gradients and generators."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(5).eval(), nn.Dropout())

        def forward(self, x: Tensor) -> Tensor:
            self.body[0].weight.data.mul_(1.5)  # type: ignore[union-attr, operator]
            return self.body(torch.nn.functional.dropout(x))  # type: ignore[no-any-return]

    model = Model()
    task = task_of(SOUND["sum"], lambda: model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    places = [value.data_ptr() for value in model.state_dict().values()]
    batches = [halves(Fetch(task.train_data(), Task(task), seed=0), 0, 8, 16)]
    generators, modes = generators_state(), [module.training for module in model.modules()]
    with pytest.raises(UserError, match="returns a mean"):  # the weights grow with every call
        try_loss(Sandbox(Task(task), model, CPU, 0, lambda: None), batches, model.train)
    assert generators_state() == generators
    assert [module.training for module in model.modules()] == modes
    assert [value.data_ptr() for value in model.state_dict().values()] == places
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_model_that_does_not_fit_on_the_device_is_not_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    task, copied = task_of(SOUND["sum"]), list[Tensor]()
    model = task.model()
    before, generators = [parameter.data_ptr() for parameter in model.parameters()], generators_state()

    def to(tensor: Tensor, *args: Any, **how: Any) -> Tensor:
        copied.append(tensor)
        if len(copied) > 2:
            raise torch.OutOfMemoryError
        return tensor.clone()

    sandbox = Sandbox(Task(task), model, CPU, 0, lambda: None)
    monkeypatch.setattr(Tensor, "to", to)
    with pytest.raises(torch.OutOfMemoryError), sandbox:
        pass
    assert [parameter.data_ptr() for parameter in model.parameters()] == before
    assert generators_state() == generators


PRECISIONS: dict[str, tuple[Any, str, Any]] = {
    "the newer interface": (torch.backends, "fp32_precision", "tf32"),
    "the newer interface, for matrices": (torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "the older interface": (torch.backends.cuda.matmul, "allow_tf32", True),
}


def seen_precisions() -> list[Any]:
    cuda, cpu = torch.backends.cudnn, torch.backends.mkldnn
    places: list[Any] = [torch.backends.cuda.matmul, cuda.conv, cuda.rnn, cpu.matmul, cpu.conv, cpu.rnn]
    try:
        older = (torch.get_float32_matmul_precision(), cuda.allow_tf32)
    except RuntimeError:
        older = ("", False)
    return [*(place.fp32_precision for place in places), *older]


@pytest.mark.parametrize("name", [*PRECISIONS, "high", "medium"])
def test_reduced_fp32_precision_is_off_and_restored(name: str) -> None:
    """Each case has its own process, since one that has used both interfaces can't return to the older one."""

    def check() -> None:
        setattr(*PRECISIONS[name]) if name in PRECISIONS else torch.set_float32_matmul_precision(name)
        before = seen_precisions()
        with exact_fp32():
            assert set(seen_precisions()[:6]) == {"ieee"}
            with torch.backends.cudnn.flags(enabled=False):  # as a loss may do
                pass
        assert seen_precisions() == before

    process = multiprocessing.get_context("fork").Process(target=check)
    process.start()
    process.join()
    assert process.exitcode == 0


class Drawing(OneByOne):
    """A dataset whose samples have noise of its own generator, of one kind."""

    def __init__(self, kind: str) -> None:
        super().__init__(Counted())
        own: dict[str, Any] = {"numpy": np.random.default_rng(0).normal, "python": random.Random(0).random}
        torchs = torch.Generator().manual_seed(0)
        own["torch"] = lambda: torch.rand((), generator=torchs)
        own["default"] = np.random.normal
        self.draw = own[kind]

    def __getitem__(self, index: int) -> Any:
        inputs, *rest = super().__getitem__(index)
        return inputs + np.float32(self.draw()), *rest


@pytest.mark.parametrize("kind", ["numpy", "python", "torch", "default"])
def test_own_generator_of_the_dataset_is_reported(kind: str) -> None:
    found = own_generators(Fetch(Drawing(kind), Task(Counted()), seed=0))
    assert [("the dataset's [index]" in reason) for reason in found] == ([] if kind == "default" else [True])


class Flipping(OneByOne):
    """A dataset that flips half of its samples by its own generator."""

    def __init__(self, seed: int) -> None:
        super().__init__(Counted())
        self.own = random.Random(seed)

    def __getitem__(self, index: int) -> Any:
        inputs, *rest = super().__getitem__(index)
        return (inputs.flip(-1) if self.own.random() < 0.5 else inputs), *rest


def test_generator_that_decides_between_two_values_is_reported() -> None:
    """Two fetches of one sample would miss it half of the time."""
    for seed in range(20):
        assert own_generators(Fetch(Flipping(seed), Task(Counted()), seed=0)), seed


def test_generators_of_augment_and_collate_are_distinguished() -> None:
    own = np.random.default_rng(0)

    class Augmenting(Counted):
        def augment(self, sample: Any, generator: torch.Generator) -> Any:
            return sample[0] + float(own.normal()), *sample[1:]

    class Collating(Counted):
        def collate(self, samples: list[Any]) -> Any:
            batch = torch.utils.data.default_collate(samples)
            return batch[0] + float(own.normal()), *batch[1:]

    for task, name in ((Augmenting(), "augment()"), (Collating(), "collate()")):
        (reason,) = own_generators(Fetch(task.train_data(), Task(task), seed=0))
        assert reason.startswith(name)


@pytest.mark.parametrize(
    ("per_gpu", "granule", "samples"),
    [(1, 1, 0), (2, 1, 2), (7, 1, 4), (32, 1, 8), (64, 1, 16), (64, 8, 32), (8, 8, 0)],
)
def test_trial_takes_as_long_as_a_few_steps(per_gpu: int, granule: int, samples: int) -> None:
    batches = batches_of(solve(1, global_size=64, per_gpu=per_gpu, granule=granule), 500)
    assert [stop - start for start, _, stop in batches] == [samples] * (DRAWS if samples else 0)
    assert all((middle - start) % granule == 0 for start, middle, _ in batches)


ENGINES = {
    "ddp": [],
    "fsdp": ["engine=fsdp"],
    "accelerate": ["engine=accelerate"],
    "zero-0": ["engine=deepspeed", "engine.stage=0"],
    "zero-3": ["engine=deepspeed", "engine.stage=3"],
    "bf16": ["precision=bf16"],
    "bitwise": ["numerics=bitwise", "batch.per_gpu=8"],
}


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path, trial=True)


@pytest.mark.parametrize("engine", ENGINES)
def test_trial_works_on_every_engine(runs: Runs, engine: str) -> None:
    """On two ranks, coupling is reported before step 1, and a mean is rejected."""
    how = ["task=custom", "task._target_=tests.support.tasks.Coupled", "duration=2st", "lr.peak=0.1", *ENGINES[engine]]
    events = runs(2, *how).events()
    about = [event["reason"].split()[0] for event in events if event["event"] == "depends_on_cut"]
    assert about == ["the", "task.calls", *(["task.loss"] if engine != "bitwise" else [])]
    ends = runs(2, *how, "task.args.mean=true").ends
    assert all(end["raised"] == "UserError" and "returns a mean" in end["message"] for end in ends)


@pytest.mark.parametrize("world", [1, 2])
def test_run_is_bitwise_equal_without_trial(runs: Runs, world: int) -> None:
    """The task has dropout, augmentation, a dataset's own generator and a counter in the loss."""
    how = [
        "task=custom",
        "task._target_=tests.support.tasks.Coupled",
        "duration=5st",
        "lr.peak=0.1",
        "batch.global_size=32",
    ]
    tried, untried = runs(world, *how), runs(world, *how, "check.contract=false", "data.fingerprint=false")
    assert distance(tried.weights(), untried.weights()) == 0
    assert tried.losses() == untried.losses()
    assert not [event for event in untried.events() if event["event"] == "depends_on_cut"]


def test_skipped_trial_is_reported(runs: Runs) -> None:
    """A single sample in a micro-batch can't be tried."""
    how = ["task=custom", "task._target_=tests.support.tasks.Counted", "duration=2st", "lr.peak=0.1"]
    (event,) = [e for e in runs(1, *how, "batch.per_gpu=1").events() if e["event"] == "trial_skipped"]
    assert "one sample" in event["reason"]
    assert not [e for e in runs(1, *how).events() if e["event"] == "trial_skipped"]


class Failing(Counted):
    """A task whose loss fails in the trial, which switches dropout off, and perhaps in training, too."""

    val_data: Any = None

    def __init__(self, always: bool) -> None:
        super().__init__()
        self.always = always

    def loss(self, model: nn.Module, batch: Any) -> Any:
        if self.always or (model.training and not any(m.training for m in model if isinstance(m, nn.Dropout))):
            raise KeyError("meant to")
        return super().loss(model, batch)


@pytest.mark.parametrize("always", [True, False])
def test_loss_that_fails_in_the_trial_is_reported_once(runs: Runs, always: bool) -> None:
    """The error of step 1 says more; without one, the trial was incomplete."""
    task = ("task=custom", f"task._target_={__name__}.Failing", f"task.args.always={str(always).lower()}")
    run = runs(2, *task, "lr.peak=0.1", "duration=2st")
    assert {end.get("raised") for end in run.ends} == {"KeyError" if always else None}
    skipped = [event for event in run.events() if event["event"] == "trial_skipped"]
    assert ["KeyError: 'meant to'" in event["reason"] for event in skipped] == ([] if always else [True])


class Fetching(Counted):
    """A task whose samples can't be fetched or collated, in the trial or always."""

    val_data: Any = None

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def train_data(self) -> Any:
        return _Broken(super().train_data(), self.how)


class _Broken(Dataset[Any]):
    """Samples that differ in length, or that fail to be fetched."""

    def __init__(self, data: Any, how: str) -> None:
        self.data, self.how, self.parent = data, how, os.getpid()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        if self.how == "fails" or (self.how == "fails in the trial" and os.getpid() != self.parent):
            raise KeyError("meant to")
        return torch.zeros(index + 1) if self.how == "ragged" else self.data[index]


@pytest.mark.parametrize(
    ("how", "raised", "reported"),
    [("ragged", "UserError", 0), ("fails", "KeyError", 0), ("fails in the trial", None, 1)],
)
def test_bad_sample_is_reported_once(
    runs: Runs, how: str, raised: str | None, reported: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """A mistake in the samples is an error at once; another error is left to step 1, which says more."""
    task = ("task=custom", f"task._target_={__name__}.Fetching", f"task.args.how={how}", "data.workers=0")
    run = runs(2, *task, "lr.peak=0.1", "duration=2st")
    assert {end.get("raised") for end in run.ends} == {raised}
    skipped = [event for event in run.events() if event["event"] == "trial_skipped"]
    assert ["KeyError: 'meant to'" in event["reason"] for event in skipped] == [True] * reported
    printed = "".join(capfd.readouterr())
    assert printed.count("incomplete") == reported


class Evaluated(Counted):
    """A task whose evaluation makes the mistake that its argument names."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def evaluate(self, model: nn.Module, batch: Any) -> Any:
        loss, count = self.loss(model, batch)
        if self.how == "typo" and len(batch[0]):
            return {"loss": (losss, count)}  # type: ignore[name-defined]  # noqa: F821
        if self.how == "no such key":
            return {"loss": (float(loss), {"n": count}["units"])}
        if self.how == "no such method":
            model.predict(batch)  # type: ignore[operator]
        if self.how == "only this batch":
            raise ValueError("only one class in this batch")
        values = {
            "mean": (float(loss / count), int(count)),
            "mean and 1": (float(loss / count), 1),
            "sum": (float(loss), int(count)),
            "missing": (float(loss), int(count)),
        }
        made = {"loss": values.get(self.how, values["sum"])}
        return made | ({"rare": (1.0, 1)} if self.how == "missing" and len(batch[0]) > 30 else {})

    def summarise(self, totals: Any) -> Any:
        if self.how == "summarise: typo":
            return {"loss": totals.loss}
        return {"loss": 1 / 0} if self.how == "summarise: only this batch" else {}


@pytest.mark.parametrize(
    ("how", "rejected", "event", "expected"),
    [
        ("sum", False, "", ""),
        ("typo", True, "", "losss"),
        ("no such key", True, "", "units"),
        ("no such method", True, "", "predict"),
        ("summarise: typo", True, "", "task.summarise"),
        ("mean", True, "", "'loss'"),
        ("mean and 1", False, "depends_on_cut", "'loss'"),
        ("missing", False, "depends_on_cut", "'rare'"),
        ("summarise: only this batch", False, "trial_skipped", "ZeroDivisionError"),
        ("only this batch", True, "", "ValueError"),
    ],
)
def test_mistake_in_an_evaluation_is_found(runs: Runs, how: str, rejected: bool, event: str, expected: str) -> None:
    task = ("task=custom", "task._target_=tests.ranks.test_trial.Evaluated", f"task.args.how='{how}'", "lr.peak=0.1")
    run = runs(1, *task, "duration=1st", "evaluate.last=false", "evaluate.per_gpu=37")
    (end,) = run.ends
    assert (end.get("raised") == "UserError") == rejected
    if rejected:
        assert expected in end["message"]
        assert not (run.run.path / "metrics.jsonl").exists()
    else:
        reports = [report for report in run.events() if report["event"] in ("depends_on_cut", "trial_skipped")]
        assert [report["event"] for report in reports] == ([event] if event else [])
        assert all(expected in report["reason"] for report in reports)
