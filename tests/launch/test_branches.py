"""Test ranks that run different modules, which ends in an abort or a hang: the cause still names the modules."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.test_workers import folder, launch  # noqa: F401  a fixture

TASK = '''
import torch
from torch import nn
from torch.utils.data import TensorDataset


class Net(nn.Module):
    """Two blocks of different or equal sizes. One rank runs the first, the other runs the second or both."""

    def __init__(self, both, width):
        super().__init__()
        self.both = both
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, n), nn.Linear(n, 4)) for n in (6, width))

    def forward(self, inputs, flags):
        one, two = self.blocks
        if flags.any():
            return one(inputs)
        return two(one(inputs)) if self.both else two(inputs)


class Task:
    def __init__(self, both=False, width=6):
        self.both, self.width = both, width

    def model(self):
        return Net(self.both, self.width)

    def train_data(self):
        return TensorDataset(torch.ones(2, 4), torch.tensor([True, False]))

    def loss(self, model, batch):
        return model(*batch).sum(), len(batch[0])
'''


@pytest.mark.parametrize(
    "options",
    [
        ("engine=fsdp", "task.args.width=60"),
        ("engine=fsdp", "task.args.both=true"),
        ("engine=deepspeed", "engine.stage=3", "task.args.both=true"),
    ],
)
def test_different_modules_are_named(folder: Path, options: tuple[str, ...]) -> None:  # noqa: F811
    """A waiting rank compares its trail with the other rank's long before cluster.timeout_s, 600 s."""
    (folder / "branches.py").write_text(TASK)
    run = launch(folder, "task._target_=branches.Task", "batch.global_size=2", "cluster.max_restarts=1", *options)
    assert run.end() == 2, run.err
    assert run.outcome["state"] == "refused"
    assert (run.outcome["step"], run.events("restart")) == (0, [])
    assert "the ranks ran different modules" in run.outcome["cause"]
    assert "blocks.1" in run.outcome["cause"]
    assert run.messages == [f"isobatch: {run.outcome['cause']}"]
