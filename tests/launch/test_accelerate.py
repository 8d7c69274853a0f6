"""Test `accelerate launch launch.py`, with a config file of Accelerate's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.soak import LAUNCH
from benchmarks.start import BIN
from isobatch.conf.compose import compose
from isobatch.conf.hardware import workers_here
from tests.launch.test_workers import BASE, LONG, Run, folder  # noqa: F401  a fixture

CONFIG = """
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
num_machines: 1
num_processes: 2
mixed_precision: 'no'
main_process_port: 0
"""
ONE_PROCESS = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "True"}  # the variables of a single process


def test_its_processes_are_workers_like_torchruns(folder: Path) -> None:  # noqa: F811
    """The config file gives their number, and a stop exits with 0."""
    config = folder / "accelerate.yaml"
    config.write_text(CONFIG)
    command = [str(BIN / "accelerate"), "launch", "--config_file", str(config), str(LAUNCH), "engine=accelerate"]
    run = Run(folder, [*command, *BASE, "task.args.fault=SIGTERM", *LONG])
    assert run.end() == 0, run.err
    assert "training on 2 ranks (cpu)" in run.out
    assert (run.outcome["state"], run.outcome["step"]) == ("stopped", 3)


def test_several_processes_on_the_cpu_are_refused(folder: Path) -> None:  # noqa: F811
    """Accelerate would start only one."""
    several = ONE_PROCESS | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    run = Run(folder, [sys.executable, str(LAUNCH), "engine=accelerate", *BASE], **several)
    assert run.end() == 2
    assert run.messages[0].startswith("isobatch: accelerate launch was asked for several processes on the CPU")
    assert not run.dir.exists()


def test_a_single_process_takes_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes one of several visible GPUs, unless cluster.gpus_per_node gives another number."""
    monkeypatch.setattr("isobatch.conf.hardware.visible_gpus", lambda env: 8)
    assert workers_here(compose(["engine=accelerate"])) == 8
    for name, value in ONE_PROCESS.items():
        monkeypatch.setitem(os.environ, name, value)
    assert workers_here(compose(["engine=accelerate"])) == 1
    assert workers_here(compose(["engine=accelerate", "cluster.gpus_per_node=4"])) == 4
    assert workers_here(compose([])) == 8


ENGINES = """
import os, torch, isobatch.trainers.run
from isobatch.conf.compose import compose
from isobatch.trainers.engines.make import import_engine
for engine in ("ddp", "fsdp", "accelerate", "deepspeed"):
    import_engine(compose([f"engine={engine}"]))
names = [open(f"/proc/self/task/{thread}/comm").read() for thread in os.listdir("/proc/self/task")]
# pyarrow's, which DeepSpeed imports if MLflow is installed; it survives a fork
print(sum("jemalloc" not in name for name in names), torch.cuda.is_initialized())
"""


def test_a_process_that_has_imported_the_engines_can_be_forked() -> None:
    found = subprocess.run([sys.executable, "-c", ENGINES], capture_output=True, text=True, cwd=LAUNCH.parent)
    assert found.stdout.split() == ["1", "False"], found
