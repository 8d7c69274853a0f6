"""Record the code that trains a run: hashes of the user's source files, and the state of their git repository.

All imported files below the folder of a ``_target_``'s top-level package or module are hashed. Keys are paths relative
to that folder, so that another checkout gives the same keys. Of Isobatch's own files only the module of a shipped task
is hashed, since Isobatch's commit covers the rest. Torch-free.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import isobatch

if TYPE_CHECKING:
    from isobatch.conf.schema import RunConfig

ISOBATCH = Path(isobatch.__file__).parent  # the package, in a clone or installed
_LAUNCHER = os.path.realpath(ISOBATCH / "launch.py")
_STDLIB = f"{sysconfig.get_path('stdlib')}{os.sep}"
_INSTALLED = tuple(f"{os.sep}{name}{os.sep}" for name in ("site-packages", "dist-packages"))
GIT_S = 2.0  # timeout of a git command, which may take long in a huge repository on a slow disk


class Place(NamedTuple):
    """A file, or a folder of source files, at ``within``. Keys are paths relative to ``root``."""

    root: str
    within: str

    def holds(self, file: str) -> bool:
        if file == self.within:
            return True
        if not file.startswith(self.within + os.sep) or file.startswith(_STDLIB) or _is_ours(file):
            return False
        return _is_installed(file) == _is_installed(self.within)


def _is_ours(file: str) -> bool:
    return file.startswith(f"{ISOBATCH}{os.sep}") or os.path.realpath(file) == _LAUNCHER


def _is_installed(file: str) -> bool:
    return any(part in file for part in _INSTALLED)


# ---- finding the source


def places(config: RunConfig) -> tuple[list[Place], bool]:
    """Find the source of every ``_target_`` in ``config``, without importing it.

    Also return whether all of it was found. If not, a missing file may just be outside of the known places.
    """
    found: dict[Place, None] = {}
    complete = True
    for target in dict.fromkeys(_targets(config.model_dump(mode="json", by_alias=True))):
        root, file = _module_of(target)
        complete &= bool(file)
        if place := file and _place(root, file, target, of_task=target == config.task.target):
            found[place] = None
    return list(found), complete


def folder_of(config: RunConfig) -> Path:
    """Return the folder of the task's file, or the working directory for a shipped or installed task."""
    _, file = _module_of(config.task.target)
    return Path.cwd() if not file or _is_ours(file) or _is_installed(file) else Path(file).parent


def _targets(plain: Any) -> Iterator[str]:
    if isinstance(plain, dict):
        if isinstance(target := plain.get("_target_"), str):
            yield target
        for inner in plain.values():
            yield from _targets(inner)
    elif isinstance(plain, list):
        for inner in plain:
            yield from _targets(inner)


def _module_of(target: str) -> tuple[str, str]:
    """Return the folder of ``target``'s top-level package or module, and the file of the module that defines it.

    Both are "" if there is no such file. Only the top-level name is looked up the way an import would do it, since
    looking up inner names that way would import their packages.
    """
    top, *inner = target.split(".")[:-1] or [target]
    with suppress(Exception):  # finders may be third-party code
        spec = find_spec(top)
        for folder in (spec and spec.submodule_search_locations) or ():
            package, files = Path(os.path.abspath(folder)), [os.path.join(folder, "__init__.py")]
            for part in inner:
                package /= part
                files += [f"{package}.py", str(package / "__init__.py")]
            if found := [file for file in files if os.path.isfile(file)]:
                return str(Path(os.path.abspath(folder)).parent), found[-1]
        if spec and spec.origin and os.path.isfile(spec.origin):
            file = os.path.abspath(spec.origin)
            return os.path.dirname(file), file
    return "", ""


def _place(root: str, file: str, target: str, of_task: bool) -> Place | None:
    """Return the place of a module's files; None if they belong to a library."""
    installed = _is_installed(file)
    if file.startswith(_STDLIB) and not installed:
        return None
    if _is_ours(file):
        return Place(str(ISOBATCH), file)
    if not installed:
        return Place(root, root.rstrip(os.sep))
    return Place(root, os.path.join(root, target.partition(".")[0])) if of_task else None


# ---- hashes


class Source:
    """Hold the hashes of the user's source files by path, taken when they were first seen imported.

    A file that is edited later keeps the hash of the running code.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config, self._modules = config, 0
        self.files: dict[str, str] = {}

    def look(self) -> dict[str, str]:
        """Hash the files imported since the last call, and return the new hashes."""
        if len(sys.modules) == self._modules:
            return {}
        self._modules = len(sys.modules)
        new: dict[str, str] = {}
        source_places, _ = places(self._config)
        for module in list(sys.modules.values()):
            file = getattr(module, "__file__", None)
            if isinstance(file, str) and file.endswith(".py") and os.path.isabs(file):
                place = next((place for place in source_places if place.holds(file)), None)
                path = place and Path(os.path.relpath(file, place.root)).as_posix()
                if path and path not in self.files and (digest := hash_of(file)):
                    new[path] = digest
        self.files |= new
        return new


def hash_of(file: str) -> str | None:
    """Return the hash of a file; None if it can't be read."""
    with suppress(OSError):
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12]
    return None


# ---- the repository


def repository_of(folder: Path) -> dict[str, Any] | None:
    """Return the state of the git repository that contains ``folder``; None without one, or if git fails.

    Untracked files don't make it dirty, since the run directory may be one of them.

    Returns:
        ``commit``: empty on a branch without commits. ``dirty``: tracked files were changed; None if unknown.
    """
    options = ("--porcelain=v2", "--branch", "--untracked-files=no", "--ignore-submodules=dirty")
    status = _git(folder, "status", *options)
    if status is None:  # the commit alone doesn't need a look at every file
        return {"commit": commit, "dirty": None} if (commit := commit_of(folder)) else None
    lines = status.splitlines()
    (commit,) = [line.split()[-1] for line in lines if line.startswith("# branch.oid ")][:1] or [""]
    dirty = any(not line.startswith("#") for line in lines)
    return {"commit": "" if commit == "(initial)" else commit, "dirty": dirty}


def commit_of(folder: Path) -> str:
    """Return the commit of the repository that contains ``folder``; empty without one."""
    return (_git(folder, "rev-parse", "--verify", "--quiet", "HEAD") or "").strip()


def _git(folder: Path, *arguments: str) -> str | None:
    """Return git's output; None if git fails, isn't installed, or takes too long."""
    redirecting = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")  # a git hook sets them for another repository
    env = {name: value for name, value in os.environ.items() if name not in redirecting}
    command = ["git", "-c", "core.fsmonitor=false", "--no-optional-locks", "-C", str(folder), *arguments]
    with suppress(OSError, ValueError, subprocess.SubprocessError):
        done = subprocess.run(
            command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            timeout=GIT_S, check=True,
        )  # fmt: skip
        return done.stdout
    return None
