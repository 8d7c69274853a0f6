"""Test the sorting and filtering of runs, and the list of runs that shows them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from isobatch.conf.compose import compose
from isobatch.scaling.errors import UserError
from isobatch.scaling.report.run import Run, read
from isobatch.scaling.report.runs import directories, listing
from isobatch.scaling.report.select import chosen
from tests.support.runs import write_run


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    """Write four runs: a, b and c finished with accuracies of 0.9, 0.7 and 0.8; d has no line yet."""
    for name, accuracy, batch in (("a", 0.9, 64), ("b", 0.7, 16), ("c", 0.8, 256)):
        place = {"step": 5, "samples": 5 * batch, "time_s": 2.0}
        lines = [{**place, "loss": 1 - accuracy}, {**place, "val/loss": 1 - accuracy, "val/accuracy": accuracy}]
        write_run(tmp_path / name, lines, batch=batch, lr__rule="sqrt" if name == "c" else "linear")
    write_run(tmp_path / "d", [], state="crashed", task="images")
    (tmp_path / "d" / "events.jsonl").write_text('{"event": "crashed", "cause": "no space left"}\n')
    return [read(run) for run in directories(tmp_path)]


def names(runs: list[Run]) -> str:
    return "".join(Path(run.directory).name for run in runs)


@pytest.mark.parametrize(
    ("where", "left"),
    [
        ("state=finished", "abc"),
        ("state!=finished", "d"),
        ("val/accuracy>=0.8", "ac"),
        ("val/accuracy>0.8", "a"),
        ("val/loss<0.25 , global_size!=64", "c"),
        ("global_size<=64,task=digits", "ab"),
        ("lr.rule=SQRT", "c"),
        ("diverged=false", "abcd"),
        ("time_s=2.0", "abc"),
        ("val/accuracy=null", "d"),
        ("cause=no space left", "d"),
        ("seed=1", ""),
    ],
)
def test_conditions(runs: list[Run], where: str, left: str) -> None:
    assert names(chosen(runs, where, None)) == left


@pytest.mark.parametrize(
    ("sort", "order"),
    [
        ("val/accuracy", "acbd"), ("-val/accuracy", "bcad"), ("val/loss", "acbd"), ("global_size", "badc"),
        ("-global_size", "cadb"), ("state", "dabc"), ("lr.rule", "dabc"),
    ],
)  # fmt: skip
def test_the_best_comes_first_and_unknown_values_last(runs: list[Run], sort: str, order: str) -> None:
    assert names(chosen(runs, None, sort)) == order


@pytest.mark.parametrize(
    ("where", "sort", "key"),
    [
        ("val/acuracy>0.5", None, "report.where"),
        (None, "val/acuracy", "report.sort"),
        (None, "-val/acuracy", "report.sort"),
    ],
)
def test_an_unknown_name_is_rejected_with_those_there_are(
    runs: list[Run], where: str | None, sort: str | None, key: str
) -> None:
    with pytest.raises(UserError) as error:
        chosen(runs, where, sort)
    assert error.value.key == key
    assert "did you mean val/accuracy?" in error.value.fix
    assert "global_size" in error.value.fix


@pytest.mark.parametrize(
    "where", ["state", "state=finished,", "=3", "val/accuracy>high", "val/accuracy>nan", "state finished"]
)
def test_what_is_no_condition_is_rejected(runs: list[Run], where: str) -> None:
    with pytest.raises(UserError) as error:
        chosen(runs, where, None)
    assert (error.value.key, error.value.value) == ("report.where", where)


def test_conditions_and_targets_need_no_quotes_of_their_own() -> None:
    options = compose(
        ["action=report", "report.where=state=finished,task=digits", "report.target=val/accuracy>=0.97"]
    ).report
    assert (options.where, options.target) == ("state=finished,task=digits", "val/accuracy>=0.97")
    quoted = compose(["report.target='val/accuracy>=0.97'", "report.where=null"]).report
    assert (quoted.target, quoted.where) == ("val/accuracy>=0.97", None)


def test_the_list_is_sorted_filtered_and_whole_as_json(runs: list[Run], tmp_path: Path) -> None:
    text = listing([str(tmp_path)], {}, "text", "state=finished", "val/accuracy")
    assert [line.split()[0][-1] for line in text.splitlines()[1:]] == ["a", "c", "b"]
    found = json.loads(listing([str(tmp_path)], {}, "json", None, "val/accuracy"))
    assert [Path(run["run"]).name for run in found] == ["a", "c", "b", "d"]
    assert found[0].items() >= {"state": "finished", "step": 5, "steps": 5, "global_size": 64, "time_s": 2.0}.items()
    assert found[0]["metrics"]["val/accuracy"] == {"last": 0.9, "best": 0.9, "best_step": 5}
    assert found[1]["settings"]["lr.rule"] == "sqrt"
    assert found[3]["cause"] == "no space left"
    none = listing([str(tmp_path)], {}, "text", "seed=1", None)
    assert "seed=1" in none
    assert json.loads(listing([str(tmp_path)], {}, "json", "seed=1", None)) == []


@pytest.mark.parametrize("width", [50, 60, 80, 200])
def test_the_list_fits_the_terminal(
    runs: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    lines = listing([str(tmp_path)], {}, "text").splitlines()
    table = lines[:5]
    assert max(map(len, table)) <= width
    assert [line.split()[1] for line in table] == ["state", "finished", "finished", "finished", "crashed"]
    assert ("val/accuracy" in table[0]) or "val/accuracy" in lines[-1]


def test_a_run_whose_files_are_damaged_hides_no_other(runs: list[Run], tmp_path: Path) -> None:
    (tmp_path / "b" / "metrics.jsonl").write_bytes(b"\xff\xfe{}\n" * 3)
    lines = listing([str(tmp_path)], {}, "text", None, "val/accuracy").splitlines()
    assert [line.split()[1] for line in lines[1:]] == ["finished", "finished", "damaged", "crashed"]
    assert "metrics.jsonl" in lines[3]
