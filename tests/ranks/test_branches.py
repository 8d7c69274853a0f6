"""Test ranks that use different parts of a model: they train as on one rank, or are rejected before weights change."""

from __future__ import annotations

from functools import cache
from typing import Any

import accelerate  # noqa: F401  imported once, before ranks are forked
import pytest
import torch
from torch import Tensor, nn
from torch.distributed import HashStore
from torch.utils.data import TensorDataset

import isobatch.trainers.engines.fsdp  # noqa: F401
from isobatch.scaling.errors import UserError
from isobatch.trainers.ranks.trails import Trail, describe_mismatch
from tests.support.harness import Runs, distance
from tests.support.same import ENGINES

FLAGS = (0, 0, 1, 0, 1, 1, 2, 0, 0, 1, 1, 0)
OVERLAPPING = (*ENGINES["ZeRO-1"], "engine.config.zero_optimization.overlap_comm=true")
FINDING = ("engine.config.find_unused_parameters=true",)


class Experts(nn.Module):
    """A model with three branches. A sample's flag selects one."""

    def __init__(self, call: str) -> None:
        super().__init__()
        self.call, self.stem = call, nn.Linear(3, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)) for _ in range(3))
        self.never = nn.Linear(2, 2)

    def forward(self, inputs: Tensor, flags: Tensor) -> Tensor:
        hidden, first, second = self.stem(inputs), *self.experts[:2]
        if self.call == "order":
            return first(hidden) + second(hidden) if flags[0] else second(hidden) + first(hidden)
        if self.call == "evaluated" and self.training:
            return first(hidden) + second(hidden)
        if self.call == "plain":
            return first(hidden) + second(hidden)
        return torch.cat([expert(hidden[flags == at]) for at, expert in enumerate(self.experts) if at in flags])


class Routed:
    """A task with a mixture of experts.

    Args:
        call: which experts run: ``flags`` (by each sample's flag), ``order`` (two experts, ordered by the first
            sample's flag), ``plain`` (always the same two) or ``evaluated`` (by flags only in evaluations).
    """

    def __init__(self, call: str = "flags") -> None:
        self.call = call

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return Experts(self.call)

    def train_data(self) -> Any:
        generator = torch.Generator().manual_seed(1)
        return TensorDataset(torch.randn(len(FLAGS), 3, generator=generator), torch.tensor(FLAGS))

    def val_data(self) -> Any:
        halves = TensorDataset(torch.ones(4, 3), torch.tensor([0, 0, 1, 1]))  # each rank evaluates one half
        return halves if self.call == "evaluated" else None

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        return (model(*batch) - 1).square().sum(), len(batch[0])


def command(*more: str, call: str = "flags") -> tuple[str, ...]:
    """Return overrides with momentum and decay, which move parameters with a zero gradient, too.

    A step has three passes on 2 ranks, and two on 3.
    """
    return (
        "task=custom", "task._target_=tests.ranks.test_branches.Routed", f"task.args.call={call}", "lr.peak=0.05",
        "optimizer.weight_decay=0.1", "batch.global_size=6", "batch.per_gpu=1", "duration=5st", *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the weights on one rank with one sample per pass, as in bitwise."""
    return cache(lambda: Runs(tmp_path_factory.mktemp("truth"))(1, *command()).weights())


@pytest.mark.parametrize(
    ("world", "engine"),
    [
        *((2, engine) for engine in (ENGINES["DDP"], FINDING, ("numerics=bitwise",), OVERLAPPING)),
        *((3, ENGINES[engine]) for engine in ("Accelerate", "ZeRO-0", "ZeRO-1", "ZeRO-2")),
        (2, (*ENGINES["ZeRO-2"], "engine.config.zero_optimization.reduce_bucket_size=8")),
        (3, (*ENGINES["FSDP"], "engine.shard=[]")),
    ],
)
def test_ranks_train_as_on_one_rank(runs: Runs, truth: Any, world: int, engine: tuple[str, ...]) -> None:
    """Parameters that no rank uses get a zero gradient on any cut. The last step is included."""
    assert distance(runs(world, *command(*engine)).weights(), truth()) < 1e-6


SPLIT = (*ENGINES["FSDP"], "engine.shard=['experts.0','experts.1','experts.2']")


@pytest.mark.parametrize(
    ("engine", "call", "named"),
    [
        (ENGINES["FSDP"], "flags", "ran experts.1"),
        (SPLIT, "order", "ran experts.0, rank"),
        (ENGINES["ZeRO-3"], "flags", "ran experts.1"),
        (ENGINES["FSDP"], "evaluated", "one evaluation: only rank 0 ran experts.0, only rank 1 ran experts.1"),
    ],
)
def test_different_branches_are_rejected_before_weights_change(
    runs: Runs, engine: tuple[str, ...], call: str, named: str
) -> None:
    run = runs(2, *command(*engine, "batch.global_size=2", call=call))
    for end in run.ends:
        assert end["raised"] == "UserError"
        assert named in end["message"]
        assert "engine=ddp" in end["message"]
    if call != "evaluated":
        assert not run.run.checkpoints.exists() or not list(run.run.checkpoints.iterdir())


@pytest.mark.parametrize("engine", ["FSDP", "ZeRO-3"])
def test_models_without_branches_publish_nothing(runs: Runs, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_after_first(trail: Trail) -> None:
        assert trail._number == 0

    monkeypatch.setattr(Trail, "publish", fail_after_first)
    assert runs(2, *command(*ENGINES[engine], call="plain")).ends[0]["state"] == "finished"


def passes(store: HashStore, rank: int, *steps: str) -> Trail:
    """Return a rank's trail of steps of one pass. Each letter of a step is a module."""
    trail = Trail(store, rank, 2, "do better")
    for step in steps:
        trail.begin("training")
        for name in step:
            trail.ran(name)
        number, square = trail.numbers()
        trail.check(2 * number, 2 * square)
    return trail


def test_trails_show_where_modules_differ() -> None:
    store = HashStore()
    one, two = passes(store, 0, "abc"), passes(store, 1, "abc")
    for trail, names in ((one, "abc"), (two, "axbc")):
        trail.begin("training")
        for name in names:
            trail.ran(name)
    assert two.describe_mismatch() is None  # rank 0 may be behind
    expected = "the ranks ran different modules in one step: rank 0 ran b, rank 1 ran x; do better"
    assert describe_mismatch(store, range(2)) == expected
    assert one.describe_mismatch() is None
    assert two.describe_mismatch() == expected
    with pytest.raises(UserError, match="only rank 1 ran x; do better"):
        two.check(sum(trail.numbers()[0] for trail in (one, two)), sum(trail.numbers()[1] for trail in (one, two)))


def test_rank_that_is_behind_has_no_mismatch() -> None:
    store = HashStore()
    one, two = passes(store, 0, "abc", "xyz"), passes(store, 1, "abc", "xyz")
    two.begin("training")
    two.ran("x")
    one.publish()
    assert two.describe_mismatch() is None
