"""Run functions in forked processes, one per core."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Job = Callable[[Path], Any]
"""A function of an empty folder that returns a JSON value."""


def on_all_cores(jobs: Sequence[Job]) -> list[Any]:
    """Return the results of ``jobs`` in their order; each core runs one at a time.

    Raises:
        RuntimeError: a job failed; the message has what its process printed.
    """
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = [_fork(jobs, first, cores, folder) for first in range(min(cores, len(jobs)))]
        codes = [os.waitpid(process, 0)[1] for process in processes]
        if any(codes):
            logs = [(folder / f"{first}.log").read_text() for first, code in enumerate(codes) if code]
            raise RuntimeError("".join(logs))
        return [json.loads((folder / f"{index}.json").read_text()) for index in range(len(jobs))]


def _fork(jobs: Sequence[Job], first: int, stride: int, folder: Path) -> int:
    """Fork a process that runs every ``stride``-th job, and return its id."""
    if process := os.fork():
        return process
    code = 1
    try:
        log = os.open(folder / f"{first}.log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        for index in range(first, len(jobs), stride):
            (own := folder / str(index)).mkdir()
            (folder / f"{index}.json").write_text(json.dumps(jobs[index](own)))
        code = 0
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
