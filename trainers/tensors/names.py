"""Name and find the folders of checkpoints. Torch-free."""

from __future__ import annotations

import os
import re
from pathlib import Path

from isobatch.conf.rundir.directory import RunDir

STEP = re.compile("step-[0-9]{8,}")  # the name of a checkpoint's folder
LINKS = 40  # one after another, which are followed; the kernel follows as many


def file_of(rank: int) -> str:
    """Return the name of the file that ``rank`` writes."""
    return f"rank-{rank:05d}.safetensors"


def folder_of(run: RunDir, step: int) -> Path:
    """Return the folder of the checkpoint of ``step``."""
    return run.checkpoints / f"step-{step:08d}"


def checkpoints(run: RunDir) -> list[Path]:
    """List the folders of checkpoints and links with such names, newest step first; none that is half-written.

    A link may lead nowhere: ``read`` then says so.
    """
    try:
        found = [path for path in run.checkpoints.iterdir() if STEP.fullmatch(path.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted((path for path in found if path.is_dir() or path.is_symlink()), key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """Return the step that a checkpoint's folder is named after."""
    return int(path.name.removeprefix("step-"))


def followed(path: Path) -> Path:
    """Follow a link such as ``best`` to what is named after a step, which may be a link in turn."""
    for _ in range(LINKS):
        if STEP.fullmatch(path.name) or not path.is_symlink():
            break
        path = path.parent / os.readlink(path)
    return path
