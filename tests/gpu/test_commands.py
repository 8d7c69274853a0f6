"""Test real commands on the GPU: how they start, run out of memory, stop and share a GPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import needs

ROOT = Path(__file__).parents[2]
TASK = ["task=custom", "task._target_=tests.gpu.tasks.Classes", "batch.global_size=64", "lr.peak=0.05"]
SHORT = [*TASK, "duration=12st"]
ONE = ["cluster.gpus_per_node=1"]
TWO = ["cluster.gpus_per_node=2", "cluster.backend=gloo"]
DEADLINE_S = 100


def start(folder: Path, device: str, *overrides: str, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [sys.executable, *prefix, str(ROOT / "launch.py"), f"run.dir={folder}", f"device={device}", *overrides]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def train(folder: Path, device: str, *overrides: str, prefix: tuple[str, ...] = ()) -> str:
    """Return the output of a command that finishes."""
    process = start(folder, device, *overrides, prefix=prefix)
    printed, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, printed
    assert state(folder) == "finished"
    return printed


def state(folder: Path) -> str:
    return str(json.loads((folder / "outcome.json").read_text())["state"])


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == name]


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(ONE, id="one worker"),
        pytest.param(TWO, id="two workers share a GPU", marks=needs.newer_torch),
        pytest.param(["debug=true"], id="debug"),
        pytest.param([*ONE, "engine=fsdp"], id="FSDP", marks=needs.newer_torch),
        pytest.param([*ONE, "precision=bf16", "compile=true", "data.workers=2"], id="compiled"),
    ],
)
def test_a_command_trains(tmp_path: Path, device: str, more: list[str]) -> None:
    printed = train(tmp_path / "run", device, *SHORT, *more)
    assert f"({device})" in printed or more == ["debug=true"]


@needs.newer_torch
@pytest.mark.parametrize(
    "launcher",
    ["torch.distributed.run", pytest.param("accelerate.commands.launch", marks=needs.package("accelerate"))],
)
def test_other_launchers_train(tmp_path: Path, device: str, launcher: str) -> None:
    processes = ["--nproc-per-node=2"] if "torch" in launcher else ["--multi_gpu", "--num_processes=2", "--quiet"]
    train(tmp_path / "run", device, *SHORT, "cluster.backend=gloo", prefix=("-m", launcher, *processes))


@needs.newer_torch
@pytest.mark.cuda
def test_workers_are_spawned_where_cuda_is_in_use(tmp_path: Path, device: str) -> None:
    """A process that has initialised CUDA can't fork workers that use it."""
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\n"
        "from isobatch.launch import command\n"
        "if __name__ == '__main__':\n"
        "    torch.cuda.init()\n"
        "    command()\n"
    )
    words = [f"run.dir={tmp_path}/run", f"device={device}", *SHORT, *TWO]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    subprocess.run([sys.executable, str(script), *words], check=True, timeout=DEADLINE_S, cwd=ROOT, env=env)
    assert state(tmp_path / "run") == "finished"


@pytest.mark.cuda
def test_the_per_gpu_batch_is_halved_when_the_gpus_memory_runs_out(tmp_path: Path, device: str) -> None:
    hungry = ["task._target_=tests.gpu.tasks.Hungry", "+task.args.fits=16", "check.contract=false"]
    train(tmp_path / "run", device, *SHORT, *hungry, *ONE, "batch.per_gpu=32")
    (restart,) = events(tmp_path / "run", "restart")
    assert (restart["kind"], restart["per_gpu_before"], restart["per_gpu"]) == ("oom", 32, 16)


@pytest.mark.cuda
def test_the_trial_survives_a_batch_that_does_not_fit(tmp_path: Path, device: str) -> None:
    hungry = ["task._target_=tests.gpu.tasks.Hungry", "+task.args.fits=16"]
    train(tmp_path / "run", device, *SHORT, *hungry, *ONE, "batch.per_gpu=32")
    assert events(tmp_path / "run", "trial_skipped")


def test_a_signal_stops_and_the_same_command_resumes(tmp_path: Path, device: str) -> None:
    folder, command = tmp_path / "run", [*TASK, *ONE, "duration=3000st", "log.every=1st"]
    process = start(folder, device, *command)
    deadline = time.monotonic() + DEADLINE_S
    while not (folder / "metrics.jsonl").exists() or not (folder / "metrics.jsonl").stat().st_size:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 75, printed
    assert state(folder) == "stopped"
    train(folder, device, *command)
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 3001)), "each step is logged once"
