"""Read small files that anything may have been done to: bounded in size, depth and digits, and regular files only.

A file that isn't there raises FileNotFoundError; whatever else is wrong raises Unreadable.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from pathlib import Path
from typing import Any, NoReturn

import yaml

MOST_BYTES = 1 << 30  # of a file: metrics.jsonl of some five million steps
YAML_BYTES = 1 << 20
MOST_DEPTH = 64
MOST_NODES = 100_000  # of YAML, an alias counted as what it stands for
MOST_DIGITS = 300  # of a number; no float has more

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NUMBER = re.compile(r"[-+]?(0[xob])?[0-9a-f_:]+", re.IGNORECASE)


class Unreadable(ValueError):
    """A file or a text doesn't hold what it should; the message says what is wrong with it."""


def read_bytes(file: Path | str, most: int = MOST_BYTES) -> bytes:
    """Return the content of a regular file of at most ``most`` bytes.

    Raises:
        FileNotFoundError: it isn't there.
        Unreadable: it is something else (a folder, a pipe, a device), too large, or can't be read.
    """
    try:
        # a pipe that nobody writes to would block without O_NONBLOCK
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as opened:
            about = os.fstat(descriptor)
            if not stat.S_ISREG(about.st_mode):
                raise Unreadable("it isn't a regular file")
            if about.st_size > most:
                raise Unreadable(f"it has more than {most:,} bytes")
            return opened.read()  # as long as it is: with a length, Python takes memory for all of that at once
    except NotADirectoryError as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(file)) from error
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise Unreadable(f"it can't be read: {error.strerror}") from None
    except ValueError as error:  # NUL in the name
        raise error if isinstance(error, Unreadable) else Unreadable(f"it can't be read: {error}") from None


def read_text(file: Path | str, most: int = MOST_BYTES) -> str:
    """Return the content of a regular file that is UTF-8. Raises as ``read_bytes``."""
    try:
        return read_bytes(file, most).decode()
    except UnicodeDecodeError:
        raise Unreadable("it isn't UTF-8 text") from None


def parse_json(text: str | bytes) -> Any:
    """Return what JSON says: no NaN, no key twice.

    Raises:
        Unreadable: it isn't that.
    """
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_constant)
    except Unreadable:
        raise
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"it isn't JSON: {str(error).partition(';')[0]:.100}") from None


def read_json(file: Path | str) -> Any:
    """Return what a JSON file says. Raises as ``read_bytes`` and ``parse_json``."""
    return parse_json(read_bytes(file))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise Unreadable("a key stands there twice")
    return found


def _constant(name: str) -> NoReturn:
    raise Unreadable(f"it isn't JSON: {name} isn't a number")


def read_yaml(file: Path | str) -> Any:
    """Return what a YAML file says, as plain values.

    Raises:
        FileNotFoundError: it isn't there.
        Unreadable: it can't be read, or ``check_yaml`` raises.
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
        Unreadable: it isn't YAML, is too deep or too large once its aliases are expanded, an alias lies within what it
            stands for, or a number has too many digits.
    """
    nodes: dict[str | None, int] = {}  # of what an anchor names
    opened: list[tuple[str | None, int]] = [(None, 0)]  # anchor, and nodes before it
    total = 0
    try:
        for event in yaml.parse(text, _Loader):
            if isinstance(event, yaml.AliasEvent):
                if event.anchor not in nodes:
                    raise Unreadable(f"its alias *{event.anchor} stands for nothing, or for itself")
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
                    raise Unreadable(f"a number there has {len(event.value):,} digits")
            if len(opened) > MOST_DEPTH:
                raise Unreadable(f"it is nested more than {MOST_DEPTH} deep")
            if total > MOST_NODES:
                raise Unreadable(f"it has more than {MOST_NODES:,} values once its aliases are expanded")
    except (yaml.YAMLError, RecursionError) as error:
        raise Unreadable(f"it isn't YAML: {' '.join(str(error).split()):.200}") from None
