"""Read the comments beside the keys of a YAML file, which a loader drops."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import yaml


class Line(NamedTuple):
    """Hold a key of a YAML text: its dotted name, row, value as written, and comment."""

    key: str
    row: int
    value: str
    comment: str


def read_lines(text: str, prefix: str = "") -> Iterator[Line]:
    """Yield the keys of a YAML text in order; none if it isn't a mapping."""
    try:
        yield from _lines(yaml.compose(text), text.splitlines(), f"{prefix}." if prefix else "")
    except yaml.YAMLError:
        return


def _lines(node: yaml.Node | None, rows: list[str], prefix: str) -> Iterator[Line]:
    for name, value in node.value if isinstance(node, yaml.MappingNode) else ():
        row, key = name.start_mark.line, f"{prefix}{name.value}"
        beside = value.start_mark.line == row and getattr(value, "flow_style", None) is not False
        start = value.start_mark.column if beside else name.end_mark.column
        end = value.end_mark.column if beside and value.end_mark.line == row else start
        yield Line(key, row, rows[row][start:end], rows[row][end:].partition("# ")[2])
        if not beside:
            yield from _lines(value, rows, f"{key}.")
