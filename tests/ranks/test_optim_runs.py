"""Test LAMB, LARS, Adafactor and Muon in runs: groups, resuming, other numbers of ranks, and shards."""

from __future__ import annotations

import copy
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isobatch.conf.compose import compose
from isobatch.conf.rundir.directory import RunDir
from isobatch.scaling.errors import UserError
from isobatch.scaling.planning.resolve import resolve
from isobatch.trainers.optim.lamb import LAMB
from isobatch.trainers.optim.lars import LARS
from isobatch.trainers.optim.layerwise import Layerwise
from isobatch.trainers.optim.make import Tuned, fused, make_optimizer
from isobatch.trainers.ranks.world import World
from isobatch.trainers.tasks.task import Task
from tests.support.harness import Run, Runs, distance, in_ranks
from tests.support.tasks import Counted

COUNTED = (
    "task=custom", "task._target_=tests.support.tasks.Counted", "batch.global_size=24", "duration=9st", "lr.peak=0.02",
    "evaluate.every=null",
)  # fmt: skip


@pytest.mark.parametrize("name", ["lamb", "lars", "adafactor", "muon"])
def test_resumed_run_is_exact(runs: Runs, tmp_path: Path, name: str) -> None:
    """It is bitwise equal on the same number of ranks, and equal to rounding on another. Its loss falls."""
    overrides = (*COUNTED, f"optimizer={name}", *(["optimizer.trust_coefficient=1"] if name == "lars" else []))
    whole = runs(2, *overrides)
    stopped = runs(2, *overrides, stop_at=4)
    assert stopped.ends[0]["state"] == "stopped"
    beside = Run(RunDir(shutil.copytree(stopped.run.path, tmp_path / "copy")), [])
    same, other = runs(2, *overrides, resume=stopped), runs(1, *overrides, resume=beside)
    assert distance(whole.weights(), same.weights()) == 0
    assert (other.ends[0]["state"], other.ends[0]["step"]) == ("finished", 9)
    assert not any("skipped" in line for line in (same.log(), other.log()))
    # Muon works in bfloat16, where a different rounding is 2^-8
    assert distance(whole.weights(), other.weights()) < (1e-3 if name == "muon" else 1e-6)
    assert whole.losses()[-1] < whole.losses()[0]


def test_options_are_config_keys(runs: Runs) -> None:
    deepspeed = ("optimizer.eps=1e-8", "optimizer.bias_correction=after", "optimizer.trust_clip=[0.01,10]")
    overrides = (*COUNTED, "optimizer=lamb", *deepspeed)
    run = runs(1, *overrides, stop_at=4)
    assert runs(1, *overrides, resume=run).ends[0]["state"] == "finished"
    assert distance(run.weights(), runs(1, *COUNTED, "optimizer=lamb").weights()) > 1e-4
    for wrong, message in (
        ("optimizer.trust_clip=[2,1]", "has to be [least, most]"),
        ("optimizer.bias_correction=before", "optimizer.bias_correction"),
        ("optimizer.args.bias_correction=false", "use optimizer.bias_correction"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            compose(["optimizer=lamb", wrong])


class ChannelsLast(Counted):
    """A task with a convolution whose weights have other strides than in a checkpoint."""

    def model(self) -> nn.Module:
        convolution = nn.Conv2d(2, 7, 2).to(memory_format=torch.channels_last)
        return nn.Sequential(nn.Unflatten(1, (2, 2, 2)), convolution, nn.Flatten())


def test_state_has_the_strides_of_its_parameter(runs: Runs) -> None:
    overrides = (*COUNTED, "optimizer=adamw", "task._target_=tests.ranks.test_optim_runs.ChannelsLast")
    whole = runs(1, *overrides)
    again = runs(1, *overrides, resume=runs(1, *overrides, stop_at=4))
    assert distance(whole.weights(), again.weights()) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sgd_updates_every_16_bit_number(dtype: torch.dtype) -> None:
    """On the CPU, torch 2.13's fused kernel doesn't update the numbers that fill a vector."""
    ours, plain = (nn.Parameter(torch.ones(67, dtype=dtype)) for _ in range(2))
    optimizers = fused(torch.optim.SGD, [{"params": [ours]}], {"lr": 0.5}), torch.optim.SGD([plain], 0.5, fused=False)
    for parameter, optimizer in zip((ours, plain), optimizers, strict=True):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert torch.equal(ours, plain)
    assert not ours.eq(1).any()


class Tied(nn.Module):
    """A model whose embedding and head share a matrix. Between them are a matrix, a convolution and a norm."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.inner = nn.Linear(4, 4)
        self.convolution = nn.Conv1d(4, 4, 3)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 10, bias=False)
        if tied:
            self.head.weight = self.embedding.weight


def optimizer_of(model: nn.Module, *overrides: str, task: Any = None) -> Tuned:
    config = compose([*COUNTED, *overrides])
    return make_optimizer(config, Task(task or Counted()), model, resolve(config, 1, 500).peak)


def names_by(tuned: Tuned, model: nn.Module, *keys: str) -> list[tuple[Any, ...]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = tuned.optimizer.param_groups
    return [(*(group[key] for key in keys), sorted(names[p] for p in group["params"])) for group in groups]


@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_biases_and_norms_have_neither_decay_nor_trust(name: str) -> None:
    model = Tied()
    tuned = optimizer_of(model, f"optimizer={name}", "optimizer.weight_decay=0.5", "optimizer.args.maximize=true")
    matrices = ["convolution.weight", "embedding.weight", "inner.weight"]
    vectors = ["convolution.bias", "inner.bias", "norm.bias", "norm.weight"]
    found = names_by(tuned, model, "weight_decay", "trust", "maximize")
    assert found == [(0.5, True, True, matrices), (0.0, False, True, vectors)]


class Grouped(Counted):
    def param_groups(self, model: Any) -> list[dict[str, Any]]:
        return [
            {"params": [model.embedding.weight], "lr": 0.5, "muon": True},
            {"params": model.norm.parameters(), "weight_decay": 0.0},
            {"params": [model.inner.weight, model.head.weight], "trust": False},
            {"params": [*model.convolution.parameters(), model.inner.bias], "weight_decay": 0.0, "trust": True},
        ]


def test_groups_of_a_task_may_set_decay_and_trust() -> None:
    model = Tied(tied=False)
    lamb = optimizer_of(model, "optimizer=lamb", task=Grouped())
    assert [group["trust"] for group in lamb.optimizer.param_groups] == [True, False, False, True]
    muon = optimizer_of(model, "optimizer=muon", task=Grouped())
    found = names_by(muon, model, "muon")
    assert found[0] == (True, ["embedding.weight"])
    assert found[2:4] == [(True, ["inner.weight"]), (False, ["head.weight"])]
    assert muon.lr_factors == [0.5, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("tied", [True, False])
def test_muon_updates_inner_matrices_only(tied: bool) -> None:
    model = Tied(tied)
    tuned = optimizer_of(model, "optimizer=muon")
    outer = ["convolution.weight", "embedding.weight", *([] if tied else ["head.weight"])]
    vectors = ["convolution.bias", "inner.bias", "norm.bias", "norm.weight"]
    found = names_by(tuned, model, "muon", "weight_decay")
    assert found == [(True, 0.1, ["inner.weight"]), (False, 0.1, outer), (False, 0.0, vectors)]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    tuned.optimizer.step()
    assert set(tuned.optimizer.state[model.inner.weight]) == {"momentum_buffer"}
    assert set(tuned.optimizer.state[model.norm.weight]) == {"step", "exp_avg", "exp_avg_sq"}


def test_state_is_loaded_for_both_optimizers_of_muon() -> None:
    first, second = Tied(), Tied()
    second.load_state_dict(first.state_dict())
    ours, again = (optimizer_of(model, "optimizer=muon").optimizer for model in (first, second))
    for step, optimizers in enumerate(([ours], [ours, again])):
        if step:
            second.load_state_dict(first.state_dict())
            again.load_state_dict(copy.deepcopy(ours.state_dict()))
        for model in (first, second):
            for parameter in model.parameters():
                parameter.grad = torch.arange(parameter.numel()).reshape(parameter.shape).float().cos()
        for optimizer in optimizers:
            optimizer.step()
    assert distance(first.state_dict(), second.state_dict()) == 0


def test_muon_rejects_other_shapes() -> None:
    class Wrong(Counted):
        def param_groups(self, model: Any) -> list[dict[str, Any]]:
            return [{"params": model.parameters(), "muon": True}]

    with pytest.raises(UserError, match=r"Muon needs matrices, .* shape \[4\]"):
        optimizer_of(Tied(), "optimizer=muon", task=Wrong())


@pytest.mark.parametrize("cls", [LAMB, LARS])
def test_norms_of_sharded_tensors_are_of_the_whole_tensor(cls: type[Layerwise], tmp_path: Path) -> None:
    """FSDP2 shards by rows: 7 rows unequally, and a single row on the first rank only."""
    shapes, random = [(7, 5), (1, 6), (4,)], torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=random) for shape in shapes]
    gradients = [torch.randn(shape, generator=random) for shape in shapes]

    def stepped(parameters: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        optimizer = cls(parameters, lr=0.1)
        for _ in range(3):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
        return [parameter.detach() for parameter in parameters]

    def body(world: World) -> Any:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor

        mesh = init_device_mesh("cpu", (world.size,))
        shards = [[distribute_tensor(each, mesh, [Shard(0)]) for each in several] for several in (weights, gradients)]
        ended: Any = stepped([nn.Parameter(shard) for shard in shards[0]], shards[1])
        return [each.full_tensor().tolist() for each in ended]

    plain = stepped([nn.Parameter(each.clone()) for each in weights], gradients)
    for found in in_ranks(2, body, tmp_path):
        assert isinstance(found, list), found
        for sharded, whole in zip(found, plain, strict=True):
            torch.testing.assert_close(torch.tensor(sharded), whole, rtol=1e-6, atol=1e-7)


class Frozen(Counted):
    """A task whose groups list a frozen parameter."""

    def model(self) -> nn.Module:
        model = super().model()
        model[0].weight.requires_grad_(False)
        return model

    def param_groups(self, model: nn.Module) -> Any:
        return [{"params": [model[0].weight]}, {"params": [model[0].bias, *model[3].parameters()]}]


def test_frozen_parameters_in_a_group_do_not_change(runs: Runs) -> None:
    """Neither weight decay nor momentum changes them."""
    frozen = ("task=custom", "task._target_=tests.ranks.test_optim_runs.Frozen", "duration=3st", "lr.peak=0.1")
    run = runs(2, *frozen, "optimizer.weight_decay=0.5", "lr.warmup=0st")
    torch.manual_seed(0)
    assert torch.equal(run.weights()["0.weight"], Frozen().model()[0].weight)
