"""Test that the engine ``deepspeed`` with ZeRO 0 to 3 trains the run of ``ddp`` on any number of ranks."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from isobatch.conf.compose import compose
from isobatch.scaling.plan import Plan
from isobatch.scaling.planning.resolve import resolve
from isobatch.trainers.engines.engine import Engine
from isobatch.trainers.engines.make import make_engine
from isobatch.trainers.ranks.world import World
from isobatch.trainers.tasks.task import make_model, make_task
from isobatch.trainers.tensors.manifest import read
from isobatch.trainers.tensors.names import checkpoints
from isobatch.trainers.tensors.slices import Reader
from tests.ranks.test_batchnorm import GHOST, Normed
from tests.ranks.test_checkpoint import same_bits
from tests.support.harness import ROUNDING, Run, Runs, distance, in_ranks, preload_deepspeed
from tests.support.tasks import Counted

STAGES, WORLDS = (0, 1, 2, 3), (1, 2, 3)
COUNTED = (
    "task=custom", "task._target_=tests.support.tasks.Counted", "batch.global_size=96", "duration=8st", "lr.peak=0.05",
    "evaluate.every=null", "log.every=1st",
)  # fmt: skip
# BatchNorm, dropout, unequal units, a growing batch, active clipping, a moving average and the noise scale
EVERYTHING = (
    *(option for option in GHOST if not option.startswith("batch.global_size")),
    "batch.schedule=0sa:8 40sa:24", "clip_norm=0.5", "ema=30sa", "noise.every=1st", "evaluate.every=5st",
)  # fmt: skip
ODD = ("task._target_=tests.ranks.test_deepspeed.Odd", "batch.global_size=10", "evaluate.every=4st")


class Odd(Counted):
    """A task that calls its model twice. It has tied, frozen and small weights, and a weight that some steps don't use.

    Args:
        passes: number of passes of a rank in a step.
    """

    def __init__(
        self, passes: int = 1, scalar: bool = False, double: bool = False, hollow: bool = False, **args: Any
    ) -> None:
        super().__init__(**args)
        self.passes, self.scalar, self.double, self.hollow, self.calls = passes, scalar, double, hollow, 0

    def model(self) -> nn.Module:
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Dropout(0.1), nn.Linear(8, 7))
        assert isinstance(model[2], nn.Linear)
        model[2].weight = model[0].weight
        model[4].bias.requires_grad_(False)  # type: ignore[union-attr, operator]
        model.register_parameter("spare", nn.Parameter(torch.ones(5)))
        model.register_parameter("scale", nn.Parameter(torch.ones(() if self.scalar else 1)))
        if self.hollow:
            model.register_parameter("hollow", nn.Parameter(torch.ones(3, 0)))
        return model.double() if self.double else model

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        inputs, targets, units = batch
        mask = torch.arange(7) < units[:, None]
        outputs = (model(inputs) + model(-inputs)) * model.scale  # type: ignore[operator]
        if model.training and self.calls // self.passes not in (2, 3, 6):
            outputs = outputs + model.spare.sum()  # type: ignore[union-attr, operator]
        self.calls += model.training
        return ((outputs - targets)[mask] ** 2).sum(), units.sum()

    def evaluate(self, model: nn.Module, batch: Any) -> Any:
        return {"loss": self.loss(model, batch), "size": (model(batch[0]).abs().sum(), len(batch[0]))}


class InOnePass(Counted):
    """A task in which a parameter is used in only one pass of a step: the first, the second and the last, in turn.

    Args:
        passes: number of passes of a rank in a step.
    """

    def __init__(self, passes: int = 1, **args: Any) -> None:
        super().__init__(dropout=0.0, **args)
        self.passes, self.calls = passes, 0

    def model(self) -> nn.Module:
        model = super().model()
        model.register_parameter("spare", nn.Parameter(torch.ones(7)))
        return model

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        inputs, targets, units = batch
        outputs, (step, number) = model(inputs), divmod(self.calls, self.passes)
        if number == step % self.passes:
            outputs = outputs + model.spare  # type: ignore[operator]
        self.calls += model.training
        return ((outputs - targets)[torch.arange(7) < units[:, None]] ** 2).sum(), units.sum()


class NaNLoss(Normed):
    """A task in which one pass of the last rank has a NaN loss and gradient."""

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        loss, units = super().loss(model, batch)
        self.calls = getattr(self, "calls", 0) + model.training
        return (loss + torch.nan if self.calls == 4 and os.environ["RANK"] == "1" else loss), units


def zero(stage: int, *more: str) -> tuple[str, ...]:
    return ("engine=deepspeed", f"engine.stage={stage}", *more)


@pytest.fixture(scope="module", autouse=True)
def deepspeed() -> None:
    preload_deepspeed()


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return the run of ``ddp`` on one rank, with enough micro-batches to measure the noise."""
    return Runs(tmp_path_factory.mktemp("truth"))(1, *EVERYTHING, "batch.per_gpu=4")


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Return a function that gives the runs that several tests compare with."""
    return cache(Runs(tmp_path_factory.mktemp("once")))


def averages(run: Run) -> dict[str, Tensor]:
    return load_file(run.run.final / "ema.safetensors")


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_run_equals_that_of_ddp(runs: Runs, truth: Run, stage: int, world: int) -> None:
    """Compare weights, running statistics, averages, losses, norms and the noise. Some ranks have no samples."""
    run = runs(world, *EVERYTHING, "batch.per_gpu=4", *zero(stage))
    assert distance(run.weights(), truth.weights()) < ROUNDING
    assert distance(averages(run), averages(truth)) < ROUNDING
    for line, true in zip(run.metrics(), truth.metrics(), strict=True):
        for name in line.keys() & {"loss", "grad_norm", "val/loss", "ema/loss", "noise/trace", "noise/grad_sq"}:
            assert line[name] == pytest.approx(true[name], rel=1e-4, abs=1e-6), (line["step"], name)


@pytest.mark.parametrize(("stage", "offload"), [(0, False), (1, True), (2, False), (2, True), (3, False), (3, True)])
def test_run_of_odd_models_equals_that_of_ddp(runs: Runs, once: Callable[..., Run], stage: int, offload: bool) -> None:
    """The parameters are tied, frozen, unused and small, the model is called twice, and the optimizer is AdamW."""
    options = (
        *COUNTED,
        *ODD,
        f"task.args.scalar={str(stage < 3).lower()}",
        "optimizer=adamw",
        "lr.peak=0.01",
        "ema=40sa",
    )
    one = once(1, *options)
    cut = ("batch.per_gpu=2", "task.args.passes=2")
    three = runs(3, *options, *cut, *zero(stage, f"engine.offload={str(offload).lower()}"))
    assert three.ends[0]["state"] == "finished", three.ends[0]
    assert distance(three.weights(), one.weights()) < ROUNDING
    assert distance(averages(three), averages(one)) < ROUNDING
    for name in ("val/loss", "val/size", "ema/loss", "ema/size"):
        assert three.metrics()[-1][name] == pytest.approx(one.metrics()[-1][name], rel=1e-5)


@pytest.mark.parametrize(("stage", "offload"), [*product((0, 1, 2, 3), ["false"]), *product((1, 2, 3), ["true"])])
def test_parameter_used_in_some_passes_is_trained(
    runs: Runs, once: Callable[..., Run], stage: int, offload: str
) -> None:
    """No gradient is lost, and none remains for the next step."""
    options = (
        *COUNTED, "task._target_=tests.ranks.test_deepspeed.InOnePass", "task.args.passes=3", "batch.global_size=12",
        "batch.per_gpu=2",
    )  # fmt: skip
    ddp = once(2, *options, "engine.config.find_unused_parameters=true")
    ours = runs(2, *options, *zero(stage, f"engine.offload={offload}"))
    assert distance(ours.weights(), ddp.weights()) < ROUNDING


@pytest.mark.parametrize("stage", [1, 3])
def test_bf16_run_equals_that_of_ddp(runs: Runs, stage: int) -> None:
    """Weights stay fp32, and DeepSpeed's own precision stays off."""
    options = (*COUNTED, "precision=bf16", "batch.per_gpu=24", "optimizer=adamw", "lr.peak=0.003")
    unset = ("engine.config.bf16.enabled=auto", "engine.config.fp16=auto", "engine.config.zero_optimization.stage=auto")
    whole, sharded = runs(2, *options), runs(2, *options, *zero(stage, *unset))
    assert distance(sharded.weights(), whole.weights()) < ROUNDING
    assert distance(sharded.weights(), runs(2, *options, "precision=fp32").weights()) > 1e-6


@pytest.mark.parametrize(("stage", "offload"), [(0, False), (1, False), (2, False), (2, True), (3, False), (3, True)])
def test_nonfinite_step_is_skipped(runs: Runs, once: Callable[..., Run], stage: int, offload: bool) -> None:
    """A loss or a gradient is NaN on one of two ranks. No gradient of the step remains."""
    task = "test_deepspeed.NaNLoss" if stage == 2 or offload else "test_batchnorm.NaNOnce"
    skip = (*GHOST, "on_nonfinite=skip", f"task._target_=tests.ranks.{task}", "batch.per_gpu=4")
    ours = runs(2, *skip, *zero(stage, f"engine.offload={str(offload).lower()}"))
    assert ours.weights()["norm.num_batches_tracked"] == 7
    assert [event["step"] for event in ours.events() if event["event"] == "skip"] == [2]
    assert distance(ours.weights(), once(2, *skip).weights()) < ROUNDING


@pytest.mark.parametrize("stage", STAGES)
def test_resumed_run_is_bitwise_equal(runs: Runs, stage: int) -> None:
    options = (*GHOST, "ema=30sa", "optimizer=adamw", "lr.peak=0.01", "clip_norm=0.5", "batch.per_gpu=4", *zero(stage))
    stopped = runs(2, *options, stop_at=3)
    assert stopped.ends[0]["step"] == 3
    whole, resumed = runs(2, *options), runs(2, *options, resume=stopped)
    assert all(same_bits(tensor, resumed.weights()[name]) for name, tensor in whole.weights().items())
    assert all(same_bits(tensor, averages(resumed)[name]) for name, tensor in averages(whole).items())


def test_one_run_on_all_stages(runs: Runs) -> None:
    """Start with ``ddp`` on one rank, resume with ZeRO 1, 3 and 2 on three, two and three, and end with ``ddp``."""
    options = (*GHOST, "ema=30sa", "clip_norm=0.5", "batch.per_gpu=4", "duration=10st")
    whole = runs(1, *options)
    run = runs(1, *options, stop_at=2)
    for stop_at, (world, stage) in zip((4, 6, 8), ((3, 1), (2, 3), (3, 2)), strict=True):
        run = runs(world, *options, *zero(stage), stop_at=stop_at, resume=run)
        assert run.ends[0]["step"] == stop_at
    run = runs(2, *options, resume=run)
    assert run.ends[0]["state"] == "finished"
    assert distance(run.weights(), whole.weights()) < ROUNDING
    assert distance(averages(run), averages(whole)) < ROUNDING


@pytest.mark.parametrize(("stages", "scalar"), [((0, 1, 2), "true"), ((3,), "false")])
def test_checkpoint_is_restored_bitwise(runs: Runs, tmp_path: Path, stages: tuple[int, ...], scalar: str) -> None:
    """Every stage restores a checkpoint of ``ddp`` and saves the same weights, averages and optimizer state."""
    options = (*COUNTED, *ODD, f"task.args.scalar={scalar}", "optimizer=adamw", "ema=40sa", "duration=3st")
    saved = runs(1, *options).run
    reader = Reader(read(checkpoints(saved)[0]))
    for stage, world in product(stages, WORLDS):
        body = partial(saved_again, options=[*options, *zero(stage)], reader=reader)
        ranks = in_ranks(world, body, tmp_path / f"{stage}-{world}")
        spans = [span for rank in ranks for span in rank["spans"]]
        assert {name for name, *_ in spans} == reader.tensors.keys()
        for name, stored in reader.tensors.items():
            parts = sorted(span for found, *span in spans if found == name)
            assert [0, *(stop for _, stop in parts)] == [*(start for start, _ in parts), stored.numel]
        assert all(rank["values"] == reader.values for rank in ranks)


def saved_again(world: World, options: list[str], reader: Reader) -> dict[str, Any]:
    """Restore a checkpoint, compare a new save with it, and return the saved ranges."""
    engine = made(world, options)
    engine.restore(reader)
    spans = []
    for name, shape, start, data in engine.slices():
        assert (shape, data.dtype) == (reader.tensors[name].shape, reader(name, 0, 0).dtype), name
        assert same_bits(data, reader(name, start, start + data.numel())), name
        spans.append([name, start, start + data.numel()])
    return {"spans": spans, "values": engine.values()}


def made(world: World, options: list[str]) -> Engine:
    config = compose(options)
    task = make_task(config)
    plan: Plan = resolve(config, world.size, 500)
    return make_engine(config, task, make_model(config, task), plan.peak, world)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_parameter_without_elements_changes_nothing(runs: Runs, stage: int) -> None:
    """It isn't trained, and affects neither the other parameters nor a checkpoint."""
    options = (*COUNTED, *ODD, "task.args.hollow=true", "ema=40sa")
    stopped = runs(2, *options, *zero(stage), stop_at=3)
    resumed = runs(3, *options, *zero(stage), resume=stopped)
    assert resumed.ends[0]["state"] == "finished", resumed.ends[0]
    assert (
        distance(
            *(
                {name: tensor for name, tensor in run.weights().items() if name != "hollow"}
                for run in (resumed, runs(1, *options, resume=runs(1, *options, stop_at=3)))
            )
        )
        < ROUNDING
    )


@pytest.mark.parametrize("optimizer", ["NAdam", "ASGD"])
def test_optimizer_scalars_of_a_0_dim_parameter_are_restored(runs: Runs, optimizer: str) -> None:
    """A state shared by all elements is distinguished from the state of the only element."""
    options = (
        *COUNTED, *ODD, "task.args.scalar=true", "optimizer=custom", f"optimizer._target_=torch.optim.{optimizer}",
        "lr.peak=0.003",
    )  # fmt: skip
    resumed = runs(3, *options, *zero(1), resume=runs(2, *options, *zero(1), stop_at=3))
    assert resumed.ends[0]["state"] == "finished", resumed.ends[0]
    whole = runs(1, *options, resume=runs(1, *options, stop_at=3))
    assert distance(resumed.weights(), whole.weights()) < 1e-5


def test_exception_while_the_average_is_swapped_in_is_raised_at_once(tmp_path: Path) -> None:
    """The rank raises it without waiting for the other ranks."""

    def body(world: World) -> None:
        average = made(world, [*COUNTED, *zero(1), "ema=40sa"]).average
        assert average is not None
        with average.swapped():
            while world.rank == 0 and not (tmp_path / "rank-1.json").exists():
                time.sleep(0.01)
            raise ZeroDivisionError

    ends = in_ranks(2, body, tmp_path, deadline_s=20)
    assert [end["raised"] for end in ends] == ["ZeroDivisionError"] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (zero(2, "task.args.double=true"), "spare is torch.float64, but DeepSpeed steps in torch.float32"),
        (
            zero(3, "task.args.scalar=true"),
            "scale has no dimensions, so stage 3 can't shard it; use engine.stage=2",
        ),
        (zero(3, "task.args.hollow=true"), "hollow has no elements, so stage 3 can't shard it"),
        (
            zero(1, "engine.config.zero_optimization.stages=2"),
            "DeepSpeed rejects engine.config: stages: Extra inputs are not permitted",
        ),
        (
            zero(1, "engine.config.steps_per_print=5", "engine.config.wall_clock_breakdwn=true"),
            "did you mean wall_clock_breakdown?",
        ),
    ],
)
def test_unsupported_models_and_configs_are_rejected(runs: Runs, options: tuple[str, ...], message: str) -> None:
    end = runs(1, *COUNTED, *ODD, *options).ends[0]
    assert end["raised"] == "UserError"
    assert message in end["message"]


def test_missing_package_is_reported_with_the_install_command(tmp_path: Path) -> None:
    def body(world: World) -> None:
        sys.modules["deepspeed"] = None  # type: ignore[assignment]
        made(world, [*COUNTED, *zero(1)])

    (end,) = in_ranks(1, body, tmp_path)
    assert end["raised"] == "UserError"
    assert "pip install '.[deepspeed]'" in end["message"]


def test_deepspeed_prints_nothing(runs: Runs, capfd: pytest.CaptureFixture[str]) -> None:
    runs(2, *COUNTED, *zero(3), "duration=2st")
    out, err = capfd.readouterr()
    assert err == ""
    assert out.count("\n") < 20
    assert "[" not in out
    assert "DeepSpeed" not in out
