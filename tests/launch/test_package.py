"""Test that ``pip install .`` installs only ``isobatch``, which works beside a user's own ``conf`` and ``trainers``."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("conf", "isobatch", "scaling", "slurm", "trainers", "launch.py", "pyproject.toml", "README.md", "LICENSE")
USERS = ("conf", "scaling", "slurm", "tests", "trainers")  # packages that a user's project may have

TASK = """
import torch
from torch.utils.data import TensorDataset

import conf, scaling, slurm, tests, trainers
import launch

MINE = [module.MINE for module in (conf, scaling, slurm, tests, trainers, launch)]


class Task:
    def __init__(self, width=4):
        self.width = width

    def model(self):
        return torch.nn.Sequential(torch.nn.Linear(2, self.width), torch.nn.Linear(self.width, 1))

    def train_data(self):
        inputs = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
        return TensorDataset(inputs, inputs.sum(1, keepdim=True))

    def loss(self, model, batch):
        inputs, targets = batch
        return ((model(inputs) - targets) ** 2).mean(1)
"""
YAML = "defaults: [custom, _self_]\nname: beside\n_target_: trainers.beside.Task\n"
QUICK = ("duration=2st", "batch.global_size=16", "lr.peak=0.1", "device=cpu")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel like ``pip install .``, from an sdist and without network."""
    source = tmp_path_factory.mktemp("source")
    for name in PARTS:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name, **({"symlinks": True} if (ROOT / name).is_dir() else {}))
    build = "from setuptools import build_meta as b; print(b.build_sdist('out'))"
    _done([sys.executable, "-c", build], source)
    (sdist,) = (source / "out").glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir=out", str(sdist)]
    _done(pip, source)
    (built,) = (source / "out").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("installed")
    _done([sys.executable, "-m", "pip", "install", "--no-deps", f"--target={place}", str(wheel)], place)
    return place


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Create a user's folder: packages named like ours, a task in one of them, and a YAML that names the task."""
    for name in USERS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"MINE = {name!r}\n")
    (tmp_path / "launch.py").write_text("MINE = 'launch'\n")
    (tmp_path / "trainers/beside.py").write_text(TASK)
    (tmp_path / "configs/task").mkdir(parents=True)
    (tmp_path / "configs/task/beside.yaml").write_text(YAML)
    return tmp_path


def _done(command: list[str], folder: Path, **env: str) -> str:
    done = subprocess.run(command, cwd=folder, env={**os.environ, **env}, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _use(installed: Path, command: list[str], folder: Path) -> str:
    path = f"{installed / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return _done(command, folder, PYTHONPATH=str(installed), PATH=path)


def test_the_wheel_has_every_file_and_no_other_package(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    kinds = {".c", ".html", ".js", ".py", ".sbatch", ".yaml"}
    ours = [path for top in PARTS[:5] for path in (ROOT / top).rglob("*") if path.suffix in kinds and path.is_file()]
    expected = {str(path.relative_to(ROOT)) for path in ours if "__pycache__" not in path.parts}
    assert names == {name if name.startswith("isobatch/") else f"isobatch/{name}" for name in expected} | {
        "isobatch/launch.py"
    }


LAUNCHES = {
    "isobatch": ["isobatch"],
    "python -m isobatch.launch": [sys.executable, "-m", "isobatch.launch"],
    "python site-packages/isobatch/launch.py": [sys.executable, "{installed}/isobatch/launch.py"],
    "torchrun": [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *("-m", "isobatch.launch"),
    ],
}


@pytest.mark.parametrize("command", LAUNCHES)
def test_commands_work_beside_the_users_packages(command: str, installed: Path, project: Path) -> None:
    """Each command starts two processes in the user's folder, with our own agent or with torchrun."""
    words = [word.format(installed=installed) for word in LAUNCHES[command]]
    two = () if command == "torchrun" else ("cluster.gpus_per_node=2",)
    out = _use(installed, [*words, "task=custom", "task._target_=trainers.beside.Task", *QUICK, *two], project)
    assert "training on 2 ranks" in out
    assert "finished after 2 steps" in out
    (run,) = (project / "runs").iterdir()
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    sources = set().union(*(event["files"] for event in events if event["event"] == "source"))
    assert sources == {"trainers/beside.py", "launch.py", *(f"{name}/__init__.py" for name in USERS)}
    assert next(event for event in events if event["event"] == "start")["commit"] == ""


@pytest.mark.parametrize("place", ["installed", "clone"])
def test_a_task_beside_the_config_dir_is_found(place: str, installed: Path, project: Path, tmp_path: Path) -> None:
    """The parent of ``--config-dir`` is importable from any folder, and comes before a clone's own folders."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    words = ["isobatch"] if place == "installed" else [sys.executable, str(ROOT / "launch.py")]
    command = [*words, "--config-dir", str(project / "configs"), "task=beside", *QUICK]
    out = _use(installed, [*command, "cluster.gpus_per_node=2"], elsewhere)
    assert "finished after 2 steps" in out
    assert (elsewhere / "runs").is_dir()


def test_the_package_has_help_and_shipped_tasks(installed: Path, tmp_path: Path) -> None:
    """The package contains the YAML, and a shipped task's file has the same hash as in a clone."""
    assert "lr.base_batch" in _use(installed, ["isobatch", "--help"], tmp_path)
    assert "optimizer      lars" in _use(installed, ["isobatch", "action=plan", "optimizer=lars"], tmp_path)
    quick = ("duration=1st", "device=cpu", "cluster.gpus_per_node=1", "evaluate.every=null", "evaluate.last=false")
    _use(installed, ["isobatch", "task=digits", *quick, "run.dir=one"], tmp_path)
    events = [json.loads(line) for line in (tmp_path / "one/events.jsonl").read_text().splitlines()]
    assert [list(event["files"]) for event in events if event["event"] == "source"] == [["trainers/tasks/digits.py"]]
    again = _done([sys.executable, str(ROOT / "launch.py"), "run.dir=one", "duration=2st"], tmp_path)
    assert "changed since" not in again


def test_a_job_starts_the_installed_launcher(installed: Path, tmp_path: Path) -> None:
    dry = ("cluster=slurm", "cluster.gpus_per_node=1", "cluster.dry_run=true")
    script = _use(installed, ["isobatch", *dry], tmp_path)
    assert set(re.findall(r"\S+/launch\.py", script)) == {str(installed / "isobatch/launch.py")}


@pytest.mark.parametrize("name", ["conf", "scaling", "slurm", "trainers"])
def test_importing_a_bare_folder_name_names_the_fix(name: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: {name} is a folder of Isobatch; import it as isobatch.{name}"
    )
