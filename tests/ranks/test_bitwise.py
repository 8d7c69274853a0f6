"""Test that with ``numerics=bitwise`` a run has the same bits on any number of processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isobatch.conf.compose import compose
from isobatch.conf.rundir.directory import RunDir
from isobatch.scaling.planning.resolve import resolve
from isobatch.trainers.tensors.manifest import read
from isobatch.trainers.tensors.names import checkpoints
from isobatch.trainers.tensors.slices import Reader
from tests.support.harness import Run, Runs, distance
from tests.support.lines import untimed
from tests.support.tasks import Counted, Odd

ROOT = Path(__file__).parents[2]
TASK = (
    "task=custom", "task._target_=tests.ranks.test_bitwise.Everything", "lr.peak=0.05", "lr.warmup=0",
    "evaluate.every=null", "log.every=1st", "duration=5st",
)  # fmt: skip
SEVEN = ("batch.global_size=41", "batch.per_gpu=6")  # 7 micro-batches: 6 of 6 samples, and one of 5
BITWISE = (*TASK, *SEVEN, "numerics=bitwise")


class Everything(Counted):
    """A task whose model has everything that could depend on ranks, optionally with ``norms`` and ``dtypes``."""

    def __init__(self, norms: bool = True, dtypes: bool = True, **args: Any) -> None:
        super().__init__(**args)
        self.norms, self.dtypes = norms, dtypes

    def model(self) -> nn.Module:
        return Net(self.width, self.dropout, self.norms, self.dtypes)

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        inputs, targets, units = batch
        outputs = (model(inputs) + model(inputs.flip(1))) / 2  # twice in one forward
        return ((outputs - targets)[torch.arange(7, device=units.device) < units[:, None]] ** 2).sum(), units.sum()


class Net(nn.Module):
    """A model with BatchNorm, three kinds of dropout, three dtypes, a frozen and an unused parameter."""

    def __init__(self, width: int, dropout: float, norms: bool, dtypes: bool) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(8, width), nn.Linear(width, 7)
        self.norm = nn.BatchNorm1d(width) if norms else nn.LayerNorm(width)
        self.dropout, self.channels, self.p = nn.Dropout(dropout), nn.Dropout1d(dropout), dropout
        self.narrow = nn.Linear(width, width, dtype=torch.bfloat16 if dtypes else None)
        self.wide = nn.Linear(width, width, dtype=torch.float64 if dtypes else None)
        self.frozen = nn.Parameter(torch.ones(width), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(3), requires_grad=dtypes)

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.dropout(self.norm(self.into(inputs)).tanh())
        x = self.channels(x.view(len(x), 4, -1)).flatten(1) * self.frozen
        x = x + self.narrow(x.to(self.narrow.weight.dtype)).to(x)
        x = F.dropout(x, self.p, self.training)
        x = x + self.wide(x.to(self.wide.weight.dtype)).to(x)
        return self.out(x)


def tensors(run: Run) -> dict[str, bytes]:
    """Return the bytes of all tensors of the newest checkpoint and of final/."""
    reader = Reader(checkpoint := read(checkpoints(run.run)[0]))
    stored = {name: reader.whole(name) for name in checkpoint.tensors}
    final = {f"final/{name}": tensor for name, tensor in run.weights().items()}
    return {name: bits(tensor) for name, tensor in {**stored, **final}.items()}


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def lines(run: Run) -> list[dict[str, Any]]:
    """Return the metrics of steps without their speed. Evaluations are left out, since ranks sum up their shares."""
    return untimed(line for line in run.metrics() if "loss" in line)


def assert_same(one: Run, other: Run) -> None:
    assert {end["state"] for end in (*one.ends, *other.ends)} == {"finished"}
    actual, expected = tensors(one), tensors(other)
    assert actual.keys() == expected.keys()
    assert [name for name, content in actual.items() if expected[name] != content] == []
    assert lines(one) == lines(other)


FEATURES = {
    "sgd": ("ema=100sa", "clip_norm=0.5", "noise.every=1st", "evaluate.every=2st"),
    "ghosts, a schedule, AdamW": (
        "batch.global_size=24", "batch.per_gpu=9", "batchnorm.mode=ghost", "batchnorm.ghost_size=4",
        "batch.schedule='0sa:24 48sa:44'", "optimizer=adamw", "lr.peak=0.003",
    ),
    "lamb": ("optimizer=lamb", "task.args.dtypes=false"),
    "muon": ("optimizer=muon", "task.args.dtypes=false", "clip_norm=1.0"),
    "adafactor": ("optimizer=adafactor", "task.args.dtypes=false", "recompute=[into]"),
    "bf16": ("precision=bf16", "optimizer=adamw", "lr.peak=0.003"),
}  # fmt: skip


@pytest.mark.parametrize("feature", FEATURES)
def test_runs_are_bitwise_equal_on_any_number_of_processes(runs: Runs, feature: str) -> None:
    """With eight processes, one has no micro-batch."""
    one = runs(1, *BITWISE, *FEATURES[feature])
    assert not [event for event in one.events() if event["event"] == "depends_on_cut"]
    for world in (2, 3, 8) if feature in ("sgd", "ghosts, a schedule, AdamW") else (3,):
        assert_same(one, runs(world, *BITWISE, *FEATURES[feature]))


@pytest.mark.parametrize("pieces", [1, 2, 3, 5, 8, 41])
def test_runs_are_bitwise_equal_with_any_number_of_micro_batches(runs: Runs, pieces: int) -> None:
    sizes = (f"batch.global_size={3 * pieces - 1}", "batch.per_gpu=3", "duration=2st")
    same = (*BITWISE, *sizes, "optimizer=adamw", "task.args.dtypes=false", "task.args.norms=false")
    assert resolve(compose(list(same)), 3, 500).cut.pieces == pieces
    assert_same(runs(1, *same), runs(3, *same))


def test_fast_runs_differ(runs: Runs) -> None:
    """These tests can fail, since the order of additions changes the results."""
    fast = (*TASK, *SEVEN, "task.args.norms=false", "task.args.dtypes=false", "optimizer=adamw", "lr.peak=0.003")
    one = tensors(runs(1, *fast))
    for world in (2, 3):
        other = tensors(runs(world, *fast))
        assert any(other[name] != content for name, content in one.items()), world
    assert tensors(runs(1, *fast, "numerics=bitwise")) != one


def test_resumes_on_other_numbers_of_processes(runs: Runs, tmp_path: Path) -> None:
    """Stop on three processes, then on eight by a process without samples. The result equals the uninterrupted run."""
    same = (*BITWISE, "ema=100sa", "optimizer=adamw", "lr.peak=0.003", "noise.every=1st")
    run = runs(3, *same, stop_at=2, by_rank=2)
    assert run.ends[0] == {"state": "stopped", "step": 2, "samples": 82, "cause": "SIGTERM"}
    run = runs(8, *same, stop_at=3, by_rank=7, resume=run)
    assert [end["step"] for end in run.ends] == [3] * 8
    assert_same(runs(2, *same, resume=run), runs(1, *same))


class SometimesNaN(Everything):
    """A task whose sample 7 is NaN."""

    def __init__(self, **args: Any) -> None:
        super().__init__(**args)
        self.inputs[7] = float("nan")


def test_the_same_nonfinite_steps_are_skipped(runs: Runs) -> None:
    skips = (
        *BITWISE, "task._target_=tests.ranks.test_bitwise.SometimesNaN", "task.args.samples=60",
        "task.args.dtypes=false", "on_nonfinite=skip", "duration=8st",
    )  # fmt: skip
    one = runs(1, *skips)
    assert 0 < lines(one)[-1]["skipped"] < 8
    assert_same(one, runs(8, *skips))


# ---- rejected models


def refusals(run: Run) -> list[str]:
    assert {end["raised"] for end in run.ends} == {"UserError"}
    return [end["message"] for end in run.ends]


@pytest.mark.parametrize("world", [1, 8])
def test_changed_buffer_is_rejected(runs: Runs, world: int) -> None:
    """All ranks reject it, even ranks without samples, which didn't change the buffer."""
    for message in refusals(runs(world, *BITWISE, "task._target_=tests.support.tasks.Odd")):
        assert "numerics=bitwise: the model's forward moves its buffer 3.mean" in message


class Late(Odd):
    """A task whose model changes a buffer after 14 micro-batches: by a new tensor, or in place with ``kind=inside``."""

    def model(self) -> nn.Module:
        model = super().model()
        model[3] = Moving(self.width, self.kind == "inside")
        return model


class Moving(nn.Linear):
    def __init__(self, width: int, inside: bool) -> None:
        super().__init__(width, 7)
        self.register_buffer("mean", torch.zeros(width))
        self.inside, self.calls = inside, 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += self.training
        if self.calls > 14 and self.inside:
            self.mean.copy_(inputs.detach().mean(0))
        elif self.calls > 14:
            self.mean = inputs.detach().mean(0)
        return super().forward(inputs - self.mean)


@pytest.mark.parametrize(("world", "kind", "steps"), [(1, "", 2), (1, "inside", 2), (3, "inside", 4)])
def test_later_changed_buffer_is_rejected(runs: Runs, world: int, kind: str, steps: int) -> None:
    """All ranks reject it once one rank has changed it. Saves and evaluations, which write to buffers, are accepted."""
    late = ("task._target_=tests.ranks.test_bitwise.Late", f"+task.args.kind='{kind}'", "duration=9st")
    run = runs(world, *BITWISE, *late, "evaluate.every=1st", "checkpoint.every=1st")
    for message in refusals(run):
        assert "numerics=bitwise: the model's forward moves its buffer 3.mean" in message
    assert [line["step"] for line in lines(run)] == [*range(1, steps + 1)]


class Buffered(Odd):
    """A task whose model has a buffer that never changes, but differs between processes."""

    def model(self) -> nn.Module:
        model = super().model()
        model[3] = nn.Linear(self.width, 7)
        model.register_buffer("table", torch.tensor([float(os.getpid()), float("nan")]))
        return model


def test_unchanged_buffer_is_accepted(runs: Runs) -> None:
    """This includes a resumed run whose model has a different buffer before its checkpoint is read."""
    same = (*BITWISE, "task._target_=tests.ranks.test_bitwise.Buffered", "evaluate.every=2st")
    run = runs(3, *same, resume=runs(1, *same, stop_at=2))
    assert run.ends[0]["state"] == "finished"


@pytest.mark.parametrize("world", [1, 3])
def test_unchanged_buffer_is_accepted_after_a_skipped_first_step(runs: Runs, world: int) -> None:
    nan = ("task._target_=tests.ranks.test_bitwise.Buffered", "+task.args.call=1", "on_nonfinite=skip")
    run = runs(world, *BITWISE, *nan)
    assert {end["state"] for end in run.ends} == {"finished"}
    assert [line["skipped"] for line in lines(run)] == [1] * 5


class Undetermined(Everything):
    """A task that uses a nondeterministic operation."""

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        batch[0].put_(torch.tensor([0]), torch.zeros(1))
        return super().loss(model, batch)


def test_nondeterministic_operation_is_rejected(runs: Runs) -> None:
    for message in refusals(runs(2, *BITWISE, "task._target_=tests.ranks.test_bitwise.Undetermined")):
        assert message == (
            "numerics=bitwise: put_ does not have a deterministic implementation; replace it, or use numerics=fast"
        )


# ---- the same run as with numerics=fast


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_gradients_have_the_strides_of_their_parameters(runs: Runs, optimizer: str) -> None:
    """Fused optimizers read parameters and gradients in memory order."""
    last = (*TASK, *SEVEN, "task._target_=tests.ranks.test_optim_runs.ChannelsLast", f"optimizer={optimizer}")
    fast = runs(1, *last).weights()
    for world in (1, 3):
        assert distance(fast, runs(world, *last, "numerics=bitwise").weights()) < 1e-5


def test_measured_noise_equals_that_of_fast(runs: Runs) -> None:
    noisy = (*TASK, "batch.global_size=48", "batch.per_gpu=12", "noise.every=1st", "task.args.dtypes=false")
    names = ("noise/grad_sq", "noise/trace", "loss", "grad_norm")
    fast, bitwise = (
        [[line[name] for name in names] for line in lines(runs(2, *noisy, f"numerics={numerics}"))]
        for numerics in ("fast", "bitwise")
    )
    for one, other in zip(fast, bitwise, strict=True):
        assert other == pytest.approx(one, rel=1e-3)


# ---- through the launcher


def test_threads_are_the_same_everywhere(tmp_path: Path) -> None:
    """Every worker has one thread, whatever OMP_NUM_THREADS is, since threads change the rounding of convolutions."""
    found = []
    for workers, threads in ((1, {"OMP_NUM_THREADS": "2"}), (2, {})):
        directory = tmp_path / str(workers)
        command = [
            sys.executable, str(ROOT / "launch.py"), f"run.dir='{directory}'", f"cluster.gpus_per_node={workers}",
            "device=cpu", "task=images", "task.args.width=8", "batch.global_size=32", "batch.per_gpu=16",
            "duration=3st", "evaluate.every=null", "numerics=bitwise", "log.every=1st",
        ]  # fmt: skip
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        done = subprocess.run(command, cwd=ROOT, env=environment | threads, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append(Run(RunDir(directory), [{"state": "finished"}]))
    assert_same(*found)
