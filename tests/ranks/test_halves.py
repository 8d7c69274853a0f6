"""Measure the gradient noise from two halves of each step: the same numbers on any cut and engine, and the same run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isobatch.conf.compose import compose
from isobatch.scaling.noise import Estimate, Smoothed
from isobatch.scaling.order import indices
from isobatch.scaling.planning.resolve import resolve
from isobatch.trainers.engines.ddp import DDP
from isobatch.trainers.engines.metric import FLOOR, weighing_of
from isobatch.trainers.engines.noise import compare
from isobatch.trainers.engines.reducer import Parts
from isobatch.trainers.model.randomness import seed_generators
from isobatch.trainers.optim.make import Tuned
from isobatch.trainers.optim.muon import MuonAdamW
from isobatch.trainers.ranks.world import World
from tests.ranks.test_batchnorm import GHOST
from tests.ranks.test_bitwise import BITWISE, FEATURES, assert_same
from tests.ranks.test_deepspeed import averages
from tests.ranks.test_noise import Kinds, command, gradient, noise
from tests.support.harness import ADAM_ROUNDING, ROUNDING, Runs, distance
from tests.support.steps import walk

HALVES = ("noise.every=1st", "noise.parts=2")
COMMON = ("duration=6st", "clip_norm=0.5", "ema=60sa", "log.every=1st", "evaluate.every=null")
# BatchNorm over ghosts, dropout, unequal units, an odd granule, clipping and a moving average
SGD = (*(option for option in GHOST if not option.startswith("batch.")), "batch.global_size=20", "batch.per_gpu=8",
       *COMMON)  # fmt: skip
ADAM = ("task=custom", "task._target_=tests.support.tasks.Counted", "task.args.dropout=0.1", "batch.global_size=21",
        "batch.per_gpu=8", "optimizer=adamw", "lr.peak=0.002", *COMMON)  # fmt: skip
ZERO = ("engine=deepspeed", "engine.offload=false", "engine.stage=0")
OFFLOAD = (*ZERO, "engine.stage=2", "engine.offload=true")
RUNS: dict[str, tuple[tuple[str, ...], tuple[tuple[int, tuple[str, ...]], ...]]] = {
    "raw": (SGD, ((3, ("batch.per_gpu=4",)), (2, OFFLOAD))),
    "adam": (ADAM, ((2, ("engine=fsdp",)), (2, (*ZERO, "engine.stage=1")), (3, (*ZERO, "engine.stage=3")))),
}


def by_hand(overrides: tuple[str, ...]) -> list[Smoothed]:
    """Return the averages after each step, from the definition, with the gradients of the halves in plain torch."""
    config = compose(list(overrides))
    seed_generators(config.seed)
    task = Kinds(**config.task.args)
    model, data, known, found = task.model(), task.train_data().tensors, Smoothed(), []
    for step in walk(resolve(config, 1, len(task.units))):
        rows = torch.from_numpy(indices(config.seed, len(task.units), step.start, step.stop))
        first = -(-len(rows) // 2)
        loss_units = [task.loss(model, tuple(t[part] for t in data)) for part in (rows[:first], rows[first:])]
        units, sizes = sum(count for _, count in loss_units), (first, len(rows) - first)
        means = [
            gradient(model, loss) * (len(rows) / size / units)
            for (loss, _), size in zip(loss_units, sizes, strict=True)
        ]
        trace = sizes[0] * sizes[1] / len(rows) * float((means[0] - means[1]).square().sum())
        known = known.updated(Estimate(float(means[0] @ means[1]), trace).of_data(len(task.units)))
        found.append(known)
    return found


@pytest.mark.parametrize(
    ("world", "sizes"), [(1, ("batch.global_size=21",)), (3, ("batch.global_size=9", "batch.per_gpu=2"))]
)
def test_estimates_equal_those_by_hand(runs: Runs, world: int, sizes: tuple[str, ...]) -> None:
    """The halves are uneven, the units unequal, some passes have no samples, and the gradient is clipped."""
    some = (*command("plain", *sizes, "clip_norm=0.01", "duration=3st"), "noise.parts=2")
    for (*_, grad_sq, trace), known in zip(noise(runs(world, *some)), by_hand(some), strict=True):
        assert trace == pytest.approx(known.trace, rel=1e-5)
        assert grad_sq == pytest.approx(known.grad_sq, rel=1e-5, abs=1e-5 * known.trace)


@pytest.mark.parametrize("norm", RUNS)
def test_estimates_and_run_are_the_same_on_any_cut_and_engine(runs: Runs, norm: str) -> None:
    """Measuring doesn't change the weights either, nor the running statistics, the averages and the losses."""
    recipe, engines = RUNS[norm]
    without, one = runs(1, *recipe), runs(1, *recipe, *HALVES)
    off, lines = ROUNDING if norm == "raw" else ADAM_ROUNDING, noise(one)
    assert distance(one.weights(), without.weights()) < off
    assert [line[4] is None for line in lines] == [norm == "adam", *[False] * 5]  # AdamW has no state at first
    told = [event for event in one.events() if event["event"] == "noise"]
    assert [(event["norm"], "second moment of AdamW" in event["text"]) for event in told] == [(norm, norm == "adam")]
    for world, engine in engines:
        run = runs(world, *recipe, *engine, *HALVES)
        assert run.ends[0].get("step") == 6, (engine, run.ends)
        assert distance(run.weights(), without.weights()) < off, engine
        assert distance(averages(run), averages(without)) < off, engine
        assert run.losses() == pytest.approx(without.losses(), rel=1e-5), engine
        for found, expected in zip(noise(run), lines, strict=True):
            if expected[4] is None:
                assert found == expected
            else:  # |G|² is a sum of products whose size is that of tr Σ / B
                assert found[4] == pytest.approx(expected[4], rel=1e-5), engine
                assert found[3] == pytest.approx(expected[3], rel=1e-5, abs=1e-6 * expected[4]), engine


def test_bitwise_runs_stay_bitwise_equal(runs: Runs) -> None:
    """Measured or not, on any number of processes."""
    same = (*BITWISE, *FEATURES["ghosts, a schedule, AdamW"], "ema=100sa", "clip_norm=0.5", "duration=3st")
    without, one = runs(1, *same), runs(1, *same, *HALVES)
    for name, tensor in without.weights().items():
        assert torch.equal(tensor, one.weights()[name]), name
    assert_same(one, runs(3, *same, *HALVES))


def test_workers_fetch_the_halves_and_only_due_steps_measure(runs: Runs) -> None:
    plain = command("plain", "batch.global_size=20", "batch.per_gpu=4", "duration=7st", "noise.every=3st")
    expected, run = (noise(runs(2, *plain, "noise.parts=2", f"data.workers={count}")) for count in (0, 2))
    assert run == expected
    assert [line[4] is None for line in run[:3]] == [True, True, False]
    assert run[2] == run[3] == run[4] != run[5] == run[6]


def test_a_step_that_is_not_finite_in_its_first_half_is_skipped(runs: Runs) -> None:
    bad = (
        "task=custom", "task._target_=tests.support.tasks.BecomesNaN", "task.args.dropout=0.0", "batch.global_size=24",
        "batch.per_gpu=12", "duration=4st", "on_nonfinite=skip", "log.every=1st", "evaluate.every=null",
    )  # fmt: skip
    run = runs(1, *bad, "task.args.call=3", "task.args.rank=0", *HALVES)
    assert [line.get("skipped") for line in run.metrics() if "loss" in line] == [None, 1, 1, 1]
    assert noise(run)[0] == noise(run)[1] != noise(run)[2]
    assert all(bool(tensor.isfinite().all()) for tensor in run.weights().values())


def test_an_unknown_optimizer_is_measured_raw_and_said(runs: Runs) -> None:
    custom = ("optimizer=custom", "optimizer._target_=torch.optim.RMSprop", *HALVES)
    run = runs(1, *command("plain", "batch.global_size=24", "duration=2st"), *custom)
    (event,) = [event for event in run.events() if event["event"] == "noise"]
    assert event["norm"] == "raw"
    assert "RMSprop isn't known to precondition" in event["text"]


# ---- the norms


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 4), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.second(self.first(inputs).relu()).relu())
        return outputs


def stepped(make: Any) -> DDP:
    """Return a reducer whose optimizer has taken three steps, with a gradient."""
    torch.manual_seed(0)
    model = Net().double()
    optimizer = make(model)
    reducer = DDP(Parts(model, World.alone(), lambda: Tuned(optimizer, [1.0], [False])), {})
    for step in range(4):
        optimizer.zero_grad()
        model(torch.randn(7, 6).double()).square().sum().backward()
        if step < 3:
            optimizer.step()
    return reducer


def test_adams_norm_is_that_of_its_floored_step() -> None:
    reducer = stepped(lambda model: torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99)))
    state = reducer.tuned.optimizer.state
    moments = [state[p]["exp_avg_sq"] / (1 - 0.99**3) for p in reducer.parameters]
    flat = torch.cat([moment.flatten() for moment in moments])
    floor = FLOOR * flat.mean().sqrt()
    one = torch.cat([held.flatten() for held in reducer.held()])
    first = [torch.randn_like(held) for held in reducer.held()]
    other = torch.cat([each.flatten() for each in first])
    found = compare(reducer, first, (3, 2))
    assert found is not None
    assert found.norm.name == "adam"
    means = [part / share / (flat.sqrt() + floor) for part, share in ((other, 0.6), (one, 0.4))]
    expected = [float(means[0] @ means[1]), 3 * 2 / 5 * float((means[0] - means[1]).square().sum())]
    assert found.values.tolist() == pytest.approx(expected, rel=1e-12)


def test_muons_norm_is_the_nuclear_norm_at_its_momentum() -> None:
    """The floor takes at most FLOOR √r of it, r the rank."""
    reducer = stepped(lambda model: MuonAdamW([
        {"params": [model.first.weight, model.second.weight], "muon": True},
        {"params": [p for p in model.parameters() if p.ndim == 1 or p is model.head.weight], "muon": False},
    ]))  # fmt: skip
    weighing = weighing_of(reducer)
    assert weighing is not None
    assert weighing.norm.name == "muon"
    state = reducer.tuned.optimizer.state
    moments = torch.cat([state[p]["exp_avg_sq"].flatten() / (1 - 0.95**3) for p in reducer.parameters[2:]])
    for parameter, weigh in zip(reducer.parameters, weighing.each, strict=True):
        if parameter.ndim == 2 and len(parameter) in (4, 5):
            momentum = state[parameter]["momentum_buffer"]
            rows, columns = momentum.shape
            nuclear = 0.2 * max(rows, columns) ** 0.5 * float(torch.linalg.svdvals(momentum).sum())
            assert nuclear * (1 - FLOOR * 4**0.5) < float((momentum * weigh(momentum)).sum()) < nuclear
        else:
            scale = (state[parameter]["exp_avg_sq"] / (1 - 0.95**3)).sqrt() + FLOOR * moments.mean().sqrt()
            torch.testing.assert_close(weigh(torch.ones_like(parameter)), 1 / scale)


def test_no_norm_before_the_first_step_and_none_of_unknown_state() -> None:
    model = Net()
    adam = torch.optim.AdamW(model.parameters())
    reducer = DDP(Parts(model, World.alone(), lambda: Tuned(adam, [1.0], [False])), {})
    assert weighing_of(reducer) is None
    for parameter in model.parameters():
        adam.state[parameter] = {"step": torch.ones(()), "other": torch.ones_like(parameter)}
    weighing = weighing_of(reducer)
    assert weighing is not None
    assert (weighing.norm.name, "keeps no second moment" in weighing.norm.text) == ("raw", True)
