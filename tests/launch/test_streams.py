"""Test unwritable output, a deleted working directory and a low limit of open files: one message, no traceback."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.soak import LAUNCH
from tests.launch.test_workers import BASE, FAULTY, Run

PLAN = f"{sys.executable} {LAUNCH} action=plan"
TRAINS = f"{sys.executable} {LAUNCH} task=digits run.dir=run"
SPACE = "isobatch: the output can't be written: No space left on device\n"
GONE = "isobatch: the working directory was deleted; change to one that exists\n"
FILES = "isobatch: a process may have 24 files open here, and training needs 64; raise it, ulimit -n 64\n"


@pytest.mark.parametrize(
    ("command", "code", "error"),
    [
        (f"{PLAN} > /dev/full", 1, SPACE),
        (f"{PLAN} >&- <&-", 0, ""),
        (f"{PLAN} >&- 2>&-", 0, ""),
        (f"{PLAN} no.such=key 2> /dev/full", 2, ""),
        (f"{PLAN} no.such=key 2>&-", 2, ""),
        (f"mkdir gone; cd gone; rmdir ../gone; {PLAN}", 2, GONE),
        (f"ulimit -n 24; {TRAINS}", 2, FILES),
        (f"ulimit -n 24; {PLAN} > /dev/null", 0, ""),
    ],
)
def test_one_message_and_no_traceback_is_printed(tmp_path: Path, command: str, code: int, error: str) -> None:
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, error)
    assert not (tmp_path / "run").exists()


PRINTS = """
import sys
from faulty import Task as Plain


class Task(Plain):
    def loss(self, model, batch):
        print("a line of the task's own", flush=True)
        print("and another", file=sys.stderr, flush=True)
        return super().loss(model, batch)
"""


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_a_run_finishes_after_the_reader_of_its_output_leaves(tmp_path: Path, kind: str) -> None:
    """The task prints, too, and on a terminal the progress line is redrawn."""
    (tmp_path / "faulty.py").write_text(FAULTY)
    (tmp_path / "prints.py").write_text(PRINTS)
    reads, writes = pty.openpty() if kind == "terminal" else os.pipe()
    words = [
        "task._target_=prints.Task",
        "duration=300st",
        "task.args.sleep=0.01",
        "log.every=1st",
        f"run.dir={tmp_path}/run",
    ]
    command = [sys.executable, str(LAUNCH), *BASE, "cluster.gpus_per_node=2", *words]
    process = subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=writes, stderr=writes)
    os.close(writes)
    seen = b""
    while b"a line of" not in seen:
        seen += os.read(reads, 1000)
    os.close(reads)
    assert process.wait(60) == 0
    run = Run.__new__(Run)
    run.dir = tmp_path / "run"
    assert run.outcome["state"] == "finished"
    assert len((run.dir / "metrics.jsonl").read_text().splitlines()) == 300
    assert not list(run.dir.glob("logs/error*"))
