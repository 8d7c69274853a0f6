"""Test that frozen submodules which model() returns in eval mode stay in it on every engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from isobatch.trainers.engines.state import State
from isobatch.trainers.model.modes import Modes, in_eval_mode, is_norm
from isobatch.trainers.tensors.manifest import read
from isobatch.trainers.tensors.names import checkpoints
from tests.support.harness import Runs, distance
from tests.support.tasks import Counted


def block(*, frozen: bool = False) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    return model.requires_grad_(not frozen)


def model_of(**modules: nn.Module) -> nn.Module:
    model = nn.Module()
    for name, module in modules.items():
        model.add_module(name, module)
    return model


def listed() -> nn.Module:
    model = model_of(blocks=nn.ModuleList([block(), block()]), head=nn.Linear(3, 1))
    model.blocks[1][1].eval()
    return model


def with_one_module_in_train_mode() -> nn.Module:
    teacher = block(frozen=True).eval()
    teacher[2].train()
    return model_of(teacher=teacher, head=nn.Linear(3, 1))


def shared() -> nn.Module:
    norm = nn.BatchNorm1d(3).eval()
    return model_of(a=nn.Sequential(nn.Linear(3, 3), norm), b=nn.Sequential(nn.Linear(3, 3), norm))


@pytest.mark.parametrize(
    ("model", "frozen"),
    [
        (listed(), ["blocks.1.1"]),
        (model_of(norm=nn.BatchNorm1d(3, affine=False).eval(), head=nn.Linear(3, 1)), ["norm"]),
        (model_of(backbone=block(frozen=True).eval(), head=nn.Linear(3, 1)), ["backbone"]),
        (with_one_module_in_train_mode(), ["teacher"]),
        (shared(), ["a.1", "b.1"]),
        # a frozen base in train mode, as in LoRA, here with a norm
        (model_of(base=block(frozen=True), adapter=nn.Linear(3, 3)), []),
        (model_of(pretrained=block().eval(), head=nn.Linear(3, 1)), []),  # from_pretrained leaves models in eval mode
        (model_of(pretrained=block().eval()).eval(), []),
        (model_of(drop=nn.Dropout().eval(), head=nn.Linear(3, 1)), []),
        (block(frozen=True).eval(), []),
    ],
)
def test_modules_that_stay_in_eval_mode(model: nn.Module, frozen: list[str]) -> None:
    returned = {module: module.training for module in model.modules()}
    modes = Modes(model)
    assert list(modes.frozen) == frozen
    for _ in range(2):  # at the start, and after an evaluation
        modes.train()
        inside = {inner for module in modes.frozen.values() for inner in module.modules()}
        for module, training in returned.items():
            assert module.training == (training if module in inside else True)
        with in_eval_mode(model):
            assert not any(module.training for module in model.modules())
        assert all(module.training == (returned[module] if module in inside else True) for module in returned)


class Merging(nn.Linear):
    """A layer that merges an adapter into its weight for evaluations and removes it for training, like loralib."""

    merged = False

    def train(self, mode: bool = True) -> Merging:
        if self.merged == mode:
            self.weight.data += -1 if mode else 1
            self.merged = not mode
        return super().train(mode)


def test_train_of_a_module_is_called_after_an_evaluation() -> None:
    layer = Merging(2, 2)
    before = layer.weight.detach().clone()
    with in_eval_mode(nn.Sequential(layer)):
        assert layer.merged
    assert not layer.merged
    torch.testing.assert_close(layer.weight, before)


@pytest.mark.parametrize(
    ("module", "norm"),
    [
        (nn.LayerNorm([2, 3]), True),
        (nn.InstanceNorm2d(3), True),
        (nn.SyncBatchNorm(3), True),
        *((type(name, (nn.Module,), {})(), True) for name in ("LlamaRMSNorm", "LayerNorm2d", "BatchNormAct2d")),
        *((type(name, (nn.Module,), {})(), True) for name in ("T5LayerNorm", "MambaRMSNormGated", "rmsnorm")),
        *((type(name, (nn.Module,), {})(), True) for name in ("BatchNormalization", "LayerNormalisation")),
        (type("Scaled", (type("ScaleNorm", (nn.Module,), {}),), {})(), True),
        (type("Own", (nn.GroupNorm,), {})(1, 2), True),
        *((type(name, (nn.Module,), {})(), False) for name in ("NormalizedLinear", "PreNormBlock", "WeightNormConv")),
        (type("CosineNorm", (nn.Linear,), {})(1, 1), False),
        (nn.Linear(1, 1), False),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_normalisation_layers_are_recognised(module: nn.Module, norm: bool) -> None:
    assert is_norm(module) is norm


class Distilled(Counted):
    """A task whose student has a frozen and a trained BatchNorm. Its teacher has running statistics and dropout."""

    def model(self) -> nn.Module:
        return Student(self.width)

    def train_data(self) -> Any:
        return TensorDataset(self.inputs * 3 + 1, self.targets, self.units)


class Student(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.teacher = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 7), nn.Dropout(0.5)).requires_grad_(False).eval()
        self.linear, self.frozen, self.norm = nn.Linear(8, width), nn.BatchNorm1d(width), nn.BatchNorm1d(width)
        self.frozen.running_mean = torch.arange(float(width))
        self.frozen.eval().requires_grad_(False)
        self.head = nn.Linear(width, 7)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.norm(self.frozen(self.linear(inputs)))) - self.teacher(inputs)


DISTILLED = (
    "task=custom", "task._target_=tests.ranks.test_modes.Distilled", "batch.global_size=24", "batch.per_gpu=8",
    "duration=8st", "lr.peak=0.02", "evaluate.every=3st", "ema=100sa", "batchnorm.mode=ghost", "batchnorm.ghost_size=4",
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return Runs(tmp_path_factory.mktemp("whole"))(1, *DISTILLED)


def test_frozen_modules_do_not_change(whole: Any) -> None:
    """The run has evaluations in between. The average has no copy of frozen modules, and final/ is complete."""
    torch.manual_seed(0)
    first, final, average = Distilled().model().state_dict(), whole.weights(), whole.weights("ema.safetensors")
    frozen = [name for name in first if name.startswith(("teacher.", "frozen."))]
    for name in frozen:
        assert torch.equal(first[name], final[name]), name
        assert torch.equal(first[name], average[name]), name
    assert final["norm.num_batches_tracked"] == 8
    assert not torch.equal(final["linear.weight"], average["linear.weight"])
    [event] = [event for event in whole.events() if event["event"] == "frozen"]
    assert event["eval_mode"] == ["teacher", "frozen"]
    saved = {name for name in read(checkpoints(whole.run)[0]).tensors if name.startswith("ema/")}
    assert saved == {f"ema/{name}" for name in ("linear.weight", "linear.bias", "norm.weight", "norm.bias", "head.weight", "head.bias")}  # fmt: skip # noqa: E501


@pytest.mark.parametrize("engine", ["engine=ddp", "engine=fsdp", "engine=deepspeed engine.stage=1", "engine=deepspeed engine.stage=3"])  # fmt: skip # noqa: E501
def test_frozen_modules_are_the_same_on_other_ranks_and_engines_and_after_a_stop(
    runs: Runs, whole: Any, engine: str
) -> None:
    overrides = (*DISTILLED, *engine.split())
    run = runs(2, *overrides, resume=runs(3, *overrides, "batch.per_gpu=4", stop_at=4))
    assert run.ends[0]["state"] == "finished", run.ends
    for file in ("model.safetensors", "ema.safetensors"):
        assert distance(whole.weights(file), run.weights(file)) < 1e-5  # ghosts of 4 amplify rounding


def test_checkpoint_with_an_average_of_frozen_parameters_resumes(
    runs: Runs, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier versions saved such checkpoints."""
    with monkeypatch.context() as older:
        older.setattr(State, "_trained", lambda self: dict(self._model.named_parameters()))
        run = runs(1, *DISTILLED, stop_at=4)
    assert "ema/teacher.1.weight" in read(checkpoints(run.run)[0]).tensors
    run = runs(1, *DISTILLED, resume=run)
    assert run.ends[0]["state"] == "finished", run.ends
    assert distance(whole.weights("ema.safetensors"), run.weights("ema.safetensors")) == 0


def test_frozen_batchnorm_is_not_reported_as_dependent_on_the_cut(runs: Runs) -> None:
    plain = [text for text in DISTILLED if not text.startswith("batchnorm")]
    events = runs(1, *plain, "duration=1st").events()
    assert [e["reason"].partition(" ")[0] for e in events if e["event"] == "depends_on_cut"] == ["1"]
