"""Validate a config and report every mistake in it: the key with its value, and what works."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterable
from difflib import SequenceMatcher, get_close_matches
from typing import Any

from pydantic import ValidationError

from isobatch.conf import keys as schema
from isobatch.conf.elsewhere import our_key, our_value, takes
from isobatch.conf.keys import RECORDED, Place, choices_of, keys, leaves, locate, sections
from isobatch.conf.schema import RunConfig
from isobatch.scaling.errors import UserError
from isobatch.scaling.reading import MOST_DEPTH as READ_DEPTH

DEEPEST = READ_DEPTH // 2  # levels of lists and mappings in a value, so that the written config can be read back
BITS = 64  # of a whole number; tools that read the config hold no longer ones
SHOWN = 400  # characters of a value in a message
CHOOSES = "chooses a task by 'defaults: [override /task: images]', an optimizer or engine likewise"
DELETED = "a key can be null where its comment says so, but not be deleted"


def validated(plain: dict[str, Any]) -> RunConfig:
    """Return ``plain`` as a RunConfig.

    Raises:
        UserError: keys or values aren't valid; the message has a line for each.
    """
    _check_values("", plain)
    try:
        return RunConfig.model_validate_json(json.dumps(plain))
    except ValidationError as error:
        raise _joined(_explained(error, plain)) from None


def _joined(errors: list[UserError]) -> UserError:
    """Return one error with a line for each of ``errors``."""
    first = errors[0]
    return first if len(errors) == 1 else UserError("\n".join(map(str, errors)), key=first.key, value=first.value)


def _check_values(key: str, value: Any, depth: int = 0) -> None:
    """Raise UserError for values that JSON can't hold exactly: free mappings may have any, and all are hashed."""
    if depth > DEEPEST:
        raise UserError(f"{key:.100}… isn't valid", f"it is nested more than {DEEPEST} deep", key)
    if isinstance(value, dict):
        for name, inner in value.items():
            if not isinstance(name, str):
                raise UserError(f"{key} has the key {name!r}", f"keys have to be text, as '{name}' in quotes", key)
            if (name, inner) == ("_target_", "???"):
                example = f"{key}._target_=my_package.My{key.capitalize()}"
                raise UserError(f"{key}={value.get('name')} needs a class", f"give {example}", f"{key}._target_")
            _check_values(f"{key}.{name}" if key else name, inner, depth + 1)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _check_values(f"{key}.{index}", inner, depth + 1)
    elif value == "???":
        raise UserError(f"{key} has to be given", f"give {key}=…", key)
    elif isinstance(value, str) and not value.isascii() and value.encode("utf-8", "ignore").decode() != value:
        raise UserError(f"{key}={value!r:.200} isn't valid", "it isn't Unicode text", key, value)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key}={value} isn't valid", "numbers have to be finite", key, value)
    elif isinstance(value, int) and value.bit_length() > BITS:
        problem = f"{key} is a whole number of {value.bit_length():,} bits"
        raise UserError(problem, f"it has at most {BITS}", key, value)
    elif not isinstance(value, str | int | float | None):
        problem = f"{key}={value!r:.200} isn't valid"
        raise UserError(problem, f"a {type(value).__name__} isn't a value that JSON knows", key, value)


def _explained(error: ValidationError, data: dict[str, Any]) -> list[UserError]:
    """Return an error for each key of ``data`` that isn't valid."""
    found: dict[str, UserError] = {}
    lacking: dict[str, list[str]] = {}  # group → its missing keys
    for fault in error.errors(include_url=False):
        kind, location = fault["type"], fault["loc"]
        if kind == "missing" and isinstance(location[-1], int):  # a list that is too short
            kind, location = "too_short", location[:-1]
        place = locate(location)
        group, _, name = place.key.partition(".")
        if kind == "union_tag_not_found" or (kind == "missing" and name and "." not in name and choices_of(group)):
            lacking.setdefault(group, []).append(name or "name")
        elif kind == "extra_forbidden" and not (group in lacking and place.key in keys()):  # else of another choice
            found |= {key: unknown_key(key, place, _at(data, key)) for key in leaves(place.key, fault["input"])}
        elif kind == "missing":
            found[place.key] = UserError(f"{place.key} has no value", DELETED, place.key)
        elif kind == "union_tag_invalid":
            key = f"{place.key}.name"
            found[key] = _wrong(Place(key, place.kind, place.section), fault["ctx"]["tag"])
        elif kind == "value_error":
            found[place.key] = _own(place.key, fault, data)
        elif kind != "extra_forbidden":
            found[place.key] = _wrong(place, fault["input"])
    for key in {key.rpartition(".")[0] for key in found if key.rpartition(".")[2].isdecimal()}:
        found.pop(key, None)  # of a list, which is too short without its invalid values
    return [*found.values(), *(_lacks(group, names, data[group].get("name")) for group, names in lacking.items())]


def _own(place: str, fault: Any, data: Any) -> UserError:
    """Return the error of a check of ours; that of a single value gets its key."""
    error = fault["ctx"]["error"]
    if place and place not in sections():
        equals = ": " if fault["loc"][-1] == "[key]" else "="
        return UserError(f"{place}{equals}{error.problem}", error.fix, place, fault["input"])
    return UserError(error.problem, error.fix, error.key, _at(data, error.key))


def _at(data: Any, key: str) -> Any:
    """Return the value at a dotted key; None if there is none."""
    for name in key.split("."):
        data = data.get(name) if isinstance(data, dict) else None
    return data


def _wrong(place: Place, value: Any) -> UserError:
    """Return the error for a value, with the valid ones and perhaps the one that was meant."""
    key, names, allowed = place.key, schema.names(place.kind), schema.allowed(place.kind)
    problem = f"{key}={shown(value)} isn't valid"
    if key in sections():
        inside = [other for other in keys() if other.startswith(f"{key}.")]
        meant = our_key(key, value)
        fix = f"did you mean {meant}?" if meant else f"{key} holds {', '.join(inside)}"
        return UserError(problem, f"a YAML {CHOOSES}" if choices_of(key) else fix, key, value)
    hint = nearest(value, names) if isinstance(value, str) else ""
    if isinstance(value, str) and (near := get_close_matches(value, schema.names_in_list(place.kind), n=1)):
        hint = f"did you mean [{near[0]}]?"
    if meant := our_value(key, value):
        hint = f"did you mean {meant}?"
    elif isinstance(value, str) and any("number" in phrase for phrase in allowed) and _is_number(value):
        hint = f"'{value}' is text: leave out its quotes"
    elif isinstance(value, float) and value.is_integer() and any("whole" in phrase for phrase in allowed):
        hint = f"did you mean {int(value)}?"
    elif any(phrase.startswith("text") for phrase in allowed) and isinstance(value, bool | int | float):
        text = f"'{shown(value)}'"
        in_a_list = key.rpartition(".")[2].isdecimal()  # whose places can't be given one by one
        hint = f"in quotes it is text: {text}" if in_a_list else f"as text: {for_shell(f'{key}={text}')}"
    fix = f"it has to be {', or '.join(allowed)}"
    return UserError(problem, f"{fix}; {hint}" if hint else fix, key, value)


def _lacks(group: str, names: list[str], chosen: Any) -> UserError:
    options = choices_of(group)
    base = chosen if chosen in options else "custom" if "custom" in options else options[0]
    return UserError(
        f"{group} has no {', '.join(names)}",
        f"{group}={base} brings every key, and so does a YAML of your own that begins with "
        f"'defaults: [{base}, _self_]'",
        f"{group}.{names[0]}",
    )


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def unknown_key(key: str, place: Place | None = None, value: Any = None) -> UserError:
    """Return the error for an unknown key.

    Args:
        place: where it was found.
        value: the value that it was given.
    """
    section, _, last = key.rpartition(".")
    if key.startswith("experiment."):
        problem = f"an experiment's YAML sets {key}"
        return UserError(problem, "it has to begin with the line '# @package _global_'", key)
    known = sorted(set(keys()) - set(RECORDED))
    if key in known and place:
        choices = " or ".join(f"{section}={choice}" for choice in schema.choices_with(section, last))
        problem = f"{key} isn't a key of this {section}, which has {', '.join(schema.fields(place.section))}"
        return UserError(problem, f"it comes with {choices}" if choices else "", key)

    def likeness(other: str) -> float:
        names = SequenceMatcher(None, last, other.rpartition(".")[2]).ratio()
        return max(SequenceMatcher(None, key, other).ratio(), 0.99 * names)

    leaves = [other for other in known if other not in sections()]
    best = max(map(likeness, leaves))
    near = [other for other in leaves if likeness(other) > best - 0.02][:4] if best > 0.7 else []
    if len(near) == 1 and near[0].endswith(f".{last}"):
        near = [_with_value(near[0], value)]
    if hint := our_key(key, value) or _by_its_last_part(key, value, known) or " or ".join(near):
        return UserError(f"unknown key {key}", f"did you mean {hint}?", key)
    if f"{section}.args" in known:
        shown_value = "…" if value is None else shown(value)
        return UserError(f"unknown key {key}", f"did you mean {section}.args.{last}={shown_value}?", key)
    inside = [other for other in known if other.startswith(f"{key.partition('.')[0]}.")]
    fix = f"there are {', '.join(inside)}" if inside else "--help lists the keys there are"
    return UserError(f"unknown key {key}", fix, key)


def _with_value(key: str, value: Any) -> str:
    """Return ``key=value`` if that is valid and one word in a shell, else the key."""
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    fits = value is not None and re.fullmatch(r"[\w.,:/%+\[\]-]+", text) and takes(key, value)
    return f"{key}={text}" if fits else key


def _by_its_last_part(key: str, value: Any, known: Iterable[str]) -> str:
    """Return what the last part of ``key`` means elsewhere; in a section of ours only what is a key of that."""
    section, _, last = key.rpartition(".")
    if last in {other.rpartition(".")[2] for other in known}:
        return ""
    meant = our_key(last, value)
    return meant if section not in sections() or meant.startswith(f"{section}.") else ""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``did you mean …?`` where a known word is near, else an empty string."""
    near = get_close_matches(word, list(known), n=1)
    return f"did you mean {near[0]}?" if near else ""


def shown(value: Any) -> str:
    """Return a value as on the command line, with its middle left out if it is long."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} … {text[-SHOWN // 2 :]}"


def for_shell(text: str) -> str:
    """Return ``text`` as one word of a command line."""
    return shlex.quote(text) if set(text) & set('"$`\\!') else f'"{text}"'
