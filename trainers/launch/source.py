"""Which code trains a run: hashes of the user's source files, and the git repository they are in. Torch-free.

Hashed are the imported files below the folder that the task's top-level package or module is in, keyed by their path
from there, so that another checkout gives the same keys. The same goes for whatever else the config has as a
``_target_``. Of Isobatch's own files only a shipped task's module is among them: its commit says the rest.
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

ISOBATCH = Path(isobatch.__file__).parent  # the package, in a clone as where it is installed
_LAUNCHER = os.path.realpath(ISOBATCH / "launch.py")
_STDLIB = f"{sysconfig.get_path('stdlib')}{os.sep}"
_INSTALLED = tuple(f"{os.sep}{name}{os.sep}" for name in ("site-packages", "dist-packages"))
GIT_S = 2.0  # for one answer of git: a huge repository on a slow disk may not give it


class Place(NamedTuple):
    """Where source files are looked for: below ``within``, or that file itself; their keys are relative to ``root``."""

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


# ---- where the source is


def places(config: RunConfig) -> tuple[list[Place], bool]:
    """Return where the source of everything that ``config`` names by a ``_target_`` is; nothing is imported.

    Also return whether all of it was found: else it can't be said which files are gone.
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
    """Return the folder of the task's file; that of the command where the task is shipped, or installed."""
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
    """Return the folder of the top-level package or module of ``target``, and the file of the module that has it.

    Both are "" where there is no such file. Only the top-level name is looked up as an import would: to find the rest
    so, the packages that it is in would have to be imported.
    """
    top, *inner = target.split(".")[:-1] or [target]
    with suppress(Exception):  # finders are others' code
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
    """Return where the files of a module are; None where they are a library's."""
    installed = _is_installed(file)
    if file.startswith(_STDLIB) and not installed:
        return None
    if _is_ours(file):
        return Place(str(ISOBATCH), file)
    if not installed:
        return Place(root, root.rstrip(os.sep))
    return Place(root, os.path.join(root, target.partition(".")[0])) if of_task else None


# ---- its hashes


class Source:
    """The user's source files as they were when they were first seen imported: path → hash.

    A file that is edited later keeps the hash of what is running.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config, self._modules = config, 0
        self.files: dict[str, str] = {}

    def look(self) -> dict[str, str]:
        """Take in what was imported since the last look; return what is new."""
        if len(sys.modules) == self._modules:
            return {}
        self._modules = len(sys.modules)
        new: dict[str, str] = {}
        where, _ = places(self._config)
        for module in list(sys.modules.values()):
            file = getattr(module, "__file__", None)
            if isinstance(file, str) and file.endswith(".py") and os.path.isabs(file):
                place = next((place for place in where if place.holds(file)), None)
                path = place and Path(os.path.relpath(file, place.root)).as_posix()
                if path and path not in self.files and (digest := hash_of(file)):
                    new[path] = digest
        self.files |= new
        return new


def hash_of(file: str) -> str | None:
    """Return the hash of a file; None where it can't be read."""
    with suppress(OSError):
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12]
    return None


# ---- the repository


def repository_of(folder: Path) -> dict[str, Any] | None:
    """Return the state of the git repository that ``folder`` is in; None without one, or where git doesn't tell.

    Files that aren't tracked don't make it dirty: the run directory may be one of them.

    Returns:
        ``commit``: empty on a branch that has none yet. ``dirty``: tracked files were changed; None: not known.
    """
    options = ("--porcelain=v2", "--branch", "--untracked-files=no", "--ignore-submodules=dirty")
    status = _git(folder, "status", *options)
    if status is None:  # without the look at every file
        return {"commit": commit, "dirty": None} if (commit := commit_of(folder)) else None
    lines = status.splitlines()
    (commit,) = [line.split()[-1] for line in lines if line.startswith("# branch.oid ")][:1] or [""]
    dirty = any(not line.startswith("#") for line in lines)
    return {"commit": "" if commit == "(initial)" else commit, "dirty": dirty}


def commit_of(folder: Path) -> str:
    """Return the commit of the repository that ``folder`` is in; empty without one."""
    return (_git(folder, "rev-parse", "--verify", "--quiet", "HEAD") or "").strip()


def _git(folder: Path, *arguments: str) -> str | None:
    """Return what git prints; None where it fails, isn't there, or takes too long."""
    of_another = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")  # as in a hook of git's
    env = {name: value for name, value in os.environ.items() if name not in of_another}
    command = ["git", "-c", "core.fsmonitor=false", "--no-optional-locks", "-C", str(folder), *arguments]
    with suppress(OSError, ValueError, subprocess.SubprocessError):
        done = subprocess.run(
            command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            timeout=GIT_S, check=True,
        )  # fmt: skip
        return done.stdout
    return None
