"""Test the command that runs a module in another process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("place", ["0, ", "len(sys.path), "])
def test_another_process_imports_from_the_same_paths_in_any_folder(tmp_path: Path, place: str) -> None:
    """Print the paths here and in the other process, pasted into a shell."""
    extra = tmp_path / "it's here"
    extra.mkdir()
    (extra / "shows.py").write_text("import json, sys\nprint(json.dumps([sys.executable, sys.path]))\n")
    script = f"""
import json, os, shlex, subprocess, sys
from isobatch.conf.command import command_of
sys.path.insert({place}{str(extra)!r})
print(json.dumps([sys.executable, list(map(os.path.abspath, sys.path))]), flush=True)
subprocess.run(shlex.join(command_of("shows")), shell=True, cwd="/", check=True, env={{}})
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    here, there = map(json.loads, done.stdout.splitlines())
    assert there[0] == here[0]
    searched = [[path for path in dict.fromkeys(paths) if Path(path).exists()] for _, paths in (here, there)]
    assert searched[0] == searched[1]
