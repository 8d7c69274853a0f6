"""Keep the results of tuning in ``tune.json``, one object per part, so that a part isn't measured twice. Torch-free.

A run with batch.per_gpu=auto and action=tune may write it at once, since they hold different locks for all of their
time. So each write takes a lock of its own, and adds one part to those that are stored by then.
"""

from __future__ import annotations

import errno
import fcntl
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from isobatch.conf.rundir.files import finite, write_atomic
from isobatch.scaling.errors import UserError
from isobatch.scaling.reading import Unreadable, read_json

FOLDER, FILE = "tune", "tune.json"
WRITING = ".tune.json.lock"  # held for a write
CONDITIONS = "conditions"  # of a part: what its result depends on
# what a recommendation and other parts use; * is each row of a list
USED = {
    "memory.per_gpu": "a count",
    "speed.world_size": "a count",
    "speed.sizes": "a list",
    "speed.spread": "a number",
    "speed.sizes.*.per_gpu": "a count",
    **dict.fromkeys((f"speed.sizes.*.{name}" for name in ("fixed_ms", "pass_ms", "data_wait", "spread")), "a number"),
    **dict.fromkeys((f"noise.{name}" for name in ("over_run", "scale", "low", "high")), "a number or null"),
    "branch.critical_batch": "a number or null",
    "branch.interval.*": "a number or null",
    **dict.fromkeys((f"law.{name}" for name in ("batch", "low", "high")), "a number"),
    "branch.course": "a list",
    "branch.course.*.branches": "a list",
    "branch.course.*.branches.*.lr": "a number",
    **dict.fromkeys((f"lr.{name}" for name in ("largest_stable", "suggestion")), "a number or null"),
}
KINDS: dict[str, Callable[[Any], bool]] = {
    "a count": lambda value: type(value) is int and value >= 0,
    "a list": lambda value: isinstance(value, list),
    "a number": lambda value: type(value) in (int, float) and value >= 0,
    "a number or null": lambda value: value is None or (type(value) in (int, float) and value >= 0),
}


class Results:
    """The results of one run's tuning, in ``<run directory>/tune/tune.json``.

    Args:
        run: the run directory.

    Attributes:
        parts: the object of each measured part, by the part's name, and ``recommendation``; empty until ``read``.
    """

    def __init__(self, run: Path) -> None:
        self.folder = run / FOLDER
        self.file = self.folder / FILE
        self.parts: dict[str, dict[str, Any]] = {}

    def read(self) -> None:
        """Read the file, if there is one. Raises UserError if it is damaged."""
        try:
            found = read_json(self.file)
            if not isinstance(found, dict) or not all(isinstance(part, dict) for part in found.values()):
                raise Unreadable("it isn't an object of objects")
            for path, kind in USED.items():
                for key, value in _at(found, path.split("."), ""):
                    if not KINDS[kind](value):
                        raise Unreadable(f"{key} is {value!r:.60}, and has to be {kind}")
        except FileNotFoundError:
            return
        except Unreadable as error:
            raise UserError(f"{self.file} is damaged: {error}", "remove it; action=tune measures again") from None
        self.parts = found

    def get(self, part: str, conditions: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the stored object of ``part``; None if there is none, or if it was measured under other conditions."""
        found = self.parts.get(part)
        return found if found is not None and found.get(CONDITIONS) == dict(conditions) else None

    def put(self, part: str, found: Mapping[str, Any] | None, conditions: Mapping[str, Any] | None = None) -> None:
        """Add the object of ``part`` to the file, with None in place of numbers that aren't finite; None: remove it.

        The other parts are those of the file, which another command may have written since ``read``.

        Raises:
            UserError: the file is damaged.
            OSError: it can't be written.
        """
        own = found and finite({**found, **({} if conditions is None else {CONDITIONS: dict(conditions)})})
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder / WRITING):
            self.read()
            self.parts = {name: stored for name, stored in {**self.parts, part: own}.items() if stored}
            write_atomic(self.file, to_json(self.parts) + "\n")


def to_json(parts: Mapping[str, Any]) -> str:
    """Return parts as the text of ``tune.json``."""
    return json.dumps(parts, indent=1, allow_nan=False)


def _at(value: Any, path: Sequence[str], key: str) -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of everything at a path below ``value``; nothing where a key is missing."""
    if not path:
        yield key.removeprefix("."), value
    elif path[0] == "*" and isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _at(inner, path[1:], f"{key}.{number}")
    elif isinstance(value, dict) and path[0] in value:
        yield from _at(value[path[0]], path[1:], f"{key}.{path[0]}")


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Wait for the lock on ``file``, and hold it inside this block; without it on a disk that has no locks."""
    with open(file, "a") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        yield
