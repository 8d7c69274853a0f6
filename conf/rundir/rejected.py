"""Remove the directory that a start has made and that holds nothing of use, because the start was rejected."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path

from isobatch.conf.rundir.lock import LOCK
from isobatch.conf.rundir.outcome import known_outcome
from isobatch.conf.rundir.owner import OWNER

OF_A_START = {LOCK, OWNER, "config.yaml", "events.jsonl", "outcome.json", "logs"}  # files of one that never trained


@contextmanager
def removed_if_rejected(directory: Path) -> Iterator[None]:
    """Remove ``directory``, and folders made for it, if a start within makes it and is rejected before it trains."""
    made = list(takewhile(lambda folder: not os.path.lexists(folder), (directory, *directory.parents)))
    try:
        yield
    finally:
        if made and _is_rejected(directory):
            with suppress(OSError):  # not empty, or a disk that fails
                _remove(directory)
                for parent in made[1:]:
                    parent.rmdir()


def _is_rejected(directory: Path) -> bool:
    outcome = known_outcome(directory)
    rejected = outcome is not None and outcome.state == "refused" and not outcome.restarts
    return rejected and set(os.listdir(directory)) <= OF_A_START


def _remove(directory: Path) -> None:
    """Remove a rejected start. Put it back where another start has begun there meanwhile."""
    aside = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}")
    directory.rename(aside)
    if _is_rejected(aside):
        shutil.rmtree(aside, ignore_errors=True)
    else:
        aside.rename(directory)
