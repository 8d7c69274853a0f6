"""Trackio: its local store, ``~/.cache/huggingface/trackio`` or where TRACKIO_DIR says. ``trackio show`` shows it."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("TRACKIO_STORAGE_MODE", "sqlite")  # its other mode has runs that can't be removed yet

import trackio
from trackio.sqlite_storage import SQLiteStorage

from isobatch.conf.trackers import Trackio
from isobatch.trainers.trackers.tracker import Line, RunInfo, numbers

ID = "isobatch_run"  # the key of its config by which a later start finds the run


class Adapter:
    """Write one run, which each start rewrites: Trackio can remove a run, but not a step."""

    rewrites = True

    def __init__(self, args: Trackio) -> None:
        self._args = args

    def open(self, run: RunInfo) -> None:
        self._project = self._args.project or run.config["task"]["name"]
        known = self._project in SQLiteStorage.get_projects()
        for earlier in trackio.Api().runs(self._project) if known else ():
            if (earlier.config or {}).get(ID) == run.id:
                earlier.delete()
        self._lines = 0
        self._run: Any = trackio.init(
            self._project,
            name=self._args.name or run.name,
            group=self._args.group or run.group,
            config={ID: run.id, **run.params},
            resume="never",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def write(self, line: Line) -> None:
        self._run.log(numbers(line), step=line["step"])
        self._lines += 1

    def close(self) -> None:
        self._run.finish()
        # Trackio reports errors as warnings, from a thread of its own.
        stored = SQLiteStorage.get_log_count(self._project, self._run.name, run_id=self._run.id)
        if stored != self._lines:
            raise OSError(f"Trackio stored {stored:,} of {self._lines:,} lines")
