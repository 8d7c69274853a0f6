"""Test the trial of a task on a GPU. It uses CUDA in this process, which no test can fork from afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isobatch.scaling.errors import UserError
from isobatch.trainers.model.randomness import generators_kept
from isobatch.trainers.tasks.images import resnet
from isobatch.trainers.tasks.text import GPT
from isobatch.trainers.trial.training import Found
from tests.ranks import test_trial
from tests.ranks.test_trial import COUPLED, MEANS, SOUND, Recurrent, task_of

LAUNCHER = Path(__file__).parents[2] / "launch.py"
Tried = Callable[..., Found]


@pytest.fixture
def tried(device: str) -> Tried:
    """Return the function that tries a task, on the GPU."""
    return partial(test_trial.tried, device=torch.device(device, 0 if device == "cuda" else None))


@pytest.mark.parametrize("name", SOUND)
def test_valid_loss_is_accepted(tried: Tried, name: str) -> None:
    assert tried(task_of(SOUND[name])) == Found()


@pytest.mark.parametrize("name", MEANS)
def test_mean_is_rejected(tried: Tried, name: str) -> None:
    with pytest.raises(UserError, match="returns a mean"):
        tried(task_of(MEANS[name]))


@pytest.mark.parametrize("name", COUPLED)
def test_samples_that_depend_on_each_other_are_reported(tried: Tried, name: str) -> None:
    assert len(tried(task_of(COUPLED[name])).depends) == 1


class Images:
    """A convolutional network with BatchNorm, which TF32 would round."""

    def model(self) -> nn.Module:
        return resnet(3, 10, 32, 2)

    def train_data(self) -> Any:
        random = torch.Generator().manual_seed(0)
        return torch.utils.data.TensorDataset(
            torch.randn(256, 3, 64, 64, generator=random), torch.randint(10, (256,), generator=random)
        )

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


class Tokens:
    """A task with a GPT-2 of 124M parameters."""

    def model(self) -> nn.Module:
        return GPT(1024, 768, 12, 12, 0.1)

    def train_data(self) -> Any:
        random = torch.Generator().manual_seed(0)
        return torch.utils.data.TensorDataset(torch.randint(256, (64, 1025), generator=random))

    def loss(self, model: nn.Module, batch: Any) -> Any:
        (tokens,) = batch
        logits, targets = model(tokens[:, :-1]), tokens[:, 1:]
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"), targets.numel()


@pytest.mark.parametrize("task", [Images, Tokens])
@pytest.mark.cuda
def test_large_models_are_sound(tried: Tried, task: Any) -> None:
    assert tried(task(), per_gpu=16) == Found()
    torch.cuda.empty_cache()


def test_recurrent_layers_need_training_mode(tried: Tried) -> None:
    assert tried(task_of(SOUND["sum"], Recurrent)) == Found()
    with pytest.raises(UserError, match="returns a mean"):
        tried(task_of(MEANS["mean and samples"], Recurrent))


@pytest.mark.cuda
def test_nothing_remains_on_the_gpu(tried: Tried) -> None:
    with generators_kept(torch.device("cuda", 0)):
        task = task_of(SOUND["functional dropout"])
        model = task.model()
        task.model = lambda: model
        state, taken = torch.cuda.get_rng_state(), torch.cuda.memory_allocated()
        tried(task)
        assert torch.equal(torch.cuda.get_rng_state(), state)
        assert torch.cuda.memory_allocated() <= taken + (32 << 20), "cuBLAS keeps a workspace"


def command(folder: Path, *overrides: str) -> tuple[int, list[dict[str, Any]], str]:
    """Train on the GPU, and return exit code, events and output."""
    done = subprocess.run(
        [sys.executable, str(LAUNCHER), f"run.dir={folder}", "device=cuda", *overrides],
        capture_output=True, text=True, cwd=LAUNCHER.parent,
    )  # fmt: skip
    events = folder / "events.jsonl"
    lines = events.read_text().splitlines() if events.exists() else []
    return done.returncode, [json.loads(line) for line in lines], done.stdout + done.stderr


@pytest.mark.cuda
@pytest.mark.parametrize(
    "overrides",
    [
        ["task=digits", "precision=bf16", "compile=true"],
        ["task=images", "precision=fp16", "data.workers=2"],
        ["task=text", "precision=bf16", "batch.per_gpu=24", "evaluate.every=20st"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_shipped_tasks_pass(tmp_path: Path, overrides: list[str]) -> None:
    code, events, output = command(tmp_path / "run", *overrides, "duration=40st")
    assert code == 0, output
    reasons = [event.get("reason", "") for event in events if event["event"] in ("depends_on_cut", "trial_skipped")]
    assert not [reason for reason in reasons if "BatchNorm" not in reason]
