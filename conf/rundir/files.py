"""Write the small files of a run directory, and tell what a folder holds. Torch-free."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

REMOVED = " (deleted)"  # suffix of the path of an open file that was removed


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a temporary file in the same folder, fsync and rename it. Readers see the old or the new content."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def finite(value: Any) -> Any:
    """Return a value as JSON can hold it, with None in place of numbers that aren't finite."""
    if isinstance(value, dict):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def holds_run(folder: Path) -> bool:
    """Return whether ``folder`` holds more of a run or a sweep than its lock."""
    names = ("outcome.json", "config.yaml", "events.jsonl", "submissions")
    return any(os.path.lexists(folder / name) for name in names)


def is_emptied(folder: Path) -> bool:
    """Return whether a run or a sweep was removed from ``folder``; its other files may have been written since.

    Raises:
        OSError: the disk fails, which ``holds_run`` would take for missing files.
    """
    for name in ("outcome.json", "config.yaml", "plan.json", "submissions"):
        with suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(folder / name)
            return False
    return True


def identity_of(folder: Path) -> tuple[int, int]:
    stat = folder.stat()
    return stat.st_dev, stat.st_ino


def place_of(file: IO[str], identity: tuple[int, int]) -> Path | None:
    """Return the current path of the directory in which ``file`` was opened; None if it is gone or emptied."""
    with suppress(OSError):
        link = os.readlink(f"/proc/self/fd/{file.fileno()}")
        path = Path(link.removesuffix(REMOVED)).parent
        if (not link.endswith(REMOVED) or identity_of(path) == identity) and not is_emptied(path):
            return path
    return None
