"""Test the sorting and filtering of runs, and the list of runs that shows them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from isobatch import launch
from isobatch.conf.compose import compose
from isobatch.scaling.errors import UserError
from isobatch.scaling.report.measures import names_there
from isobatch.scaling.report.run import Run, read
from isobatch.scaling.report.runs import directories, listing
from isobatch.scaling.report.select import chosen, none_meets
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
        ("time=2,step>=5,batch=64", "a"),
        ("peak LR>0,samples/s>0", "abc"),
        ("stopped last by=no space left", "d"),
    ],
)
def test_conditions(runs: list[Run], where: str, left: str) -> None:
    assert names(chosen(runs, where, None)) == left


@pytest.mark.parametrize(
    ("sort", "order"),
    [
        ("val/accuracy", "acbd"), ("-val/accuracy", "bcad"), ("val/loss", "acbd"), ("global_size", "badc"),
        ("-global_size", "cadb"), ("-batch", "cadb"), ("state", "dabc"), ("lr.rule", "dabc"),
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


@pytest.mark.parametrize(("name", "meant"), [("f1", "val/f1"), ("val/acuracy", "val/accuracy"), ("val/xyz", None)])
def test_a_name_is_meant_if_its_last_part_is_like_it(name: str, meant: str | None) -> None:
    known = ["loss", "val/rec", "val/f1", "val/accuracy", *(f"val/m{number}" for number in range(20))]
    fix = names_there(name, known)
    assert fix.startswith(f"did you mean {meant}?") if meant else fix.startswith("there are")
    assert "and 12 others" in fix


@pytest.mark.parametrize(
    ("where", "named"),
    [
        ("state=finishd", ["state is finished (3), crashed (1)"]),
        ("task=moon,state=finished", ["task is digits (3), images (1)"]),
        ("batch.global_size=32", ["batch.global_size is", "64 (2)", "256 (1)"]),
        ("state=finished and task=digits", ["state is", "commas"]),
        ("val/accuracy>0.95,diverged=true", ["val/accuracy is 0.9 (1)", "null (1)", "diverged is false (4)"]),
        ("state=crashed,task=digits", ["each"]),
    ],
)
def test_if_no_run_is_left_the_values_are_named(runs: list[Run], where: str, named: list[str]) -> None:
    fix = none_meets(runs, where).fix
    assert not [text for text in named if text not in fix], fix


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
    assert [Path(run["directory"]).name for run in found] == ["a", "c", "b", "d"]
    values = {"state": "finished", "steps": 5, "planned_steps": 5, "global_size": 64, "time_s": 2.0}
    assert found[0].items() >= values.items()
    assert found[0]["metrics"]["val/accuracy"] == {"last": 0.9, "best": 0.9, "best_step": 5}
    assert found[1]["settings"]["lr.rule"] == "sqrt"
    assert found[3]["cause"] == "no space left"
    none = listing([str(tmp_path)], {}, "text", "seed=1", None)
    assert "seed=1" in none
    assert "seed is 0 (4)" in none
    assert json.loads(listing([str(tmp_path)], {}, "json", "seed=1", None)) == []


@pytest.mark.parametrize("action", ["runs", "report"])
@pytest.mark.parametrize("folder", ["empty", "nosuch"])
def test_a_folder_without_runs_is_refused(runs: list[Run], tmp_path: Path, action: str, folder: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="doesn't exist" if folder == "nosuch" else "no runs") as error:
        launch.main([f"action={action}", f"run.dir={tmp_path / folder}"], [])
    assert (error.value.key, error.value.value) == ("run.dir", str(tmp_path / folder))


@pytest.mark.parametrize("job", ["", "7"])
def test_a_queue_that_cant_be_seen_matters_to_runs_in_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], job: str
) -> None:
    write_run(tmp_path / "run", [])
    (tmp_path / "run" / "events.jsonl").write_text(json.dumps({"event": "start", "job": job}) + "\n")
    (tmp_path / "squeue").write_text("#!/bin/sh\necho down >&2\nexit 1\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    launch.main(["action=runs", f"run.dir={tmp_path}"], [])
    assert ("queue" in capsys.readouterr().err) == bool(job)


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
