"""Name and find the folders of checkpoints. Torch-free."""

from __future__ import annotations

import os
import re
from pathlib import Path

from isobatch.conf.rundir.directory import RunDir

STEP = re.compile("step-[0-9]{8,}")  # the name of a checkpoint's folder
LINKS = 40  # longest chain of links to follow, as in the Linux kernel


def file_of(rank: int) -> str:
    """Return the name of the file written by ``rank``."""
    return f"rank-{rank:05d}.safetensors"


def folder_of(run: RunDir, step: int) -> Path:
    """Return the folder of the checkpoint of ``step``."""
    return run.checkpoints / f"step-{step:08d}"


def checkpoints(run: RunDir) -> list[Path]:
    """List the folders and links named like a checkpoint, newest step first, without half-written ones.

    A link may be broken. ``read`` reports that.
    """
    try:
        found = [path for path in run.checkpoints.iterdir() if STEP.fullmatch(path.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted((path for path in found if path.is_dir() or path.is_symlink()), key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """Return the step in the name of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


def followed(path: Path) -> Path:
    """Follow a link such as ``best`` to a path named after a step, which may be a link as well."""
    for _ in range(LINKS):
        if STEP.fullmatch(path.name) or not path.is_symlink():
            break
        path = path.parent / os.readlink(path)
    return path
