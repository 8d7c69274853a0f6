"""Test how lower precision, recomputed activations and compilation change a run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

from isobatch.conf.compose import compose
from isobatch.scaling.errors import UserError
from isobatch.scaling.planning.resolve import resolve
from isobatch.trainers.engines.ddp import DDP
from isobatch.trainers.engines.engine import Engine
from isobatch.trainers.engines.reducer import Parts
from isobatch.trainers.engines.step_report import Note
from isobatch.trainers.model.build import prepare, recompute
from isobatch.trainers.model.precision import LossScale
from isobatch.trainers.model.randomness import Stream
from isobatch.trainers.optim.make import make_optimizer
from isobatch.trainers.ranks.failure import RunFailed
from isobatch.trainers.ranks.world import World
from isobatch.trainers.tasks.task import Task
from tests.ranks.test_batchnorm import largest_distance
from tests.support.harness import ROUNDING, Runs, distance
from tests.support.tasks import Counted

ALONE = World(0, 1, 0, 1, torch.device("cpu"), None)
PLAIN = ("task=custom", "task._target_=tests.support.tasks.Counted", "batch.global_size=24", "duration=2st")
BLOCKS = (
    "task=custom", "task._target_=tests.ranks.test_precision.Blocks", "batch.global_size=24", "duration=8st",
    "lr.peak=0.05", "evaluate.every=null", "log.every=1st", "batchnorm.mode=ghost", "batchnorm.ghost_size=12",
)  # fmt: skip


class Blocks(Counted):
    """A task with a stack of blocks with dropout and BatchNorm, in ``dtype``."""

    def __init__(self, dtype: str = "float32", blocks: int = 4) -> None:
        super().__init__()
        self.dtype, self.blocks = getattr(torch, dtype), blocks

    def model(self) -> nn.Module:
        return Stack(self.width, self.blocks).to(self.dtype)

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        inputs, targets, units = batch
        return super().loss(model, (inputs.to(self.dtype), targets, units))


class Stack(nn.Module):
    def __init__(self, width: int, blocks: int = 4) -> None:
        super().__init__()
        self.inward, self.outward = nn.Linear(8, width), nn.Linear(width, 7)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Dropout(0.2), nn.Tanh())
            for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.inward(x)
        for block in (*self.blocks, self.blocks[0]):
            x = x + block(x)
        return self.outward(x).float()  # type: ignore[no-any-return]


def test_recomputing_changes_no_weight_and_no_statistics(runs: Runs) -> None:
    """A block is called twice. It has two masks, and its statistics count once."""
    recomputed = "recompute=[blocks.*]"
    plain = runs(1, *BLOCKS)
    assert largest_distance(plain, runs(1, *BLOCKS, recomputed)) < ROUNDING
    assert largest_distance(plain, runs(2, *BLOCKS, recomputed)) < ROUNDING


def test_recomputing_saves_memory() -> None:
    """Each block keeps only its input, which is at most a fifth of the bytes."""

    def bytes_kept(patterns: list[str]) -> int:
        model, bytes_of = Stack(64), dict[int, int]()
        recompute(model, patterns)

        def note(tensor: Tensor) -> Tensor:
            bytes_of[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(torch.randn(1000, 8))
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        return sum(size for data, size in bytes_of.items() if data not in weights)

    assert bytes_kept(["blocks.*"]) < 0.4 * bytes_kept([])


def test_recompute_takes_the_outermost_matching_modules() -> None:
    model = Stack(4)
    recompute(model, ["blocks.*", "*ward"])
    assert {name for name, module in model.named_modules() if "forward" in vars(module)} == {
        "inward", "outward", "blocks.0", "blocks.1", "blocks.2", "blocks.3",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("pattern", "near"), [("block.*", "blocks.*"), ("blocks", "blocks.*"), ("outwards", "outward")]
)
def test_recompute_without_a_match_is_rejected(pattern: str, near: str) -> None:
    with pytest.raises(UserError, match=f"recompute={pattern!r} matches no module.*{near}".replace("'", "")):
        recompute(Stack(4), [pattern])


def test_bf16_is_the_same_on_all_cuts(runs: Runs) -> None:
    """Each pass rounds its gradient to 8 bits, so after 20 steps cuts differ by up to 2e-3, and fp32 by up to 1e-2."""
    counted = ("task=custom", "task._target_=tests.support.tasks.Counted", "batch.global_size=24", "duration=20st")
    fp32, bf16 = (runs(1, *counted, "lr.peak=0.05", f"precision={precision}") for precision in ("fp32", "bf16"))
    assert {weight.dtype for weight in bf16.weights().values()} == {torch.float32}
    assert 1e-4 < distance(fp32.weights(), bf16.weights()) < 1e-2
    parts = runs(3, *counted, "lr.peak=0.05", "precision=bf16", "batch.per_gpu=3")
    assert distance(bf16.weights(), parts.weights()) < 2e-3
    assert parts.metrics()[-1]["val/loss"] == pytest.approx(bf16.metrics()[-1]["val/loss"], rel=1e-3)


def test_model_with_bf16_weights_keeps_its_dtype(runs: Runs) -> None:
    """The sum of its losses is in fp32."""
    run = runs(2, *BLOCKS, "task.args.dtype=bfloat16")
    assert run.weights()["inward.weight"].dtype == torch.bfloat16
    assert run.losses()[0] == pytest.approx(runs(1, *BLOCKS).losses()[0], rel=0.02)
    assert run.losses()[-1] < run.losses()[0]


def test_fp16_needs_cuda(runs: Runs) -> None:
    end = runs(1, *BLOCKS, "precision=fp16").ends[0]
    assert end["raised"] == "UserError"
    assert end["message"].startswith("precision=fp16 needs CUDA, but this runs on cpu; use precision=bf16")


def fp16_engine(**options: Any) -> tuple[Engine, Any]:
    """Return an engine, and a function that takes a step with the loss multiplied by its argument."""
    config = compose([*BLOCKS, "batchnorm.mode=null", "batchnorm.ghost_size=null"])
    task, plan = Counted(dropout=0), resolve(config, 1, 500)
    torch.manual_seed(0)
    model, task = task.model(), Task(task)
    parts = Parts(model, ALONE, lambda: make_optimizer(config, task, model, plan.peak))
    engine = Engine(task, parts, DDP(parts, {}), **options)

    def step(factor: float = 1.0) -> Any:
        loss, units, _ = engine.loss([tensor[:24] for tensor in task.train_data().tensors], 24)
        engine.backward(loss / 24 * factor, Note(loss, units, 24))
        return engine.update(engine.total(24).scale(24), 1.0, plan.peak)

    return engine, step


def test_loss_scale_changes_only_rounding() -> None:
    (plain, step), (scaled, scaled_step) = fp16_engine(), fp16_engine(precision="fp16")
    for _ in range(5):
        assert scaled_step().grad_norm == pytest.approx(step().grad_norm, rel=1e-2)
    assert distance(plain.model.state_dict(), scaled.model.state_dict()) < 1e-2
    assert scaled.layout()["precision/loss_scale"] == (torch.float64, (2,))


def test_overflow_halves_the_loss_scale_and_changes_no_weight() -> None:
    engine, step = fp16_engine(precision="fp16")
    before = {name: weight.clone() for name, weight in engine.model.state_dict().items()}
    assert step(math.inf).skipped

    def scale() -> Any:
        return next(piece.data.tolist() for piece in engine.slices() if piece.name == "precision/loss_scale")

    assert scale() == [2**15, 0]
    assert all(torch.equal(weight, before[name]) for name, weight in engine.model.state_dict().items())
    assert not step().skipped
    assert scale() == [2**15, 1]
    for _ in range(15):
        step(math.nan)
    with pytest.raises(RunFailed, match="lowest, 1: try precision=bf16"):
        step(math.nan)


def test_loss_scale_is_doubled_after_2000_steps() -> None:
    scale = LossScale()
    for _ in range(1999):
        scale.kept()
    assert scale.state.tolist() == [2**16, 1999]
    scale.kept()
    assert scale.state.tolist() == [2**17, 0]


@pytest.fixture
def graphs() -> Iterator[list[str]]:
    """Return the list of traced graphs. They aren't compiled to C++, which would take half a minute."""
    found: list[str] = []
    torch._dynamo.reset()  # earlier compilations decide which sizes are dynamic

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        found.append(graph.code)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch.compiler.set_default_backend(backend)
    yield found
    torch.compiler.set_default_backend(None)


def test_sequential_is_compiled_as_a_whole(graphs: list[str]) -> None:
    stream = Stream(0, ALONE.device)
    model = prepare(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), compose([*BLOCKS, "compile=true"]), stream, 1)
    stream.start(0, 12)
    model(torch.ones(12, 4)).sum().backward()
    assert [("linear" in code, "mask_keys" in code) for code in graphs] == [(True, True)]
    assert model.state_dict().keys() == {"0.weight", "0.bias"}


@pytest.mark.parametrize("mode", ["batchnorm.mode=null", "batchnorm.mode=ghost batchnorm.ghost_size=4"])
def test_other_numbers_of_samples_are_compiled_once(graphs: list[str], mode: str) -> None:
    """The first number, all other numbers, and a single sample are compiled once each. Masks equal eager ones."""

    def made(compiled: bool) -> tuple[nn.Module, Stream]:
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(4) if "ghost" in mode else nn.Identity()
        tokens = nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Flatten(0, 1), nn.Dropout(0.3), nn.Unflatten(0, (-1, 2)))
        channels = nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Dropout1d(0.3), nn.Flatten())
        parts = (nn.Linear(4, 4), norm, nn.Dropout(0.5), tokens, nn.Flatten(), channels)
        stream = Stream(0, ALONE.device)
        return prepare(
            nn.Sequential(*parts), compose([*PLAIN, f"compile={compiled}", *mode.split()]), stream, 1
        ), stream

    pairs, counted = [made(compiled) for compiled in (True, False)], []
    for samples in (8, 12, 20, 4, *((1,) if "null" in mode else ())):
        outputs = []
        for model, stream in pairs:
            stream.start(100, 100 + samples)
            outputs.append(model(torch.linspace(0, 1, samples * 4).view(samples, 4)))
        torch.testing.assert_close(*outputs)
        counted.append(len(graphs))
    assert counted[3] == counted[1] <= (4 if "ghost" in mode else 2)  # ghost norms split the graph in two
    assert "ghost" in mode or counted == [1, 2, 2, 2, 3]


@pytest.mark.usefixtures("graphs")
def test_compiled_model_is_the_same_run(runs: Runs) -> None:
    """Compare weights, statistics and names with dropout, BatchNorm, a recomputed block and uneven passes."""
    uneven = (*BLOCKS, "batch.global_size=36", "duration=2st", "task.args.blocks=2")
    compiled = runs(1, *uneven, "compile=true", "recompute=[blocks.1]", "batch.per_gpu=24")
    assert largest_distance(runs(1, *uneven), compiled) < ROUNDING
    assert not [event for event in compiled.events() if event["event"] == "depends_on_cut"]


def test_compiling_without_a_compiler_is_rejected(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    end = runs(1, *BLOCKS, "compile=true").ends[0]
    assert end["message"].startswith("compile=true needs the compiler no-such-compiler, which isn't installed")
