"""What a tracker is, and what it is told about the run."""

from __future__ import annotations

import json
import math
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from isobatch.conf.rundir.files import write_atomic
from isobatch.conf.rundir.reading import events
from isobatch.conf.trackers import TRACKERS, Log, refuse_missing_packages
from isobatch.scaling.errors import UserError
from isobatch.scaling.reading import read_json, read_yaml
from isobatch.trainers.model.targets import build

Line = dict[str, Any]
CUSTOM = "custom"  # the name of log._target_ in messages and logs
IDENTITY = "trackers.json"  # the file in a run directory with the run's id
SWEEP = re.compile(r".+-sweep-[0-9a-f]{12}(-\d+)?")  # the folder of a sweep, in which each run has a folder


class Tracker(Protocol):
    """Keep the lines of a run. A tracker may also have ``flush()``, called after each batch of lines.

    Attributes:
        rewrites: ``open`` forgets the lines of earlier starts, and each start sends all of them. Such a tracker gets
            lines at once; without it, a tracker gets a line once a checkpoint holds its step, so that no line that it
            has is ever lost and logged again.
    """

    def open(self, run: RunInfo) -> int | None:
        """Open the run, as a new one or the one that ``run.id`` names; return the last step it has, None for none."""

    def write(self, line: Line) -> None:
        """Write the line of one step, later than all before; an evaluation after the step is in the same line."""

    def close(self) -> None:
        """Write what is left, at the end of training, or of an attempt at it."""


@dataclass(frozen=True, slots=True)
class RunInfo:
    """Describe a run to a tracker.

    Attributes:
        id: drawn once for the run.
        name: the name of the run directory; ``group``: the name of the sweep that the run belongs to, or None.
        config, plan: the content of ``config.yaml`` and ``plan.json``.
        began: when the run was first started, in seconds since 1970.
    """

    directory: Path
    id: str
    name: str
    group: str | None
    config: dict[str, Any]
    plan: dict[str, Any]
    began: float

    @classmethod
    def read(cls, directory: Path) -> RunInfo:
        """Read the files of a run, and draw its id if it has none."""
        where = directory.absolute()
        config, plan = read_yaml(where / "config.yaml"), read_json(where / "plan.json")
        starts = [event["time"] for event in events(directory) if event.get("event") == "start" and "time" in event]
        began = datetime.fromisoformat(starts[0]).timestamp() if starts else time.time()
        group = where.parent.name if SWEEP.fullmatch(where.parent.name) else None
        return cls(where, draw_id(directory), where.name, group, config, plan, began)

    def time_of(self, line: Line) -> float:
        """Return when a line was logged, in seconds since 1970, as if the run had trained without a pause."""
        return self.began + (line.get("time_s") or 0.0)

    @property
    def params(self) -> dict[str, Any]:
        """Return the plan and the config as one flat mapping: ``config/batch/global_size``, ``plan/lr/peak``, …"""
        return dict(_leaves({"config": self.config, "plan": self.plan}))


def draw_id(directory: Path) -> str:
    """Return the id of a run in its trackers; draw and store it if there is none.

    Rank 0 draws it before any tracker needs it, while it holds the run directory's lock.
    """
    file = directory / IDENTITY
    if not file.exists():
        write_atomic(file, json.dumps({"id": uuid.uuid4().hex}) + "\n")
    return str(read_json(file)["id"])


def names(log: Log) -> tuple[str, ...]:
    """Return the names of the trackers that a config asks for."""
    return (*log.to, *([CUSTOM] if log.target else []))


def make_tracker(name: str, log: Mapping[str, Any]) -> Tracker:
    """Return the tracker ``name``. Raises UserError if there is none of that name, or its package is missing.

    Args:
        log: the section of that name in ``config.yaml``, in which runs of earlier versions lack keys.
    """
    made: Tracker
    args, target = log.get("args", {}), log.get("_target_")
    if name == CUSTOM and target:
        made = build("log", target, {key: value for key, value in args.items() if key not in TRACKERS})
    elif name in TRACKERS:
        refuse_missing_packages([name])
        module = import_module(f"isobatch.trainers.trackers.{name}")
        made = module.Adapter(TRACKERS[name].model_validate(args.get(name, {}), strict=False))
    else:
        has = "the run has no log._target_" if name == CUSTOM else f"there is no tracker {name!r:.100}"
        raise UserError(has, f"name one of {', '.join(TRACKERS)}, or {CUSTOM} for the log._target_ of the run")
    return made


def numbers(line: Line) -> dict[str, float]:
    """Return the finite numbers of a line, without its step."""
    return {
        name: value
        for name, value in line.items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _leaves(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}/")
        elif value is not None and value not in ({}, []):
            yield f"{prefix}{name}", value if isinstance(value, bool | int | float | str) else json.dumps(value)
