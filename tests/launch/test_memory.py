"""Test action=plan plan.memory=true and batch.per_gpu=auto as commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launch.test_command_line import _elsewhere, launch  # noqa: F401  a fixture

QUICK = ("task=digits", "optimizer=adamw", "duration=2st", "evaluate.every=null", "device=cpu")
DYING = """
import os, signal
import torch
from isobatch.trainers.tasks.digits import Digits

class Task(Digits):
    def __init__(self):
        super().__init__(8, 1, 0.0)

    def loss(self, model, batch):
        if len(batch[0]) > 40 and type(batch[0]) is torch.Tensor:  # not a fake one of the estimate
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(model, batch)
"""


def test_a_plan_shows_the_memory_of_gpus_that_arent_here() -> None:
    options = ("action=plan", "plan.memory=true", *QUICK[:2])
    ended = launch(*options, "cluster.gpu_memory_gb=1", "output=json")
    found = json.loads(ended.stdout)["memory"]
    assert found["limit_gb"] == 1
    assert found["per_gpu"] > 64
    assert found["optimizer_gb"] == pytest.approx(2 * found["parameters_gb"], rel=0.01)
    most = {way["change"].split(" cluster")[0]: way["per_gpu"] for way in found["ways"]}
    assert {"precision=bf16", "optimizer=adafactor", "engine=fsdp", "engine=deepspeed engine.stage=3"} <= most.keys()
    assert most["precision=bf16"] > found["per_gpu"]
    planned = {way["planned"] for way in found["ways"] if "cluster.gpus_per_node=8" in way["change"]}
    assert planned == {64 // 8}


def test_a_limit_below_the_model_is_rejected() -> None:
    ended = launch("action=plan", "plan.memory=true", "task=digits", "cluster.gpu_memory_gb=0.0001", code=2)
    assert "cluster.gpu_memory_gb leaves 0.1 MB to a rank, but weights" in ended.stderr


def test_an_absurd_limit_is_rejected() -> None:
    ended = launch("action=plan", "plan.memory=true", "task=digits", "cluster.gpu_memory_gb=1e9", code=2)
    assert "cluster.gpu_memory_gb=1e+09" in ended.stderr


def test_a_size_in_which_the_process_was_killed_twice_is_not_run_again() -> None:
    Path("dying.py").write_text(DYING)
    own = ("task=custom", "task._target_=dying.Task", "lr.peak=0.1", *QUICK[2:], "cluster.max_restarts=1")
    command = (*own, "batch.per_gpu=auto", "run.dir=run", "check.contract=false")
    ended = launch(*command, code=1)
    assert "killed by SIGKILL" in ended.stderr
    ended = launch(*command)
    stored = json.loads(Path("run/tune/tune.json").read_text())["memory"]
    (lost,) = (probe for probe in stored["probes"] if probe["peak_gb"] is None)
    assert lost["per_gpu"] == 64
    assert "ended twice" in lost["why"]
    assert stored["per_gpu"] == 32
    assert "per-GPU batch 32" in ended.stdout
    assert "64 samples counted as too large, since the process ended twice" in ended.stdout
    plan = json.loads(Path("run/plan.json").read_text())
    assert (plan["per_gpu"], plan["accumulation"]) == (32, 2)
    assert not Path("run/tune/probing.json").exists()
