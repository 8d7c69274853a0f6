"""Test that today's launcher resumes a run directory of commit f0a1b05, which is in tests/data."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from isobatch.conf.rundir.directory import RunDir
from tests.launch.test_command_line import launch

OLD = Path(__file__).parents[1] / "data" / "f0a1b05"
NAME = "digits-da51d6fd3c73"
# The command that created it. SIGTERM stopped the run after step 69 of 180.
COMMAND = [
    "task.args.width=16",
    "batch.global_size=64",
    "duration=8ep",
    "cluster.gpus_per_node=2",
    "device=cpu",
    "optimizer.momentum=0.8",
    "noise.every=30st",
    "ema=1ep",
    "checkpoint.best=val/accuracy:max",
    "checkpoint.keep=1",
    "clip_norm=2.0",
]
# The processor that wrote the checkpoint may round differently, and 111 steps amplify the difference. A momentum,
# average, position or learning rate that wasn't restored causes a far larger one.
ROUNDING = 1e-3
METRICS = ("epoch", "loss", "lr", "grad_norm", "global_size", "skipped", "val/", "ema/")


def measured(run: Path, names: tuple[str, ...] = METRICS) -> dict[int, dict[str, Any]]:
    """Return the values of each step in metrics.jsonl that f0a1b05 also logged, without measured times."""
    values: dict[int, dict[str, Any]] = {}
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        known = {name: value for name, value in line.items() if name.startswith(names) and value is not None}
        values.setdefault(line["step"], {}).update(known)
    return values


@pytest.mark.parametrize("command", [COMMAND, [f"run.dir=runs/{NAME}"]])
def test_a_run_of_f0a1b05_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: Path, command: list[str]
) -> None:
    run = tmp_path / "runs" / NAME
    shutil.copytree(OLD, tmp_path / "runs", symlinks=True)
    before, noise = measured(run), measured(run, ("noise/",))
    monkeypatch.chdir(tmp_path)
    launch(*command)
    assert os.listdir("runs") == [NAME] == os.listdir(uninterrupted.parent)
    outcome = RunDir(run).outcome()
    assert outcome is not None
    assert (outcome.state, outcome.step) == ("finished", 180)
    assert sorted(path.name for path in (run / "checkpoints").iterdir() if path.name != "best") == sorted(
        {"step-00000180", os.readlink(run / "checkpoints" / "best")}
    )
    ours, theirs = measured(run), measured(uninterrupted)
    assert {step: measured(run)[step] for step in before} == before
    assert ours.keys() == theirs.keys()
    resumed_at = min(step for step, values in theirs.items() if step > max(before) and "loss" in values)
    # the averages of the noise are kept until the next measurement, after step 90
    assert measured(run, ("noise/",))[resumed_at] == noise[max(step for step in noise if noise[step])] != {}
    for values in [lines[step] for lines in (ours, theirs) for step in lines if step <= resumed_at]:
        values.pop("loss", None)  # f0a1b05 logged the loss of one step, not the average since the last line
    for step, values in theirs.items():
        assert ours[step] == pytest.approx(values, rel=ROUNDING, abs=ROUNDING), step
    for file in ("model.safetensors", "ema.safetensors"):
        weights, expected = load_file(run / "final" / file), load_file(uninterrupted / "final" / file)
        assert weights.keys() == expected.keys()
        for name, tensor in expected.items():
            assert weights[name] == pytest.approx(tensor, rel=ROUNDING, abs=ROUNDING), name


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train the same run from start to end with today's launcher, and return its folder."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    with chdir(folder):
        launch(*COMMAND)
    return folder / "runs" / NAME
