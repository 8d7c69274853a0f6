"""Read untrusted small files: regular files only, with bounded size, depth and digits.

A missing file raises FileNotFoundError; every other problem raises Unreadable.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any, NoReturn

import yaml

MOST_BYTES = 1 << 30  # of a file: a metrics.jsonl of about five million steps
YAML_BYTES = 1 << 20
MOST_DEPTH = 64
MOST_NODES = 100_000  # of YAML with its aliases expanded
MOST_DIGITS = 300  # of a number, about as many as the largest float has

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NUMBER = re.compile(r"[-+]?(0[xob])?[0-9a-f_:]+", re.IGNORECASE)


class Unreadable(ValueError):
    """A file or text with invalid content; the message describes the problem."""


def read_bytes(file: Path | str, most: int = MOST_BYTES) -> bytes:
    """Return the content of a regular file of at most ``most`` bytes.

    Raises:
        FileNotFoundError: the file doesn't exist.
        Unreadable: it isn't a regular file (a folder, a pipe, a device), is too large, or can't be read.
    """
    try:
        # without O_NONBLOCK, opening a pipe without a writer would block
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as opened:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise Unreadable("it isn't a regular file")
            if status.st_size > most:
                raise Unreadable(f"it has more than {most:,} bytes")
            return opened.read()  # no length: read(length) allocates all of it at once
    except NotADirectoryError as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(file)) from error
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise Unreadable(f"it can't be read: {error.strerror}") from None
    except ValueError as error:  # NUL in the name
        raise error if isinstance(error, Unreadable) else Unreadable(f"it can't be read: {error}") from None


def read_text(file: Path | str, most: int = MOST_BYTES) -> str:
    """Return the content of a regular UTF-8 file. Raises like ``read_bytes``."""
    try:
        return read_bytes(file, most).decode()
    except UnicodeDecodeError:
        raise Unreadable("it isn't UTF-8 text") from None


def parse_json(text: str | bytes) -> Any:
    """Parse JSON, without NaN, values that no float can hold, or duplicate keys.

    Raises:
        Unreadable: ``text`` isn't valid JSON.
    """
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_constant)
    except Unreadable:
        raise
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"it isn't JSON: {str(error).partition(';')[0]:.100}") from None


def read_json(file: Path | str) -> Any:
    """Parse a JSON file. Raises like ``read_bytes`` and ``parse_json``."""
    return parse_json(read_bytes(file))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise Unreadable("it has a duplicate key")
    for name, value in pairs:
        if type(value) is float and math.isinf(value):
            raise Unreadable(f"{name:.60} is too large")
    return found


def _constant(name: str) -> NoReturn:
    raise Unreadable(f"it isn't JSON: {name} isn't a number")


def read_yaml(file: Path | str) -> Any:
    """Parse a YAML file into plain values.

    Raises:
        FileNotFoundError: the file doesn't exist.
        Unreadable: it can't be read, or ``check_yaml`` rejects it.
    """
    text = read_text(file, YAML_BYTES)
    check_yaml(text)
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        raise Unreadable(f"it isn't YAML: {' '.join(str(error).split()):.200}") from None


def check_yaml(text: str) -> None:
    """Check that loading YAML takes little time and memory, without loading it.

    Raises:
        Unreadable: it isn't YAML, is too deep or too large with its aliases expanded, an alias refers to itself, or a
            number has too many digits.
    """
    nodes: dict[str | None, int] = {}  # nodes under each anchor
    opened: list[tuple[str | None, int]] = [(None, 0)]  # (anchor, nodes before it) of each open collection
    total = 0
    try:
        for event in yaml.parse(text, _Loader):
            if isinstance(event, yaml.AliasEvent):
                if event.anchor not in nodes:
                    raise Unreadable(f"its alias *{event.anchor} is undefined or refers to itself")
                total += nodes[event.anchor]
            elif isinstance(event, yaml.CollectionStartEvent):
                opened.append((event.anchor, total))
                total += 1
                nodes.pop(event.anchor, None)
            elif isinstance(event, yaml.CollectionEndEvent):
                anchor, before = opened.pop()
                if anchor is not None:
                    nodes[anchor] = total - before
            elif isinstance(event, yaml.ScalarEvent):
                total += 1
                if event.anchor is not None:
                    nodes[event.anchor] = 1
                if not event.style and len(event.value) > MOST_DIGITS and _NUMBER.fullmatch(event.value):
                    raise Unreadable(f"it has a number of {len(event.value):,} digits")
            if len(opened) > MOST_DEPTH:
                raise Unreadable(f"it is nested more than {MOST_DEPTH} deep")
            if total > MOST_NODES:
                raise Unreadable(f"it has more than {MOST_NODES:,} values once its aliases are expanded")
    except (yaml.YAMLError, RecursionError) as error:
        raise Unreadable(f"it isn't YAML: {' '.join(str(error).split()):.200}") from None
