"""The README says nothing that isn't so: its commands are run, its output is compared, its links and tree exist."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from isobatch.conf.help import EXAMPLES
from tests.support.harness import free_port
from tests.support.warm import Warm

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.partition("  #")[0].strip() for kind, block in BLOCKS if kind == "bash" for line in block.strip().splitlines()
]
LAUNCHES = [command for command in COMMANDS if "launch.py" in command]

OF_HELP = [  # but for the README's own, and those of a run directory, which isn't there (see test_command_line.py)
    command
    for line in EXAMPLES.splitlines()
    if line.startswith(("  python", "  torchrun")) and "0123456789ab" not in line
    if (command := line.strip().partition("   ")[0]) not in LAUNCHES
]


SAID = ("Isobatch plan", '"global_size"', "batch.global_size", "val/accuracy", "#SBATCH", "no runs in runs")

FINISHED = "runs/digits-814799feb745"  # what the default command leaves


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    _, err = run("python launch.py evaluate.every=null", folder).communicate(timeout=120)
    assert (folder / FINISHED / "final").exists(), err
    return folder / FINISHED


def run(command: str, folder: Path, cold: bool = False) -> Warm | subprocess.Popen[str]:
    """Start a README's command in a folder that has the checkout's launch.py and the README's own task.

    ``cold``: by a shell in any case, and not in a process that has torch already.
    """
    (folder / "launch.py").unlink(missing_ok=True)
    (folder / "launch.py").symlink_to(ROOT / "launch.py")
    task = next(block for kind, block in BLOCKS if kind == "python")
    (folder / re.findall(r"# (\w+\.py)", task)[0]).write_text(task)
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    if command.startswith("python launch.py") and not cold:
        return Warm(shlex.split(command)[2:], folder, env)
    pipe = subprocess.PIPE
    return subprocess.Popen(command, shell=True, cwd=folder, env=env, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.parametrize("command", LAUNCHES)
def test_commands(command: str, tmp_path: Path, finished: Path) -> None:
    starts = 1
    if FINISHED in command:
        shutil.copytree(finished, tmp_path / FINISHED)
    if "rendezvous" in command:  # two machines on this one, with a process each
        starts, command = 2, command.replace("node-1:29500", f"127.0.0.1:{free_port()}").replace("node=8", "node=1")
    # As it stands, but for an epoch: what it trains to is another test's business; and Slurm is tests/cluster's.
    command = command if "duration" in command or "action=" in command else f"{command} duration=1ep"
    command = f"{command} cluster.dry_run=true" if "slurm" in command else command
    processes = [run(command, tmp_path) for _ in range(starts)]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert any(said in out for said in SAID)


@pytest.mark.parametrize("command", OF_HELP)
def test_examples_of_help(command: str, tmp_path: Path) -> None:
    """As they stand, with the README's task for the placeholder."""
    command = command.replace("my_package.MyTask", "my_task.MyTask").replace("nproc-per-node=4", "nproc-per-node=2")
    command = f"{command} cluster.dry_run=true" if "slurm" in command else command
    process = run(command if "action=" in command else f"{command} duration=1ep", tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err


def test_own_task_and_its_weights(tmp_path: Path) -> None:
    """The lines that load final/ work after the command above them."""
    command = next(command for command in LAUNCHES if "my_task" in command)
    _, err = run(command, tmp_path, cold=True).communicate(timeout=120)
    (directory,) = (tmp_path / "runs").iterdir()
    _, _, load = (block for kind, block in BLOCKS if kind == "python")
    script = f"from my_task import MyTask\n{load}\nprint(model(__import__('torch').zeros(1, 2)).shape)"
    script = script.replace("runs/custom-IDENTITY", str(directory))
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "torch.Size([1, 1])\n", done.stderr + err


def test_the_python_api(tmp_path: Path) -> None:
    task, api, _ = (block for kind, block in BLOCKS if kind == "python")
    (tmp_path / "script.py").write_text(f"{task}\n{api}\nassert losses and plan.world == 128 and not model.training\n")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1].startswith("finished runs/custom-"), done.stderr


def test_the_two_commands_are_the_makefile_s() -> None:
    assert [command for command in COMMANDS if command.startswith("make")] == ["make train", "make test"]
    for target in re.findall(r"(?:`|^)make ([\w-]+)", README, re.MULTILINE):
        assert f"\n{target}:" in (ROOT / "Makefile").read_text()


def test_output_is_real(tmp_path: Path) -> None:
    """The plan to the letter; lines with times and losses up to their figures; the accuracy that is promised."""
    train = re.search(r"^train:.*\n\t\$\(BIN\)/(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert train
    process = run(train[1], tmp_path, cold=True)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    shown = next(block for kind, block in BLOCKS if kind == "text").splitlines()
    plain = re.compile(r"[\d.,e:-]+")
    real, masked = out.splitlines(), {plain.sub("#", line) for line in out.splitlines()}
    for line in shown:
        if line.startswith(("step", "finished")):
            assert plain.sub("#", line) in masked
        elif line != "…":
            assert line in real
    accuracy = re.search(r"val/accuracy ([\d.]+)", real[-1])
    assert accuracy
    assert float(accuracy[1]) >= 0.97


def test_links_and_tree() -> None:
    for link in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / link).exists(), link
    tree = README.partition("## The tree")[2]
    folder = ""
    for line in re.findall(r"^    (\s*\S.*)$", tree, re.MULTILINE):
        names = re.match(r"(\s*)((?:\S+ )*\S+)(?:\s{2,}|$)", line)
        assert names
        for name in names[2].split():
            path = ROOT / (folder if names[1] else "") / name
            assert path.exists(), path
        if not names[1]:
            folder = names[2]


def test_length() -> None:
    assert len(README.splitlines()) <= 280
