"""Write and read the small files of a run directory. Damage is reported, and the other files are used. Torch-free."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from pydantic_core import from_json

from isobatch.conf.rundir.outcome import Outcome, known_outcome, read_outcome
from isobatch.scaling.reading import Unreadable, parse_json, read_bytes, read_json

Check = Callable[[Any], bool]
MOST = 2**63  # upper bound of steps and samples


@dataclass(frozen=True, slots=True)
class RunFiles:
    """The content of a run's files. Missing and damaged files are empty or None.

    Attributes:
        events, metrics: the readable lines, in order. A half-written last line is left out.
        damage: the first problem and the file it is in; None if there is none.
    """

    outcome: Outcome | None
    plan: dict[str, Any]
    events: list[dict[str, Any]]
    metrics: list[dict[str, Any]]
    damage: str | None


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < MOST


def _is_number(value: Any) -> bool:
    return (type(value) is int and abs(value) < MOST) or (type(value) is float and math.isfinite(value))


def _is_time(value: Any) -> bool:
    with suppress(TypeError, ValueError):
        datetime.fromisoformat(value)
        return True
    return False


def _is_number_or_none(value: Any) -> bool:  # not by _or_none: it is called most
    return value is None or (type(value) is float and math.isfinite(value)) or _is_number(value)


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _has_a_peak(value: Any) -> bool:
    return isinstance(value, dict) and ("peak" not in value or _is_number(value["peak"]))


MEASURES = ("val/", "ema/", "train/")  # how the names of measured values begin
# the checks of the keys that are used; every key is optional
PLAN: dict[str, Check] = {"steps": _or_none(_is_count), "samples": _or_none(_is_count), "lr": _has_a_peak}
EVENT: dict[str, Check] = {
    "event": _is_text, "time": _is_time, "step": _is_count, "per_gpu": _is_count, "per_gpu_before": _is_count,
    "kind": _is_text, "cause": _or_none(_is_text),
}  # fmt: skip
METRICS: dict[str, Check] = {
    "step": _is_count,
    "samples": _is_count,
    "global_size": _is_count,
    **dict.fromkeys(("epoch", "loss", "lr", "samples_per_s", "time_s", *MEASURES), _is_number_or_none),
    **dict.fromkeys(("noise/scale", "noise/trace"), _is_number_or_none),
}
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


def read_run(directory: Path) -> RunFiles:
    """Read the files of the run in ``directory``."""
    outcome, plan, damage = None, dict[str, Any](), list[str]()
    try:
        outcome = read_outcome(directory)
    except Unreadable as error:
        damage.append(f"outcome.json: {error}")
    try:
        plan = _checked(read_json(directory / "plan.json"), PLAN)
    except FileNotFoundError:
        pass
    except Unreadable as error:
        damage.append(f"plan.json: {error}")
    events = _lines(directory / "events.jsonl", EVENT, damage)
    metrics = _lines(directory / "metrics.jsonl", METRICS, damage)
    return RunFiles(outcome, plan, events, metrics, damage[0] if damage else None)


def events(directory: Path) -> list[dict[str, Any]]:
    """Return the events of the run in ``directory``, in order."""
    return _lines(directory / "events.jsonl", EVENT, [])


def last_step(directory: Path) -> int:
    """Return the last step that the run in ``directory`` is known to have completed."""
    ended, logged = known_outcome(directory), _lines(directory / "metrics.jsonl", METRICS, [])
    last: int = logged[-1].get("step", 0) if logged else 0
    return max(ended.step if ended else 0, last)


def _lines(file: Path, checks: Mapping[str, Check], damage: list[str]) -> list[dict[str, Any]]:
    try:
        lines = read_bytes(file).split(b"\n")
    except FileNotFoundError:
        return []
    except Unreadable as error:
        damage.append(f"{file.name}: {error}")
        return []
    whole = _all_at_once(lines[:-1], checks)
    found, first = ([], 1) if whole is None else (whole, len(lines))
    for number, line in enumerate(lines[first - 1 :], first):
        try:
            if line.strip():
                found.append(_checked(parse_json(line), checks))
        except Unreadable as error:
            if number < len(lines) or not line.startswith(b"{"):
                damage.append(f"{file.name}, line {number}: {error}")
    return found


def _all_at_once(lines: Sequence[bytes], checks: Mapping[str, Check]) -> list[dict[str, Any]] | None:
    """Parse and check lines of JSON in a third of the time that one by one takes; None if a line isn't as it should be.

    The lines of a run have few different sets of keys, so that values can be checked by column.
    """
    try:
        found = [from_json(line, allow_inf_nan=False) for line in lines if line.strip()]
    except ValueError:
        return None
    # as many keys as colons: all are flat, and none has a key twice
    if {*map(type, found)} - {dict} or sum(line.count(b'":') for line in lines) != sum(map(len, found)):
        return None
    alike: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for content in found:
        alike.setdefault(tuple(content), []).append(content)
    for names, group in alike.items():
        for name, check in _checks_of(checks, names):
            column = [content[name] for content in group]
            finite = {*map(type, column)} == {float} and math.isfinite(sum(map(abs, column)))
            if not (finite and check(0.5)) and not all(map(check, column)):
                return None
    return found


def _checked(content: Any, checks: Mapping[str, Check]) -> dict[str, Any]:
    """Return ``content`` if it is a mapping whose values pass the checks. Raises Unreadable otherwise."""
    if not isinstance(content, dict):
        raise Unreadable("it isn't a mapping")
    for name, check in _checks_of(checks, content):
        if not check(content[name]):
            raise Unreadable(f"{name:.60} is {content[name]!r:.60}")
    return content


def _checks_of(checks: Mapping[str, Check], names: Iterable[str]) -> list[tuple[str, Check]]:
    """Return the checks of a mapping with these keys. Measured values share the check of their prefix."""
    kinds = {name: next((prefix for prefix in MEASURES if name.startswith(prefix)), name) for name in names}
    return [(name, checks[kind]) for name, kind in kinds.items() if kind in checks]


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
