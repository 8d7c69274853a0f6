"""Test that the type, range and choices of every field of a stored plan are validated."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest

from isobatch.scaling.control import Belief, Control
from isobatch.scaling.plan import EnginePlacement, Intervals, Plan
from isobatch.scaling.planning.capabilities import ABILITIES
from isobatch.scaling.report.plan_json import from_json, to_json
from isobatch.scaling.rules import Rule
from isobatch.scaling.schedule import Segment
from tests.unit.test_plan import WHOLE

(NAME, STAGE), ABLE = next((which, it) for which, it in ABILITIES.items() if which[1] and it.offloads)
assert WHOLE.schedule
# A plan with a value in every field, so that every field is tested.
FULL = replace(
    WHOLE,
    accumulation=2,
    segments=(
        Segment(0, 32, Rule("noise", 0.75, 100.0, True, ("betas",))),
        Segment(512, 48, Rule("noise", 1.0, 100.0)),
    ),
    schedule=replace(WHOLE.schedule, milestones=(500, 700)),
    engine=EnginePlacement(NAME, STAGE, ABLE.shards, ABLE.offloads),
    control=Control(
        "goodput", 16, 64, 8, 100, 2, "adascale", 0.5, 1.0, 1.5, 0.1, 256.0, "second", Belief(100.0, 1.0), 4000
    ),
    decisions=(Segment(300, 32, Rule("noise", 0.75, 100.0, True, ("betas",))),),
    intervals=Intervals(10, 20, 30, 40, keep=50, noise_parts=2),
)
ASKED = ("world", "per_gpu", "accumulation")

WRONG: dict[Any, list[Any]] = {
    int: [True, 1.5, "1", [], {}, -1, -(10**30), 2**64, 10**30, 10**400, float("nan"), float("inf"), "1e3"],
    float: [True, "0.1", "nan", [], {}, -(10**30), 10**30, 10**400, float("nan"), float("inf"), float("-inf")],
    str: ["", "a" * 10_000, "a\0b", "a\x1b[2Jb", "a\nb", "a\u202eb", 1, True, [], {}, ["a"]],
    bool: [0, 1, -1, "true", "", [], {}, None],
    tuple: ["", "ab", 1, True, {}, {"0": 1}, [None], [[]], [{}]],
    dict: ["", "ab", 1, True, [], {}, {"a": 1}, [[]]],
}


def kinds(annotation: Any) -> Iterator[Any]:
    """Yield the plain types that an annotation allows."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from kinds(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for inner in get_args(annotation):
            yield from kinds(inner)
    elif origin is Literal:
        yield str
    elif origin is tuple:
        yield tuple
    else:
        yield dict if is_dataclass(annotation) else annotation


def leaves(
    value: Any, annotation: Any, path: tuple[str | int, ...] = ()
) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Yield the path to every value of a dataclass, with its annotation."""
    if path:
        yield path, annotation
    if is_dataclass(value):
        hints = get_type_hints(type(value), include_extras=True)
        for field in fields(value):
            yield from leaves(getattr(value, field.name), hints[field.name], (*path, field.name))
    elif isinstance(value, tuple):
        while get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
        for index, inner in enumerate(value):
            yield from leaves(inner, get_args(annotation)[0], (*path, index))


LEAVES = list(leaves(FULL, Plan))


def changed(path: tuple[str | int, ...], value: Any) -> str:
    """Return the plan's JSON with another value at ``path``."""
    content = inner = json.loads(to_json(FULL))
    path = ("asked", *path) if path[0] in ASKED else path
    for name in path[:-1]:
        inner = inner[name]
    assert inner[path[-1]] is not None, f"{path} has no value to replace"
    inner[path[-1]] = value
    return json.dumps(content)


def test_the_tested_plan_has_a_value_in_every_field() -> None:
    assert from_json(to_json(FULL)) == FULL
    classes = {
        Plan,
        Segment,
        Rule,
        EnginePlacement,
        Intervals,
        Control,
        Belief,
        type(FULL.base),
        type(FULL.schedule),
        type(FULL.optimizer),
    }
    named = {name for path, _ in LEAVES for name in path if isinstance(name, str)}
    assert named == {field.name for cls in classes for field in fields(cls)}


@pytest.mark.parametrize(("path", "annotation"), LEAVES, ids=[".".join(map(str, path)) for path, _ in LEAVES])
def test_values_of_another_type_or_out_of_range_are_refused(path: tuple[str | int, ...], annotation: Any) -> None:
    allowed = set(kinds(annotation))
    wrong = WRONG[next(iter(allowed - {type(None)}))] + ([] if type(None) in allowed else [None])
    for value in wrong:
        with pytest.raises(ValueError, match=r"not a plan|contradicts itself") as raised:
            from_json(changed(path, value))
        assert "\n" not in str(raised.value)
        assert len(str(raised.value)) < 500


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("engine", "stage"), -1),
        (("engine", "stage"), 4),
        (("engine", "name"), "ddp"),
        (("engine", "name"), "horovod"),
        (("engine", "shards"), []),
        (("engine", "offloads"), ["parameters"]),
        (("optimizer", "name"), "adamx"),
        (("family", ), "poetry"),
        (("identity",), "0123456789aB"),
        (("base_source",), "guessed"),
        (("numerics",), "exact"),
        (("unit",), "boxes"),
        (("schedule", "decay"), "sine"),
        (("schedule", "final"), 1.5),
        (("schedule", "held_until"), 1001),
        (("schedule", "samples"), 999),
        (("base", "betas"), [0.9, 1.0]),
        (("base", "betas"), [0.9, 0.9, 0.9]),
        (("base", "lr"), 0.0),
        (("base", "ema"), 1.5),
        (("segments",), []),
        (("segments", 0, "rule", "name"), "cubic"),
        (("segments", 0, "rule", "fixed"), ["milestones"]),
        (("segments", 0, "rule", "fixed"), ["betas", "betas"]),
        (("segments", 0, "start_sample"), 5),
        (("samples",), 0),
        (("seed",), 2**63),
    ],
)  # fmt: skip
def test_unknown_and_inconsistent_values_are_refused(path: tuple[str | int, ...], value: Any) -> None:
    with pytest.raises(ValueError, match=r"not a plan|contradicts itself"):
        from_json(changed(path, value))
