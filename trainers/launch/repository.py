"""The git repository that a folder is in: its commit, and whether it has changes. Torch-free, and never an error."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import TypedDict

TIMEOUT_S = 2.0  # for one answer of git: a huge repository on a slow disk may not give it


class Repository(TypedDict):
    """``commit``: empty on a branch that has none yet. ``dirty``: tracked files were changed; None: not known."""

    commit: str
    dirty: bool | None


def repository_of(folder: Path) -> Repository | None:
    """Return the state of the repository that ``folder`` is in; None without one, or where git doesn't tell.

    Files that aren't tracked don't make it dirty: the run directory may be one of them.
    """
    options = ("--porcelain=v2", "--branch", "--untracked-files=no", "--ignore-submodules=dirty")
    status = _git(folder, "status", *options)
    if status is None:  # without the look at every file
        commit = commit_of(folder)
        return Repository(commit=commit, dirty=None) if commit else None
    lines = status.splitlines()
    commits = [line.split()[-1] for line in lines if line.startswith("# branch.oid ")]
    commit = "" if not commits or commits[0] == "(initial)" else commits[0]
    return Repository(commit=commit, dirty=any(not line.startswith("#") for line in lines))


def commit_of(folder: Path) -> str:
    """Return the commit of the repository that ``folder`` is in; empty without one."""
    return (_git(folder, "rev-parse", "--verify", "--quiet", "HEAD") or "").strip()


def _git(folder: Path, *arguments: str) -> str | None:
    """Return what git prints; None where it fails, isn't there, or takes too long."""
    of_another = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")  # as in a hook of git's
    env = {name: value for name, value in os.environ.items() if name not in of_another}
    command = ["git", "-c", "core.fsmonitor=false", "--no-optional-locks", "-C", str(folder), *arguments]
    with suppress(OSError, ValueError, subprocess.SubprocessError):
        return subprocess.run(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
            check=True,
        ).stdout
    return None
