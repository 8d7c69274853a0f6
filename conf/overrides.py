"""Hydra's grammar of overrides: ``key=value``, ``group=choice``, ``~key`` and how a value is quoted."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException

from isobatch.conf.elsewhere import our_value
from isobatch.conf.keys import HERE, RECORDED, choices_of, keys, leaves, sections
from isobatch.conf.messages import DELETED, for_shell, nearest, shown, unknown_key
from isobatch.conf.types import TARGET
from isobatch.scaling.errors import UserError
from isobatch.scaling.reading import MOST_DEPTH

CONDITIONS = (
    "stop.at",
    "report.target",
    "report.where",
)  # keys whose values hold =, < or >, which Hydra's grammar lacks
MOST_VALUES = 3000  # of a list in an override: the time to parse it grows with their square


def key_of(word: str) -> str:
    """Return the key of an override; "" of another word of a command. Raises UserError if it can't be read."""
    return parse(word).key_or_group if "=" in word and not word.startswith("-") else ""


def parse(text: str) -> Override:
    """Read ``key=value`` as Hydra does; of keys that hold conditions, the value is text. Raises UserError."""
    key, _, value = text.partition("=")
    if key in CONDITIONS and value[:1] not in ("'", '"', "") and value != "null":
        text = f"{key}={quoted(value)}"
    _refuse_unending(text)
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise _unparsable(text, error) from None
    except (ValueError, RecursionError) as error:  # a number of too many digits
        raise UserError(f"{shown(text)!r} can't be read: {error!s:.200}") from None
    top = override.key_or_group.replace("/", ".").partition(".")[0]
    if top == "hydra":
        raise UserError(f"{text}: Hydra's own settings have no effect here", "--help lists the keys there are", top)
    if top in ("", *RECORDED):
        raise unknown_key(override.key_or_group or text)
    if override.package == override.key_or_group.replace("/", "."):  # its own place, which is redundant
        return parse(text.replace(f"@{override.package}", "", 1))
    return override


def refuse_spaces(words: Sequence[str]) -> None:
    """Raise UserError if a shell has split what was meant as one override: ``key = value``, ``key=two words``."""
    for number, word in enumerate(words):
        if "=" in word.strip("=") or word.startswith("~"):
            continue
        before = words[number - 1] if number else ""
        after = words[number + 1] if number + 1 < len(words) else ""
        value = words[number + 2] if after == "=" and number + 2 < len(words) else ""
        goes_on = word.endswith("=") and after and "=" not in after and not after.startswith("~")
        if after.startswith("=") or goes_on:
            joined = f"{word}{after}{value}"
            raise UserError(f"there are spaces around the = of {joined}", f"leave them out: {shown(joined)}")
        if "=" in before and not word.endswith("="):
            joined = for_shell(f"{before} {word}")
            raise UserError(
                f"{shown(word)!r} isn't key=value", f"if it belongs to {before}, put both in quotes: {joined}"
            )


def _refuse_unending(text: str) -> None:
    """Raise UserError if Hydra's parser would recurse too deep, or take minutes."""
    depth = commas = 0
    for sign in re.sub(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\"""", "", text):
        depth += (sign in "[{(") - (sign in "]})")
        commas += sign == "," and depth > 0
        if depth > MOST_DEPTH:
            raise UserError(f"{shown(text)!r} can't be read: its brackets are nested more than {MOST_DEPTH} deep")
        if commas > MOST_VALUES:
            problem = f"{shown(text)!r} can't be read: a list on the command line has at most {MOST_VALUES:,} values"
            raise UserError(problem, "give it in a YAML of your own (--config-dir)")


def _unparsable(text: str, error: HydraException) -> UserError:
    key, equals, value = text.partition("=")
    if not equals:
        return UserError(f"{shown(text)!r} isn't key=value (or ~key)", "--help shows the command line")
    as_text = f"{key}={quoted(value)}"
    try:
        OverridesParser.create().parse_override(as_text)
    except HydraException:
        return UserError(f"{shown(text)!r} can't be read: {short(error)}")
    name = key.lstrip("+~").partition("@")[0]
    if name not in keys() and not choices_of(name) and not _is_inside_a_value(name):
        return unknown_key(name, value=value)
    if value.startswith("["):
        example = for_shell(f"{key}=['a=1,b=2','c']")
        return UserError(f"{shown(text)!r} can't be read", f"quote each element, as in {example}", key, value)
    fix = f"quote it to make it text: {shown(for_shell(as_text))}"
    return UserError(f"{shown(text)!r} can't be read", fix, key, value)


def _is_inside_a_value(name: str) -> bool:
    """Return whether a key above ``name`` holds a value of its own, such as a mapping."""
    return any(name.startswith(f"{key}.") for key in set(keys()) - sections())


def for_hydra(override: Override, roots: Sequence[Path]) -> str:
    """Return the override as Hydra takes it.

    Hydra needs ``++`` for new keys, so every key gets it. The schema, which knows the keys, rejects unknown ones.
    """
    text, value, group = str(override.input_line), override.value(), override.key_or_group
    options, change = choices_of(group, roots), override.type is OverrideType.CHANGE
    if override.is_delete():
        if group in set(keys()):
            raise UserError(f"{text} deletes a key", DELETED, group)
        return text
    if not options or isinstance(value, dict):
        return f"++{text}" if change and override.package is None else text
    if (HERE / group).is_dir():
        place = override.package
        if place and (change or place.partition(".")[0] not in set(keys())):
            raise UserError(
                f"{text}: no choice of {group} goes to {place}", f"use {group}={shown(value)}", group, value
            )
        if not place and not change:
            fix = f"leave out the +: {group}={shown(value)}"
            raise UserError(f"{text}: {group} is there already", fix, group, value)
    if value is None and group not in set(keys()):
        return f"~{override.get_key_element()}"
    for name in value if isinstance(value, list) else [value]:
        files = [root / group / f"{name}.yaml" for root in roots]
        if ".." in str(name) or not any(os.path.isfile(file) for file in files):
            raise no_such_choice(group, shown(name), options, own=len(roots) > 1)
    return text


def no_such_choice(group: str, name: str, options: Sequence[str], own: bool) -> UserError:
    """Return the error for a choice that a group doesn't have; ``own``: the user's own YAML was looked at."""
    meant = our_value(group, name)
    if "custom" in options and re.fullmatch(TARGET, name):
        meant = f"{group}=custom {group}._target_={name}" + " lr.peak=0.001" * (group == "optimizer")
    near = f"did you mean {meant}?" if meant else nearest(name, options)
    fix = f"{near} {group} can be {', '.join(options)}".lstrip()
    fix += "" if own else f"; {name}.yaml of your own needs --config-dir, the folder above its {group}/"
    return UserError(f"there is no {group}={name}", fix, group, name)


def given_by(override: Override) -> Iterator[str]:
    """Yield the keys that an override gives: for a choice the group, for an element of a list the list."""
    if override.key_or_group != "experiment":
        key = override.package or override.key_or_group
        yield from leaves(re.sub(r"\.\d+(\..*)?$", "", key), override.value())


def quoted(text: str) -> str:
    """Quote ``text`` as one value of Hydra's grammar.

    Within quotes only a backslash before a quote is special; OmegaConf later looks for ``${``.
    """
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    return "'" + re.sub(r"(\\*)('|\Z)", lambda end: 2 * end[1] + ("\\'" if end[2] else ""), text) + "'"


def override(key: str, path: str) -> str:
    """Return ``key=path``, quoted only if Hydra needs it."""
    return f"{key}={path if re.fullmatch(r'/[A-Za-z0-9_/.+-]*', path) else quoted(path)}"


def short(error: Exception) -> str:
    """Return the message of Hydra or OmegaConf in one line."""
    said = str(error) or str(error.__cause__)
    if match := re.search(r"Could not append to config. An item is already at '(.*)'", said):
        return f"{match[1]} is there already; leave out the +"
    if match := re.search(r"Could not delete from config. '(.*)' does not exist", said):
        return f"~{match[1]}: there is no value to delete; a key that is off is null"
    if match := re.search(r"Interpolation key '(.*)' not found", said):
        return f"${{{match[1]}}} names no key of the config; as text it is \\${{{match[1]}}}"
    noise = ("full_key:", "object_type=", "reference_type=", "See https", "Config search path", "provider=")
    lines = [line.strip() for line in said.splitlines() if line.strip() and not line.strip().startswith(noise)]
    return textwrap.shorten(" ".join(lines).removesuffix("."), 400, placeholder=" …")
