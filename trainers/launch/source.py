"""Which code trains a run: hashes of the user's source files, and what changed since it was trained. Torch-free.

Hashed are the imported files below the folder that the task's top-level package or module is in, keyed by their path
from there, so that another checkout gives the same keys. The same goes for whatever else the config has as a
``_target_``. Of Isobatch's own files only a shipped task's module is among them: its commit says the rest.
"""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import isobatch
from isobatch.conf.rundir.directory import RunDir
from isobatch.conf.rundir.files import events

if TYPE_CHECKING:
    from isobatch.conf.schema import RunConfig

ISOBATCH = Path(isobatch.__file__).parent  # the package, in a clone as where it is installed
_LAUNCHER = os.path.realpath(ISOBATCH / "launch.py")
_STDLIB = f"{sysconfig.get_path('stdlib')}{os.sep}"
_INSTALLED = tuple(f"{os.sep}{name}{os.sep}" for name in ("site-packages", "dist-packages"))
SHOWN = 8  # files that are named


@dataclass(frozen=True)
class Place:
    """Describe where source files are looked for: below ``within``; their keys are relative to ``root``.

    Attributes:
        ours: it is a module of Isobatch's, ``within`` itself.
        installed: it is a package in ``site-packages``.
    """

    root: str
    within: str
    ours: bool
    installed: bool

    def holds(self, file: str) -> bool:
        if self.ours:
            return file == self.within
        if not file.startswith(self.within + os.sep) or file.startswith(_STDLIB):
            return False
        return not _is_ours(file) and _is_installed(file) == self.installed


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
        if (module := _module_of(target)) is None:
            complete = False
        elif place := _place(*module, of_task=target == config.task.target):
            found[place] = None
    return list(found), complete


def folder_of(config: RunConfig) -> Path:
    """Return the folder of the task's file; that of the command where the task is shipped, or installed."""
    module = _module_of(config.task.target)
    if module is None or _is_ours(module[1]) or _is_installed(module[1]):
        return Path.cwd()
    return Path(module[1]).parent


def _targets(plain: Any) -> Iterator[str]:
    if isinstance(plain, dict):
        if isinstance(target := plain.get("_target_"), str):
            yield target
        for inner in plain.values():
            yield from _targets(inner)
    elif isinstance(plain, list):
        for inner in plain:
            yield from _targets(inner)


def _module_of(target: str) -> tuple[str, str] | None:
    """Return the module that ``target`` is in, and its file; None where there is no such file."""
    parts = target.split(".")
    path: list[str] | None = None
    found = None
    for number in range(1, len(parts)):
        name = ".".join(parts[:number])
        spec = _spec(name, path)
        if spec is None:  # perhaps a namespace within a package: finding one needs that imported
            folders = [os.path.join(folder, parts[number - 1]) for folder in path or ()]
            path = [folder for folder in folders if os.path.isdir(folder)]
        else:
            if spec.origin and os.path.isfile(spec.origin):
                found = name, os.path.abspath(spec.origin)
            path = list(spec.submodule_search_locations or ())
        if not path:
            break
    return found


def _spec(name: str, path: Any) -> Any:
    """Return how ``name`` is, or would be, imported, without importing what it is in."""
    if name in sys.modules:
        return getattr(sys.modules[name], "__spec__", None)
    with suppress(Exception):  # finders are others' code
        for finder in sys.meta_path:
            if spec := finder.find_spec(name, path):
                return spec
    return None


def _place(module: str, file: str, of_task: bool) -> Place | None:
    """Return where the files of a module are; None where they are a library's."""
    ours, installed = _is_ours(file), _is_installed(file)
    if file.startswith(_STDLIB) and not installed:
        return None
    if ours:
        return Place(str(ISOBATCH), file, ours=True, installed=installed)
    package = os.path.basename(file) == "__init__.py"
    above = Path(file).parents
    root = str(above[min(module.count(".") + package, len(above) - 1)])
    if not installed:
        return Place(root, root.rstrip(os.sep), ours=False, installed=False)
    if not of_task:
        return None
    return Place(root, os.path.join(root, module.partition(".")[0]), ours=False, installed=True)


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
                if path and path not in self.files and (digest := _hash(file)):
                    new[path] = digest
        self.files |= new
        return new


def _hash(file: str) -> str | None:
    with suppress(OSError):
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12]
    return None


# ---- what changed


@dataclass(frozen=True)
class Changes:
    """List what changed since the run was trained.

    Attributes:
        files: path → hash of now; empty where the file is gone.
        repository, commit: of the user's code and of Isobatch, then and now; empty where they are the same.
    """

    files: dict[str, str]
    repository: list[Any]
    commit: list[str]

    def __bool__(self) -> bool:
        return bool(self.files or self.repository or self.commit)

    def __str__(self) -> str:
        named = [path if digest else f"{path} (gone)" for path, digest in self.files.items()]
        said = [", ".join(named[:SHOWN]) + f" and {len(named) - SHOWN} more" * (len(named) > SHOWN)]
        if self.repository:
            said.append("the repository ({}, now {})".format(*map(_short, self.repository)))
        if self.commit:
            said.append("Isobatch ({:.7}, now {:.7})".format(*self.commit))
        return ", ".join(filter(None, said))

    @property
    def fields(self) -> dict[str, Any]:
        """For ``events.jsonl``."""
        return {"files": list(self.files), "repository": self.repository, "commit": self.commit}


def changes(run: RunDir, config: RunConfig, code: dict[str, Any], loaded: dict[str, str] | None = None) -> Changes:
    """Return what changed since ``run`` was last trained.

    Args:
        code: ``commit`` and ``repository`` of now.
        loaded: hashes of the files that are imported; others are read from the disk.
    """
    trained, start = _trained_by(run)
    where, complete = places(config)
    now = {path: _now(path, where, loaded or {}) for path in trained}
    changed = {path: now[path] for path in sorted(trained) if now[path] != trained[path] and (now[path] or complete)}
    repository = _differing(start.get("repository"), code.get("repository"))
    commit = [str(start.get("commit") or ""), str(code.get("commit") or "")]
    own = [state["commit"] for state in repository] == commit  # Isobatch's, which is said once
    return Changes(changed, repository, commit if all(commit) and commit[0] != commit[1] and not own else [])


def _trained_by(run: RunDir) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the hashes that the starts noted which came to train, and the ``start`` event of the last of them."""
    files: dict[str, str] = {}
    start: dict[str, Any] = {}
    trained: dict[str, Any] = {}
    for event in events(run.path):
        if event.get("event") == "start":
            start = event
        elif event.get("event") == "source" and isinstance(event.get("files"), dict):
            files, trained = files | event["files"], start
    return files, trained


def _now(path: str, where: Sequence[Place], loaded: dict[str, str]) -> str:
    """Return the hash of a file; empty where it isn't there."""
    hashes = (loaded.get(path), *(_hash(os.path.join(place.root, path)) for place in where))
    return next(filter(None, hashes), "")


def _differing(then: Any, now: Any) -> list[Any]:
    """Return both states of a repository where they are known and differ."""
    if not isinstance(then, dict) or not isinstance(now, dict):
        return []
    unknown = None in (then.get("dirty"), now.get("dirty"))
    keys = ["commit"] if unknown else ["commit", "dirty"]
    return [then, now] if any(then.get(key) != now.get(key) for key in keys) else []


def _short(repository: dict[str, Any]) -> str:
    dirty = " with uncommitted changes" if repository.get("dirty") else ""
    return (str(repository.get("commit", ""))[:7] or "no commit") + dirty
