"""Report changes since a run was trained: in its code, and in the keys of its command. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from isobatch.conf.rundir.directory import RunDir
from isobatch.conf.rundir.reading import events
from isobatch.conf.saved import not_applied
from isobatch.trainers.launch.source import hash_of, places

if TYPE_CHECKING:
    from isobatch.conf.schema import RunConfig

SHOWN = 8  # most files named in a message


@dataclass(frozen=True)
class Changes:
    """List the code that changed since the run was trained.

    Attributes:
        files: path → current hash; empty if the file is gone.
        repository, commit: old and current, of the user's repository and of Isobatch; empty if unchanged.
    """

    files: dict[str, str]
    repository: list[Any]
    commit: list[str]

    def __bool__(self) -> bool:
        return bool(self.files or self.repository or self.commit)

    def __str__(self) -> str:
        named = [path if digest else f"{path} (gone)" for path, digest in self.files.items()]
        texts = [", ".join(named[:SHOWN]) + f" and {len(named) - SHOWN} more" * (len(named) > SHOWN)]
        if self.repository:
            texts.append("the repository ({}, now {})".format(*map(_short, self.repository)))
        if self.commit:
            texts.append("Isobatch ({:.7}, now {:.7})".format(*self.commit))
        return ", ".join(filter(None, texts))

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of the event in ``events.jsonl``."""
        return asdict(self) | {"files": list(self.files)}


def changes(run: RunDir, config: RunConfig, code: dict[str, Any], loaded: dict[str, str] | None = None) -> Changes:
    """Compare the code that last trained ``run`` with the ``commit`` and ``repository`` in ``code``.

    Files are read from the disk, except for imported files whose hashes are in ``loaded``.
    """
    trained, start = _trained_by(run)
    source_places, complete = places(config)
    changed: dict[str, str] = {}
    for path in sorted(trained):
        hashes = ((loaded or {}).get(path), *(hash_of(os.path.join(place.root, path)) for place in source_places))
        now = next(filter(None, hashes), "")
        if now != trained[path] and (now or complete):
            changed[path] = now
    repository = _differing(start.get("repository"), code.get("repository"))
    commit = [str(start.get("commit") or ""), str(code.get("commit") or "")]
    same = [state["commit"] for state in repository] == commit  # the user's repository is Isobatch's: report it once
    return Changes(changed, repository, commit if all(commit) and commit[0] != commit[1] and not same else [])


def differences(run: RunDir, config: RunConfig, code: dict[str, Any]) -> Iterator[str]:
    """Record and yield, one line each, the keys and the code that differ from those behind a finished run's result.

    Args:
        code: the current ``commit`` and ``repository``.
    """
    if keys := not_applied(config, run.path):
        _note(run, "not_applied", keys=keys)
        yield f"not applied, since the run is finished: {', '.join(keys)}"
    if found := changes(run, config, code):
        _note(run, "changed", **found.fields)
        yield f"changed since the run was trained: {found}"


def _note(run: RunDir, event: str, **fields: Any) -> None:
    """Record an event, unless the last one of its kind has the same fields."""
    before = [earlier for earlier in events(run.path) if earlier.get("event") == event][-1:]
    if not before or any(before[0].get(name) != value for name, value in fields.items()):
        with suppress(OSError):  # a full disk doesn't change the result
            run.event(event, **fields)


def _trained_by(run: RunDir) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the source hashes recorded by the starts that trained, and the ``start`` event of the last of them."""
    files: dict[str, str] = {}
    start: dict[str, Any] = {}
    trained: dict[str, Any] = {}
    for event in events(run.path):
        if event.get("event") == "start":
            start = event
        elif event.get("event") == "source" and isinstance(event.get("files"), dict):
            files, trained = files | event["files"], start
    return files, trained


def _differing(then: Any, now: Any) -> list[Any]:
    """Return both states of a repository if they are known and differ, else an empty list."""
    if not isinstance(then, dict) or not isinstance(now, dict):
        return []
    unknown = None in (then.get("dirty"), now.get("dirty"))
    keys = ["commit"] if unknown else ["commit", "dirty"]
    return [then, now] if any(then.get(key) != now.get(key) for key in keys) else []


def _short(repository: dict[str, Any]) -> str:
    dirty = " with uncommitted changes" if repository.get("dirty") else ""
    return (str(repository.get("commit", ""))[:7] or "no commit") + dirty
