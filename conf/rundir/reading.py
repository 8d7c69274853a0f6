"""Read and check the small files of a run directory. Damage is reported, and the other files are used. Torch-free."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import NoneType
from typing import Any

from pydantic_core import from_json

from isobatch.conf.rundir.outcome import Outcome, known_outcome, read_outcome
from isobatch.scaling.reading import Unreadable, parse_json, read_bytes, read_json, read_yaml
from isobatch.scaling.stopping import EVALUATED

Check = Callable[[Any], bool]
MOST = 2**63  # upper bound of steps and samples
HUGE = 1e50  # measured values beyond it, and so beyond single precision, count as not finite: their squares may not be


@dataclass(frozen=True, slots=True)
class RunFiles:
    """The content of a run's files. Missing and damaged files are empty or None.

    Attributes:
        config: ``config.yaml`` as plain values.
        events, metrics: the readable lines, in order. A half-written last line is left out.
        tuned: the results of ``action=tune``, by part.
        damage: the first problem and the file it is in; None if there is none.
    """

    outcome: Outcome | None
    plan: dict[str, Any]
    config: dict[str, Any]
    events: list[dict[str, Any]]
    metrics: list[dict[str, Any]]
    tuned: dict[str, Any]
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


def _is_positive(value: Any) -> bool:
    return _is_count(value) and value > 0


def _is_amount(value: Any) -> bool:
    return value is None or (_is_number(value) and value >= 0)


def _is_rate(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= HUGE


def _with(**checks: Check) -> Check:
    """Return a check of a mapping, whose keys may be missing or null."""
    return lambda value: (
        isinstance(value, dict) and all(value.get(name) is None or check(value[name]) for name, check in checks.items())
    )


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


MEASURES = (*EVALUATED, "train/")  # how the names of measured values begin
# the checks of the keys that are used; every key is optional
PLAN: dict[str, Check] = {
    **dict.fromkeys(("identity", "task"), _or_none(_is_text)),
    **dict.fromkeys(("steps", "samples", "seed"), _or_none(_is_count)),
    **dict.fromkeys(("global_size", "per_gpu", "world_size"), _or_none(_is_positive)),
    "lr": _with(peak=_is_rate),
    "optimizer": _with(name=_is_text),
}
CONFIG: dict[str, Check] = {
    "given": _are_texts,
    "seed": _or_none(_is_count),
    "batch": _with(global_size=lambda value: value == "all" or _is_positive(value)),
    "lr": _with(peak=_is_rate),
    "optimizer": _with(name=_is_text),
    "task": _with(name=_is_text, _target_=_is_text),
    "stop": _with(at=_or_none(_is_text)),
}
TUNED: dict[str, Check] = {"sharpness": _with(sharpness=_is_number, perturbed=_is_number, loss=_is_number)}
EVENT: dict[str, Check] = {
    "event": _is_text, "time": _is_time, "step": _is_count, "per_gpu": _is_count, "per_gpu_before": _is_count,
    "kind": _is_text, "cause": _or_none(_is_text),
}  # fmt: skip
METRICS: dict[str, Check] = {
    "step": _is_count,
    "samples": _is_count,
    "global_size": _is_count,
    **dict.fromkeys(("epoch", "samples_per_s", "time_s"), _is_amount),
    **dict.fromkeys(("loss", "lr", *MEASURES), _is_number_or_none),
    **dict.fromkeys(("noise/scale", "noise/low", "noise/high", "noise/trace"), _is_number_or_none),
    **dict.fromkeys(("control/loss", "control/growth"), _is_number_or_none),
}


def read_run(directory: Path) -> RunFiles:
    """Read the files of the run in ``directory``."""
    outcome, damage = None, list[str]()
    try:
        outcome = read_outcome(directory)
    except Unreadable as error:
        damage.append(f"outcome.json: {error}")
    plan = _mapping(directory / "plan.json", read_json, PLAN, damage)
    config = _mapping(directory / "config.yaml", _read_config, CONFIG, damage)
    events = _lines(directory / "events.jsonl", EVENT, damage)
    metrics = _lines(directory / "metrics.jsonl", METRICS, damage)
    tuned = _mapping(directory / "tune" / "tune.json", read_json, TUNED, damage)
    return RunFiles(outcome, plan, config, events, metrics, tuned, damage[0] if damage else None)


def metric_lines(directory: Path) -> list[dict[str, Any]]:
    """Return the lines of ``metrics.jsonl`` of the run in ``directory``, in order."""
    return _lines(directory / "metrics.jsonl", METRICS, [])


def events(directory: Path) -> list[dict[str, Any]]:
    """Return the events of the run in ``directory``, in order."""
    return _lines(directory / "events.jsonl", EVENT, [])


def last_step(directory: Path) -> int:
    """Return the last step that the run in ``directory`` is known to have completed."""
    ended, logged = known_outcome(directory), metric_lines(directory)
    last: int = logged[-1].get("step", 0) if logged else 0
    return max(ended.step if ended else 0, last)


def _mapping(file: Path, read: Callable[[Path], Any], checks: Mapping[str, Check], damage: list[str]) -> dict[str, Any]:
    try:
        return _checked(read(file), checks)
    except FileNotFoundError:
        return {}
    except Unreadable as error:
        damage.append(f"{file.name}: {error}")
        return {}


def _read_config(file: Path) -> Any:
    """Return a YAML file of sections as values that JSON has: dates and long integers become text."""
    try:
        content = json.loads(json.dumps(read_yaml(file), default=str, allow_nan=False), parse_int=_short)
    except (TypeError, OverflowError) as error:
        raise Unreadable(f"it has values of another kind: {error}") from None
    except ValueError as error:
        raise error if isinstance(error, Unreadable) else Unreadable("it has a value that isn't finite") from None
    if dotted := [name for name in content if "." in name]:
        raise Unreadable(f"{dotted[0]:.60} isn't the name of a section")
    return content


def _short(digits: str) -> int | str:
    return int(digits) if len(digits) <= len(str(MOST)) else digits


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
                found.append(_without_huge(_checked(parse_json(line), checks)))
        except Unreadable as error:
            if number < len(lines) or not line.startswith(b"{"):
                damage.append(f"{file.name}, line {number}: {error}")
    return found


def _all_at_once(lines: Sequence[bytes], checks: Mapping[str, Check]) -> list[dict[str, Any]] | None:
    """Parse and check lines of numbers in a third of the time that one by one takes; None if a line isn't as usual.

    The lines of a run have few different sets of keys, so that values can be checked by column.
    """
    try:
        found = [from_json(line, allow_inf_nan=False) for line in lines if line.strip()]
    except ValueError:
        return None
    # as many keys as colons: all are flat, and none has a key twice
    if {*map(type, found)} - {dict} or sum(line.count(b":") for line in lines) != sum(map(len, found)):
        return None
    alike: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for content in found:
        alike.setdefault(tuple(content), []).append(content)
    for names, group in alike.items():
        found_checks = dict(_checks_of(checks, names))
        for name in names:
            if not _all_usual([content[name] for content in group], found_checks.get(name, _is_number_or_none)):
                return None
    return found


def _all_usual(column: Sequence[Any], check: Check) -> bool:
    """Return whether all values are numbers of a usual size, or null, that pass a check, which is one of a range."""
    kinds = {*map(type, column)}
    values = (min(column), max(column)) if kinds in ({float}, {int}) else column
    return kinds <= {float, int, NoneType} and all(map(check, values)) and all(map(_is_small, values))


def _is_small(value: Any) -> bool:
    return value is None or abs(value) <= HUGE


def _without_huge(content: dict[str, Any]) -> dict[str, Any]:
    return {name: None if type(value) is float and abs(value) > HUGE else value for name, value in content.items()}


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
