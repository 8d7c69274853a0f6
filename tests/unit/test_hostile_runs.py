"""Test that no content of a run directory stops action=report or action=runs, or hides the other runs."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from isobatch import launch
from isobatch.conf.rundir.reading import read_run
from isobatch.trainers.launch.children import guarded
from tests.support.examples import examples
from tests.support.runs import learned, write_run

HOSTILE: list[Any] = [
    None, "", "x", "\ud800", "=1+1", "<script>", True, False, [], {}, [[1]], {"a": {"b": 1}}, ["x", 1], -1, 0, 1, 2**63,
    10**60, -0.5, 0.5, 1e-320, 1e-300, 1e49, 1e300, -1e300, float("inf"), float("nan"),
]  # fmt: skip
FILES = ("plan.json", "config.yaml", "outcome.json", "events.jsonl", "metrics.jsonl")


@pytest.fixture(scope="module", autouse=True)
def _tables_only() -> Iterator[None]:
    """Leave out what takes time: plots, the page, and the queue."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PATH", "")
        for name in ("matplotlib", "plotly", "plotly.offline"):
            patched.setitem(__import__("sys").modules, name, None)
        yield


def paths(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value within ``content``."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inner:
        yield (*path, key)
        yield from paths(value, (*path, key))


def load(file: Path) -> Any:
    text = file.read_text()
    if file.suffix == ".yaml":
        return yaml.safe_load(text)
    return json.loads(text) if file.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


def save(file: Path, content: Any) -> None:
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(line) + "\n" for line in content))
    else:
        file.write_text(yaml.safe_dump(content) if file.suffix == ".yaml" else json.dumps(content))


def spoil(run: Path, changes: dict[str, list[tuple[tuple[Any, ...], Any]]]) -> None:
    """Set values of a run's files at their paths; the value ``...`` removes a key."""
    for name, places in changes.items():
        content = load(run / name)
        for path, value in places:
            try:
                inner = content
                for key in path[:-1]:
                    inner = inner[key]
                if value is ...:
                    del inner[path[-1]]
                else:
                    inner[path[-1]] = value
            except (KeyError, IndexError, TypeError):
                pass  # an earlier change removed the place
        save(run / name, content)


def write_runs(folder: Path) -> Path:
    """Write three runs, and return the one that is to be spoiled."""
    for batch in (16, 64):
        write_run(folder / f"{batch}", learned(batch, 0, steps=4), batch=batch, lr__base=0.1, task__args={"a": 1})
    return write_run(folder / "spoiled", learned(64, 1, steps=4), batch=64, seed=1, lr__base=0.1, task__args={"a": 1})


def check(capsys: pytest.CaptureFixture[str], folder: Path) -> dict[str, Any]:
    """Report and list the runs in ``folder``; check that all are there. Return ``report.json``."""
    for command in (["action=report"], ["action=runs"], ["action=runs", "output=json"]):
        code = guarded(lambda command=command: launch.main([*command, f"run.dir={folder}"], []))  # type: ignore[misc]
        out, err = capsys.readouterr()
        assert code == 0, err
        assert "Traceback" not in err
        out.encode()
        if command == ["action=runs"]:
            assert len(out.splitlines()) == 4, out
    content: dict[str, Any] = json.loads((folder / "report/report.json").read_text(), parse_constant=pytest.fail)
    assert len(content["runs"]) == 3
    assert len(list(csv.DictReader(io.StringIO((folder / "report/report.csv").read_text())))) == 3
    assert sum(group["n"] for group in content["groups"]) >= 2
    return content


def places() -> dict[str, list[tuple[Any, ...]]]:
    with tempfile.TemporaryDirectory() as folder:
        run = write_runs(Path(folder))
        return {name: list(paths(load(run / name))) for name in FILES}


PLACES = places()


@st.composite
def changes(draw: st.DrawFn) -> dict[str, list[tuple[tuple[Any, ...], Any]]]:
    found: dict[str, list[tuple[tuple[Any, ...], Any]]] = {}
    for name in draw(st.lists(st.sampled_from(FILES), min_size=1, unique=True)):
        place = st.sampled_from(PLACES[name])
        found[name] = draw(st.lists(st.tuples(place, st.sampled_from([*HOSTILE, ...])), min_size=1, max_size=6))
    return found


@given(changes())
@examples(50)
def test_any_values_in_any_places_are_reported(
    capsys: pytest.CaptureFixture[str], changed: dict[str, list[tuple[tuple[Any, ...], Any]]]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        spoil(write_runs(Path(folder)), changed)
        check(capsys, Path(folder))


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [("plan.json", ("task",), "\ud800"), ("outcome.json", ("cause",), "\ud800"),
     ("metrics.jsonl", (-1, "epoch"), 1e-320), ("metrics.jsonl", (-1, "val/accuracy"), 1e300),
     ("metrics.jsonl", (-2, "time_s"), 1e-320), ("config.yaml", ("task.args",), {}),
     ("config.yaml", ("lr",), {"base": "x"}), ("config.yaml", ("given",), None),
     ("config.yaml", ("optimizer", "name"), float("nan")), ("plan.json", ("global_size",), -1)],
)  # fmt: skip
def test_values_that_once_stopped_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, path: tuple[Any, ...], value: Any
) -> None:
    spoil(write_runs(tmp_path), {name: [(path, value)]})
    check(capsys, tmp_path)


@pytest.mark.parametrize("place", ["global_size", "task", "given", "lr"])
def test_a_wrong_value_is_damage_which_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str) -> None:
    name = "config.yaml" if place in ("given", "lr") else "plan.json"
    spoil(write_runs(tmp_path), {name: [((place,), -1)]})
    content = check(capsys, tmp_path)
    (spoiled,) = [run for run in content["runs"] if run["directory"].endswith("spoiled")]
    assert (spoiled["state"], spoiled["cause"]) == ("damaged", f"{name}: {place} is -1")
    assert any("damaged" in text and f"{name}: {place} is -1" in text for text in content["warnings"])


# ---- many lines at once


def _line(parts: list[tuple[str, str]], colon: str) -> str:
    return "{" + ", ".join(f'"{name}"{colon}{value}' for name, value in parts) + "}"


PARTS = st.tuples(
    st.sampled_from(["step", "loss", "val/x", "x", "a:b", '\\"b', "step\\u0020", "st\\u0065p"]),
    st.sampled_from(["1", "0.5", "null", "1e999", "-1e999", "1e60", "1" * 5000, "-1", "NaN", "Infinity", "1.", "01",
                     "-0", "1E5", "1e-400", '"x"', '"\\ud800"', '"a:b"', "[]", "[1e999]", '{"loss": 1}', "{}", "true"]),
)  # fmt: skip
LINES = st.builds(_line, st.lists(PARTS, max_size=3), st.sampled_from([":", " : ", ": "]))
ODD = st.sampled_from(["", " ", "[1]", "{", "\ufeff{}", '{"loss": 1} {}', '{"loss": 1},{"loss": 2}', "\r", "\x00"])


@given(st.lists(st.one_of(LINES, LINES, ODD), min_size=1, max_size=3))
@examples(400)
def test_lines_are_read_alike_at_once_and_one_by_one(lines: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "metrics.jsonl"
        file.write_bytes("".join(f"{line}\n" for line in lines).encode())
        at_once = read_run(Path(folder))
        file.write_bytes(file.read_bytes() + b"[]\n")  # which no fast path accepts
        one_by_one = read_run(Path(folder))
        assert repr(at_once.metrics) == repr(one_by_one.metrics)
        assert at_once.damage in (one_by_one.damage, None)
        assert (at_once.damage is None) == (
            one_by_one.damage == f"metrics.jsonl, line {len(lines) + 1}: it isn't a mapping"
        )
