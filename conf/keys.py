"""Read the keys of a config, and what their values may be, from the schema."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from isobatch.conf.schema import RunConfig
from isobatch.conf.types import Matching, OneOf, Section, tag

HERE = Path(__file__).parent
RECORDED = ("given", "chosen")  # fields of a config that aren't keys
NOUNS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


class Place(NamedTuple):
    """Hold a dotted key, the type of its value, and its section."""

    key: str
    kind: Any
    section: type[Section]


@cache
def keys(section: type[Section] = RunConfig, prefix: str = "") -> tuple[str, ...]:
    """Return all dotted keys: sections and their keys, of a group the keys of each choice."""
    found = []
    for name, kind in fields(section).items():
        found += [prefix + name, *(key for inner in sections_in(kind) for key in keys(inner, f"{prefix}{name}."))]
    return tuple(dict.fromkeys(found))


def sections() -> set[str]:
    """Return the keys that are sections."""
    return {key.rpartition(".")[0] for key in keys()}


def leaves(key: str, value: Any) -> Iterator[str]:
    """Yield the dotted keys below ``key`` that hold values."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from leaves(f"{key}.{name}" if key else str(name), inner)
    elif key:
        yield key


def choices_of(group: str, roots: Iterable[Path] = (HERE,)) -> list[str]:
    """Return the choices of a group; none if ``group`` isn't one."""
    return sorted({file.stem for root in roots for file in (root / group).glob("*.yaml")})


def choices_with(group: str, name: str) -> list[str]:
    """Return the choices of a group that have a key ``name``."""
    members = sections_in(fields(RunConfig).get(group))
    return [tag(one) for one in members if name in fields(one) and tag(one)]


def locate(path: Iterable[str | int]) -> Place:
    """Return the place of a location as pydantic gives it, with the members of unions in its path."""
    names: list[str] = []
    kind: Any = RunConfig
    section: type[Section] = RunConfig
    for part in path:
        inner = sections_in(kind)
        if len(inner) > 1 and part in [tag(one) for one in inner]:
            kind = next(one for one in inner if tag(one) == part)
            continue
        inside = [found for bare, _ in unfolded(kind) if (found := _inside(bare, part)) is not None]
        if inside or inner or kind is Any:
            section = next(iter(inner), section)
            names.append(str(part))
            kind = inside[0] if inside else Any
    return Place(".".join(names), kind, section)


def allowed(kind: Any) -> list[str]:
    """Return a phrase for each alternative that a value of this type may be, names and null last."""
    types = [bare for bare, _ in unfolded(kind)]
    phrases = [_phrase(bare, bounds) for bare, bounds in unfolded(kind) if not _names(bare, bounds)]
    *others, last = names(kind) or [""]
    phrases += [f"{', '.join(others)} or {last}" if others else last, "null" if NoneType in types else ""]
    return [phrase for phrase in phrases if phrase]


def names(kind: Any) -> list[str]:
    """Return the names that a value of this type may be; of a union of sections, their tags."""
    tags = [tag(one) for one in sections_in(kind)]
    return tags or [str(name) for bare, bounds in unfolded(kind) for name in _names(bare, bounds)]


def names_in_list(kind: Any) -> list[str]:
    """Return the names that the values of a list of this type may be."""
    lists = [get_args(bare) for bare, _ in unfolded(kind) if get_origin(bare) is tuple]
    return [name for inner in lists if inner[1:] == (...,) for name in names(inner[0])]


def registered(key: str) -> list[str]:
    """Return the names in the registry of a key's values; none if it has no registry."""
    place = locate(key.split("."))
    return [
        name for _, bounds in unfolded(place.kind) for one in bounds if isinstance(one, OneOf) for name in one.names
    ]


def fields(section: type[Section]) -> dict[str, Any]:
    """Return the keys of a section with their types."""
    return {
        field.alias or name: Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
        for name, field in section.model_fields.items()
    }


def unfolded(kind: Any) -> list[tuple[Any, list[Any]]]:
    """Return the members of a type, each with its bounds."""
    bounds: list[Any] = []
    if get_origin(kind) is Annotated:
        kind, *given = get_args(kind)
        bounds = [one for item in given for one in (item.metadata if isinstance(item, FieldInfo) else [item])]
    if get_origin(kind) in (Union, UnionType):
        return [one for member in get_args(kind) for one in unfolded(member)]
    return [(kind, bounds)]


def sections_in(kind: Any) -> list[type[Section]]:
    """Return the sections among the types of a union."""
    return [bare for bare, _ in unfolded(kind) if isinstance(bare, type) and issubclass(bare, Section)]


def _inside(kind: Any, part: str | int) -> Any:
    """Return the type at ``part`` of a value of this type, or None."""
    inner = get_args(kind)
    if get_origin(kind) is dict:
        return inner[1]
    if get_origin(kind) is tuple:
        return inner[0 if inner[1:] == (...,) else min(part, len(inner) - 1)] if isinstance(part, int) else None
    return fields(kind).get(str(part)) if sections_in(kind) else None


def _names(kind: Any, bounds: list[Any]) -> tuple[Any, ...]:
    if get_origin(kind) is Literal:
        return get_args(kind)
    return next((one.names for one in bounds if isinstance(one, OneOf)), ())


def _phrase(kind: Any, bounds: list[Any]) -> str:
    if like := [one.like for one in bounds if isinstance(one, Matching)]:
        return like[0]
    if get_origin(kind) is dict:
        return "a mapping: {name: value}"
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        if inner[1:] != (...,):
            return f"a list of {len(inner)}"
        *others, last = names(inner[0]) or [""]
        return (
            f"a list, such as [{','.join(others[:2])}], of {', '.join(others)} or {last}" if last else "a list: [a,b]"
        )
    if kind is str and bounds:
        return "text that isn't empty"
    words = {"ge": "from", "gt": "above", "le": "to", "lt": "to less than"}
    found = [f"{text} {getattr(one, name):g}" for name, text in words.items() for one in bounds if hasattr(one, name)]
    return " ".join([NOUNS[kind], *found]) if kind in NOUNS else ""
