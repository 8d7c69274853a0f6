"""Test which parameters have no weight decay with every optimizer, and that a resumed run keeps its groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import isobatch.trainers.optim.groups
from isobatch.scaling.errors import UserError
from isobatch.trainers.model.batchnorm import swap_batchnorm
from isobatch.trainers.model.randomness import Stream
from isobatch.trainers.optim.groups import undecayed
from tests.ranks.test_optim_runs import names_by, optimizer_of
from tests.support.harness import Runs, distance
from tests.support.tasks import Counted


class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.proj = nn.Parameter(torch.ones(4, 4)), nn.Linear(4, 4)


class Net(nn.Module):
    """A model with decayed parameters, and two-dimensional parameters without decay."""

    own_names: Any = ()

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.emb, self.own = nn.Linear(4, 4), nn.Embedding(5, 4), RMSNorm()
        self.norms = nn.ModuleList([nn.LayerNorm([4, 4]), nn.RMSNorm([4, 4]), nn.GroupNorm(2, 4), nn.BatchNorm1d(4)])
        self.spectral, self.length = spectral_norm(nn.LayerNorm([4, 4])), weight_norm(nn.Linear(4, 4))
        self.scales, self.layers = (nn.ParameterList([torch.ones(4, 4)]) for _ in range(2))
        self.logit_Scale, self.beta2, self.pos = (nn.Parameter(torch.ones(4, 4)) for _ in range(3))
        self.vector = nn.Parameter(torch.ones(4))
        self.head = nn.Linear(4, 4, bias=False)

    def no_weight_decay(self) -> Any:
        return self.own_names


MATRICES = ["head.weight", "inner.weight", "layers.0", "length.parametrizations.weight.original1", "own.proj.weight", "pos"]  # fmt: skip # noqa: E501


def test_matrices_and_embeddings_are_decayed() -> None:
    model = Net()
    swap_batchnorm(model, "ghost", 2, Stream(0, torch.device("cpu")), 1)
    without = undecayed(model)
    assert sorted(n for n, p in model.named_parameters() if p not in without) == sorted(["emb.weight", *MATRICES])


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb", "lars", "adafactor"])
def test_all_optimizers_decay_the_same_parameters(name: str) -> None:
    model = Net()
    model.own_names = {"pos", "not_there"}
    found = names_by(optimizer_of(model, f"optimizer={name}", "optimizer.weight_decay=0.5"), model, "weight_decay")
    assert found[0] == (0.5, sorted({"emb.weight", *MATRICES} - {"pos"}))
    assert found[1][0] == 0
    assert len(found) == 2


def test_muon_excludes_gains_and_biases() -> None:
    model = Net()
    model.own_names = ["pos"]
    found = names_by(optimizer_of(model, "optimizer=muon"), model, "muon", "weight_decay")
    assert found[0] == (True, 0.1, sorted({*MATRICES} - {"head.weight", "pos"}))
    assert found[1] == (False, 0.1, ["emb.weight", "head.weight"])
    assert found[2] == (True, 0.0, ["pos"])


@pytest.mark.parametrize("names", ["pos", [1], 7])
def test_no_weight_decay_has_to_return_names(names: Any) -> None:
    model = Net()
    model.own_names = names
    with pytest.raises(UserError, match=r"no_weight_decay\(\) returned .*; return the names of parameters"):
        optimizer_of(model)


class Normed(Counted):
    """A task whose model has a two-dimensional norm."""

    def model(self) -> nn.Module:
        gain = nn.Sequential(nn.Unflatten(1, (2, 4)), nn.LayerNorm([2, 4]), nn.Flatten())
        return nn.Sequential(gain, nn.Linear(8, self.width), *super().model()[1:])


class Grouped(Normed):
    """A task with its own groups, in which Muon chooses its matrices."""

    def param_groups(self, model: nn.Module) -> Any:
        return [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[1:].parameters()}]


@pytest.mark.parametrize(
    ("world", "name", "task"),
    [
        (1, "muon", "Normed"),
        (1, "muon", "Grouped"),
        (2, "lamb engine=fsdp", "Normed"),
    ],
)
def test_resumed_run_keeps_the_groups_of_its_checkpoint(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, world: int, name: str, task: str
) -> None:
    """The checkpoint is of an earlier version, whose groups depend only on dimensions."""
    overrides = (
        "task=custom", f"task._target_=tests.ranks.test_decay.{task}", "batch.global_size=24", "duration=8st",
        "lr.peak=0.02", "evaluate.every=null", "optimizer.weight_decay=0.5", *f"optimizer={name}".split(),
    )  # fmt: skip
    with monkeypatch.context() as older:
        older.setattr(
            isobatch.trainers.optim.groups, "undecayed", lambda model: {p: "" for p in model.parameters() if p.ndim < 2}
        )
        older.setattr("isobatch.trainers.optim.muon.gains_and_biases", lambda model: {})
        whole, stopped = runs(world, *overrides), runs(world, *overrides, stop_at=4)
    run = runs(world, *overrides, resume=stopped)
    assert run.ends[0]["state"] == "finished", run.ends
    assert distance(whole.weights(), run.weights()) == 0
    [text] = [event["text"] for event in run.events() if event["event"] == "groups_kept"]
    assert "keeps the checkpoint's groups" in text
    fresh = runs(world, *overrides)
    assert distance(whole.weights(), fresh.weights()) > 1e-3
    assert not any(event["event"] == "groups_kept" for event in fresh.events())
