"""Test that the README is true: its commands run, its output matches, its links and files exist."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from isobatch.conf.help import EXAMPLES
from tests.support.harness import free_port
from tests.support.runs import learned, write_run
from tests.support.warm import Warm

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.partition("  #")[0].strip() for kind, block in BLOCKS if kind == "bash" for line in block.strip().splitlines()
]
LAUNCHES = [command for command in COMMANDS if "launch.py" in command]

HELP_EXAMPLES = [  # without the README's own, and without those that need a run directory (see test_command_line.py)
    command
    for line in EXAMPLES.splitlines()
    if line.startswith(("  python", "  torchrun")) and "0123456789ab" not in line
    if (command := line.strip().partition("   ")[0]) not in LAUNCHES
]


# Patterns of the output, by a part of the command. The first part that a command contains counts.
PRINTS = {
    "make train": "finished after 450 steps",
    "task.args.width=32 lr.peak=0.5 duration=5ep batch.per_gpu=10": r"finished after 79 steps.*run\.new=true",
    "task._target_=my_task.MyTask": "finished after 79 steps",
    "isobatch --config-dir configs task=mine": "finished after 79 steps.*runs/mine-",
    "isobatch.launch --config-dir configs task=mine": r"finished after 79 steps.*runs/mine-.*run\.new=true",
    "batch.global_size=128 batch.per_gpu=24": "128 samples ≤ 22 .* accumulation 6",
    "batch.accumulation=2": "32 samples = 16 per GPU × 1 rank × accumulation 2",
    "lr.rule=sqrt": r"peak 0.0707107 = 0.05 × √\(64/32\)",
    "cluster.nodes=16": "512 samples = 4 per GPU × 128 ranks",
    "optimizer=auto": r"lars \(auto",
    "batch.schedule": "then .*from sample 14,400, step 226: 256 samples",
    "action=tune": r"memory: per-GPU batch(.|\n)*noise: (.|\n)*recommended: global batch .*\n.*noise",
    "batch.per_gpu=auto": r"per-GPU batch 64, all|per-GPU batch 64: all(.|\n)*finished after 45 steps",
    "plan.memory=true": "largest per-GPU batch: .*samples",
    "-m batch.global_size=32,64": r"32 .*\n.*64 ",
    "python launch.py batch.global_size=128": "peak 0.2 = 0.05 × 128/32(.|\n)*finished after 225 steps",
    "duration=25ep": "finished after 562 steps",
    "stop.when=val/loss:min": r"finished after \d+ steps.*stop\.when",
    "run.new=true duration=2ep": "finished after 45 steps",
    "init_from=runs/digits-814799feb745 lr.peak": "finished after 45 steps",
    "action=evaluate": "val/accuracy",
    "action=runs": "digits-814799feb745 .*finished",
    "action=report": r"batch 64 .*\n(.|\n)*written to .*/report\.(html|md) and",
    "cluster=slurm": "#SBATCH",
    "duration=1ep": "finished after 23 steps",
    "python launch.py": r"finished after 450 steps.*run\.new=true",
}


def run(command: str, folder: Path, cold: bool = False) -> Warm | subprocess.Popen[str]:
    """Start a command of the README in a folder with launch.py, the Makefile and the README's task.

    Args:
        cold: start it from a shell, not in a process that has imported torch.
    """
    for name in ("launch.py", "Makefile"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(ROOT / name)
    write_files(folder)
    bin_folder = Path(sys.executable).parent
    env = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}"}
    if command.startswith("isobatch "):  # the package isn't installed
        command = command.replace("isobatch", "python launch.py", 1)
    if "-m isobatch.launch" in command:
        env["PYTHONPATH"] = str(ROOT)
        command = command.replace("nproc-per-node=8", "nproc-per-node=2")
    if command.startswith("python launch.py") and not cold:
        return Warm(shlex.split(command)[2:], folder, env)
    if command.startswith("make"):
        command += f" VENV={bin_folder.parent} --assume-old={bin_folder.parent}/.installed"
    pipe = subprocess.PIPE
    return subprocess.Popen(command, shell=True, cwd=folder, env=env, stdout=pipe, stderr=pipe, text=True)


def write_files(folder: Path) -> None:
    """Write the blocks of the README that begin with the path of a file."""
    for _, block in BLOCKS:
        if path := re.match(r"# ([\w/]+\.(py|yaml))\n", block):
            (folder / path[1]).parent.mkdir(parents=True, exist_ok=True)
            (folder / path[1]).write_text(block)


def test_commands_run_in_order_from_top_to_bottom(tmp_path: Path) -> None:
    for command in COMMANDS:
        if command.startswith(("source", "pip")):
            continue
        starts = 1
        if "rendezvous" in command:  # simulate two machines with one process each
            starts, command = 2, command.replace("node-1:29500", f"127.0.0.1:{free_port()}").replace("node=8", "node=1")
        command = f"{command} cluster.dry_run=true" if "slurm" in command else command  # tests/cluster submits jobs
        processes = [run(command, tmp_path) for _ in range(starts)]
        for process in processes:
            out, err = process.communicate(timeout=180)
            assert process.returncode == 0, f"{command}: {err}"
            prints = next(prints for part, prints in PRINTS.items() if part in command)
            assert starts > 1 or re.search(prints, out), f"{command}: {out}"
        if command.startswith("make train"):
            _check_shown_output(out)


def _check_shown_output(out: str) -> None:
    """Check the README's output: all up to "…" literally, the lines after it up to their numbers, and the accuracy."""
    first, last = next(block for kind, block in BLOCKS if kind == "text").split("…\n")
    plain = re.compile(r"[\d.,e:-]+")
    real = out[out.index("Isobatch plan") :].splitlines()
    assert real[: len(first.splitlines())] == first.splitlines()
    masked = [plain.sub("#", line) for line in real]
    assert [plain.sub("#", line) for line in last.splitlines()] == masked[-2:]
    accuracy = re.search(r"val/accuracy ([\d.]+)", real[-1])
    assert accuracy
    assert float(accuracy[1]) >= 0.97


@pytest.mark.parametrize("command", HELP_EXAMPLES)
def test_help_examples_run(command: str, tmp_path: Path) -> None:
    """The README's task replaces the placeholder, and two processes replace four. Reports and lists have two runs."""
    for name in ("a", "b") if "action=r" in command else ():
        write_run(tmp_path / "runs" / name, learned(64, seed=0))
    command = command.replace("my_package.MyTask", "my_task.MyTask").replace("nproc-per-node=4", "nproc-per-node=2")
    command = f"{command} cluster.dry_run=true" if "slurm" in command else command
    process = run(command if "action=" in command else f"{command} duration=1ep", tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err


def test_the_python_example_runs(tmp_path: Path) -> None:
    _, api = (block for kind, block in BLOCKS if kind == "python")
    write_files(tmp_path)
    (tmp_path / "script.py").write_text(f"{api}\nassert losses and plan.world == 128 and not model.training\n")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1].startswith("finished runs/custom-"), done.stderr


def test_make_targets_and_links_exist_and_the_length_is_bounded() -> None:
    for target in re.findall(r"(?:`|^)make ([\w-]+)", README, re.MULTILINE):
        assert f"\n{target}:" in (ROOT / "Makefile").read_text()
    for file in ROOT.glob("*/README.md"):
        for link in re.findall(r"\]\((?!http|#)([^)#]+)", file.read_text()):
            assert (file.parent / link).exists(), f"{file}: {link}"
    for link in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / link).exists(), link
    assert len(README.splitlines()) <= 200
