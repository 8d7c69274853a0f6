"""Test that the host never waits for the GPU within a step, by torch's debug mode that raises where it would."""

from __future__ import annotations

import pytest

from tests.gpu import needs
from tests.support.harness import Runs

TASK = (
    "task=custom", "task._target_=tests.gpu.tasks.NeverWaits", "batch.global_size=32", "duration=12st", "lr.peak=0.01",
    "log.every=1000st", "evaluate.every=null",
)  # fmt: skip
FEATURES = {
    **{name: (f"optimizer={name}",) for name in ("sgd", "adamw", "lamb", "lars", "muon")},
    "clipping and average": ("clip_norm=0.5", "ema=64sa"),
    "noise": ("noise.every=1st", "batch.per_gpu=16"),
    "bf16": ("precision=bf16",),
    "ghosts": ("batchnorm.mode=ghost", "batchnorm.ghost_size=8"),
    "recomputed": ("recompute=['1']",),
    "compiled": ("compile=true",),
    "workers": ("data.workers=2",),
    "checkpoints": ("checkpoint.every=2st",),
}


@pytest.mark.parametrize("feature", [*FEATURES, pytest.param("FSDP", marks=needs.newer_torch)])
def test_a_step_waits_for_nothing(runs: Runs, feature: str) -> None:
    end = runs(1, *TASK, *FEATURES.get(feature, ("engine=fsdp",))).ends[0]
    assert end.get("state") == "finished", end


@pytest.mark.cuda
def test_a_loss_that_waits_is_noticed(runs: Runs) -> None:
    end = runs(1, *TASK, "task._target_=tests.gpu.tasks.Waits").ends[0]
    assert "synchroniz" in str(end)
