"""Test FSDP's own features: groups of modules, the memory of a rank, and gathered weights that are never stale."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from isobatch.conf.compose import compose
from isobatch.scaling.errors import UserError
from isobatch.scaling.planning.resolve import resolve
from isobatch.trainers.engines.fsdp import groups, refuse_mixed, sharded_modules
from isobatch.trainers.engines.make import make_engine
from isobatch.trainers.ranks.world import World
from isobatch.trainers.tasks.task import make_task
from isobatch.trainers.tensors.sharding import local
from tests.ranks.test_engines import PLAIN, same
from tests.support.harness import ROUNDING, Runs, distance, in_ranks
from tests.support.same import Blocks, Net, overrides


def net() -> Net:
    return Net(8, 3, 0.0, False, False)


def test_elements_of_module_lists_are_gathered_one_by_one() -> None:
    model = net()
    assert set(groups(model, "auto")) == set(model.blocks)
    assert groups(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "auto") == []


def test_containers_in_module_lists_form_no_group() -> None:
    inner = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model = nn.Sequential(nn.ModuleList([inner, nn.ModuleDict({"a": nn.Sequential(nn.ModuleList([nn.Tanh()]))})]))
    assert set(groups(model, "auto")) == set(inner)


def test_patterns_select_groups() -> None:
    model = net()
    assert groups(model, ["blocks.*.inner", "blocks.1"]) == [
        model.blocks[2].inner, model.blocks[1].inner, model.blocks[1], model.blocks[0].inner,
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"engine.shard=block.\* matches no module .* did you mean blocks.\*"):
        groups(model, ["block.*"])


def test_module_that_shares_a_parameter_stays_with_the_root() -> None:
    model = net()
    with pytest.raises(UserError, match=r"engine.shard: again shares a parameter with a module outside of it"):
        groups(model, ["again"])
    lists = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)])
    lists[1].weight = lists[0].weight
    assert groups(nn.Sequential(lists), "auto") == [lists[2]]


def test_group_has_one_dtype() -> None:
    model = net()
    model.leave.double()
    with pytest.raises(UserError, match=r"a Net has torch.float32 and torch.float64") as error:
        refuse_mixed([*model.blocks, model])
    assert error.value.key == "engine.shard"
    refuse_mixed([*model.blocks, model.leave, model])


def test_rank_holds_only_its_shard(runs: Runs) -> None:
    """Groups are freed after the forward."""
    config = compose([*overrides("AdamW", "FSDP"), "optimizer=adamw", "task.args.width=64"])
    task = make_task(config)
    everything = sum(p.numel() for p in task.model().parameters())

    def body(ranks: World) -> Any:
        plan = resolve(config, ranks.size, 500)
        model = task.model()
        engine: Any = make_engine(config, task, model, plan.peak, ranks)
        batch = [tensor[:8] for tensor in task.train_data().task.__dict__.values() if isinstance(tensor, torch.Tensor)]
        engine.call(lambda: model(batch[0]))
        held = [local(p).numel() for p in model.parameters()]
        state = sum(piece.data.numel() for piece in engine.slices())
        return [sum(held), state, len(sharded_modules(engine._reducer._root))]

    found = in_ranks(3, body, runs.folder / "held")
    for held, _, modules in found:
        assert abs(held / everything - 1 / 3) < 0.05
        assert modules == 3


def test_evaluations_leave_no_stale_weights(runs: Runs) -> None:
    """The average is swapped in and out around evaluations, which gather weights."""
    often = ("evaluate.every=1st", "ema=60sa")
    ddp = runs(1, *overrides(PLAIN, "DDP"), *often)
    fsdp = runs(3, *overrides(PLAIN, "FSDP"), *often)
    same(fsdp, ddp, 1e-6)
    assert distance(fsdp.weights(), runs(1, *overrides(PLAIN, "DDP")).weights()) < ROUNDING


@pytest.mark.parametrize("more", [("engine.shard=[blocks.0.inner]",), ("engine.config.reshard_after_forward=false",)])
def test_groups_change_nothing(runs: Runs, more: tuple[str, ...]) -> None:
    often = "evaluate.every=3st"
    same(runs(2, *overrides(PLAIN, "FSDP"), *more, often), runs(1, *overrides(PLAIN, "DDP"), often), 1e-6)


def test_bf16_weights_equal_autocast_to_rounding(runs: Runs) -> None:
    half = ("precision=bf16", "engine.param_dtype=bf16")
    ddp = runs(1, *overrides("bf16", "DDP"))
    difference = distance(runs(2, *overrides("bf16", "FSDP"), *half).weights(), ddp.weights())
    assert 1e-7 < difference < 2e-2


def test_offload_needs_gpus(runs: Runs) -> None:
    end = runs(1, *overrides(PLAIN, "FSDP"), "engine.offload=true").ends[0]
    assert (end["raised"], end["key"]) == ("UserError", "engine.offload")
    assert "cpu" in end["message"]


def test_fsdp_prints_no_warnings(runs: Runs, capfd: pytest.CaptureFixture[str]) -> None:
    runs(2, *overrides(PLAIN, "FSDP"), "duration=2st")
    out, err = capfd.readouterr()
    assert (err, "Warning" in out) == ("", False)


@pytest.mark.parametrize("call", ["method", "weight", "penalty"])
def test_module_used_without_a_call_is_rejected_with_a_fix(runs: Runs, call: str) -> None:
    odd = (*overrides(PLAIN, "FSDP"), "task._target_=tests.ranks.test_fsdp.Uncalled", f"task.args.call={call}")
    end = runs(2, *odd).ends[0]
    assert end["raised"] == "UserError"
    assert end["message"].endswith("or use engine.shard=[]")
    assert runs(2, *odd, "engine.shard=[]").ends[0]["state"] == "finished"


class Uncalled(Blocks):
    """A task whose loss uses the first block's method or weight, or a penalty on the weight."""

    def loss(self, model: Any, batch: Any) -> tuple[torch.Tensor, Any]:
        loss, units = super().loss(model, batch)
        return (loss + model.blocks[0].outer.weight.pow(2).sum() if self.call == "penalty" else loss), units

    def called(self, model: Any, inputs: torch.Tensor) -> torch.Tensor:
        hidden, block = model.enter(inputs), model.blocks[0]
        if self.call == "penalty":
            return super().called(model, inputs)
        hidden = block.forward(hidden) if self.call == "method" else hidden @ block.outer.weight @ block.inner[0].weight
        return model.leave(model.blocks[1](hidden))


def test_state_that_is_not_sharded_is_rejected_after_the_first_step(runs: Runs) -> None:
    """Rejecting it at the first checkpoint would lose ten minutes of training."""
    columns = ("optimizer=custom", "optimizer._target_=tests.ranks.test_fsdp.Columns", "checkpoint.every=null")
    end = runs(2, *overrides(PLAIN, "FSDP"), *columns, "duration=3st").ends[0]
    assert end["raised"] == "UserError"
    assert (
        "the optimizer Columns keeps a columns of enter.weight that isn't sharded as the parameter is" in end["message"]
    )


class Columns(torch.optim.Optimizer):
    """An optimizer that keeps the mean of each column."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim > 1:
                    self.state[parameter]["columns"] = parameter.grad.mean(0)
                parameter.sub_(parameter.grad, alpha=group["lr"])


@pytest.mark.parametrize("name", ["Adam", "NAdam", "RAdam", "Adamax", "Adadelta", "Adagrad", "ASGD"])
def test_torchs_optimizers_step_sharded_tensors(runs: Runs, name: str) -> None:
    chosen = ("optimizer=custom", f"optimizer._target_=torch.optim.{name}", "lr.peak=0.002", "duration=3st")
    same(runs(2, *overrides(PLAIN, "FSDP"), *chosen), runs(1, *overrides(PLAIN, "DDP"), *chosen), 1e-5)
