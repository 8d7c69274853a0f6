"""Remove the directory that a start has made and that holds nothing of use, because the start was rejected."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path

from isobatch.conf.rundir.lock import LOCK
from isobatch.conf.rundir.outcome import known_outcome
from isobatch.conf.rundir.owner import OWNER

OF_A_START = (LOCK, OWNER, "config.yaml", "events.jsonl", "outcome.json")  # files of one that never trained
LOGS = "logs"


@contextmanager
def removed_if_rejected(directory: Path) -> Iterator[None]:
    """Remove ``directory``, and folders made for it, if a start within makes it and is rejected before it trains.

    Only the files of such a start are removed. A directory with any other file stays.
    """
    made = list(takewhile(lambda folder: not os.path.lexists(folder), (directory, *directory.parents)))
    try:
        yield
    finally:
        with suppress(OSError):  # not empty, or a disk that fails: the rejection is what has to be reported
            if made and _is_rejected(directory):
                _remove(directory)
                for parent in made[1:]:
                    parent.rmdir()


def _is_rejected(directory: Path) -> bool:
    outcome = known_outcome(directory)
    rejected = outcome is not None and outcome.state == "refused" and not outcome.restarts
    return rejected and {*os.listdir(directory)} <= {*OF_A_START, LOGS}


def _remove(directory: Path) -> None:
    """Remove a rejected start. Put it back if another start has begun there meanwhile, or left anything there."""
    aside = directory.with_name(f"rejected-{uuid.uuid4().hex}")
    directory.rename(aside)
    if _is_rejected(aside):
        for file in (*(aside / name for name in OF_A_START), *(aside / LOGS).glob("*rank-*")):
            file.unlink(missing_ok=True)
        with suppress(OSError):  # something has arrived
            if (aside / LOGS).exists():
                (aside / LOGS).rmdir()
            aside.rmdir()
            return
    aside.rename(directory)
