"""Time resuming in the middle of 10^9 samples against a new run.

python -m benchmarks.far
"""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.start import LAUNCH, ROOT, seconds
from tests.faults.hostile import edit

SAMPLES, MIDDLE, GLOBAL = 10**9, 500_000_000, 32
COMMANDS = 4  # after the first command, which reads from the disk


class Far:
    """A task with 10^9 computed samples. With STOPS in the environment, its run stops at its second step."""

    def __init__(self) -> None:
        self.passes = 0

    def model(self) -> nn.Module:
        return nn.Linear(4, 1)

    def train_data(self) -> Any:
        return Computed()

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
        self.passes += 1
        if self.passes == 2 and "STOPS" in os.environ:
            os.kill(os.getpid(), signal.SIGTERM)
        return model(batch).square().sum(), len(batch)


class Computed(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((4,), index / SAMPLES)


def rows() -> list[dict[str, Any]]:
    """Time two steps in the middle of an epoch of 10^9 samples against two steps at its start, from start to exit."""
    task = ("task=custom", "task._target_=benchmarks.far.Far", "lr.peak=0.05", f"batch.global_size={GLOBAL}")
    ranks = ("device=cpu", "cluster.gpus_per_node=2")
    measured = []
    with tempfile.TemporaryDirectory() as name:
        run, begun = Path(name) / "run", Path(name) / "begun"
        command = [*LAUNCH, *task, *ranks, f"duration={MIDDLE + 2 * GLOBAL}sa", f"run.dir={begun}"]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "STOPS": "1"}
        stopped = subprocess.run(command, cwd=name, env=env, capture_output=True, text=True)
        if stopped.returncode != 75:
            raise RuntimeError(f"{' '.join(command)} didn't stop: {stopped.stderr}")
        _move_to_the_middle(begun / "checkpoints/step-00000002")
        for _ in range(COMMANDS + 1):
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(begun, run)
            resumed = seconds([*LAUNCH, *ranks, f"run.dir={run}"], name, [])
            new_run = [*LAUNCH, *task, *ranks, "duration=2st", "run.new=true"]
            measured.append((resumed, seconds(new_run, name, [])))
    resumed, new = (statistics.median(values) for values in zip(*measured[1:], strict=True))
    ratio = statistics.median(a / b for a, b in measured[1:])
    return [{"command": "2 ranks, 2 steps", "in the middle s": resumed, "from the start s": new, "ratio": ratio}]


def _move_to_the_middle(checkpoint: Path) -> None:
    step = MIDDLE // GLOBAL
    edit(checkpoint, lambda manifest: manifest.update(step=step, samples=step * GLOBAL))
    checkpoint.rename(checkpoint.with_name(f"step-{step:08d}"))


if __name__ == "__main__":
    for row in rows():
        print(row)
