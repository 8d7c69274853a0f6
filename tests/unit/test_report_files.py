"""Test what action=report writes and rejects, without matplotlib and plotly."""

from __future__ import annotations

import csv
import io
import json
import threading
from pathlib import Path
from typing import Any

import pytest

import isobatch
from isobatch import launch
from isobatch.conf.compose import compose
from isobatch.conf.schema import Report as Options
from isobatch.scaling.errors import UserError
from isobatch.scaling.report.compare.make import make_report
from isobatch.trainers.launch.children import guarded
from tests.support.golden import golden
from tests.support.runs import learned, write_run, write_sweep

TABLES = {"report.md", "report.csv", "report.json"}


@pytest.fixture(autouse=True)
def _without_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "plotly", "plotly.offline"):
        monkeypatch.setitem(__import__("sys").modules, name, None)  # importing it raises ImportError


def options(**given: str) -> Options:
    return compose(["action=report", *(f"report.{key}={value}" for key, value in given.items())]).report


def test_without_the_extra_there_are_tables_and_a_warning_that_names_it(tmp_path: Path) -> None:
    report = make_report([str(write_sweep(tmp_path / "sweep"))], options())
    assert set(report.files) == TABLES == {file.name for file in (tmp_path / "sweep/report").iterdir()}
    missing = [warning for warning in report.warnings if "isobatch[report]" in warning]
    assert len(missing) == 2
    assert set(missing) <= set(json.loads((tmp_path / "sweep/report/report.json").read_text())["warnings"])
    assert all(warning in str(report) for warning in missing)


def test_the_whole_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_sweep(Path("sweep"), (16, 64, 256, 1024))
    write_run(Path("sweep/crashed"), learned(256, 3, steps=30), batch=256, lr=0.2, state="crashed")
    (Path("sweep/crashed") / "events.jsonl").write_text('{"event": "crashed", "cause": "CUDA error"}\n')
    report = make_report(["sweep"], options(target="val/accuracy>=0.95"))
    golden("report", f"{report}\n\n{(tmp_path / 'sweep/report/report.md').read_text()}")


def test_json_has_the_fields_that_programs_read(tmp_path: Path) -> None:
    make_report([str(write_sweep(tmp_path / "sweep"))], options())
    content = json.loads((tmp_path / "sweep/report/report.json").read_text())
    assert content.keys() >= {"runs", "groups", "fit", "warnings"}
    run = content["runs"][0]
    assert run.keys() >= {
        "directory", "identity", "state", "task", "optimizer", "global_size", "per_gpu", "world_size", "lr_peak",
        "seed", "steps", "samples", "time_s", "samples_per_s", "metrics",
    }  # fmt: skip
    assert run["metrics"]["val/accuracy"].keys() == {"last", "best", "best_step"}
    assert (run["steps"], run["samples"]) == (1600, 25600)
    assert [group["n"] for group in content["groups"]] == [3, 3, 3]


@pytest.mark.parametrize(
    ("roots", "folder"),
    [(["sweep"], "sweep/report"), (["sweep/batch=16,seed=0"], "sweep/batch=16,seed=0/report"), (["."], "report"),
     (["sweep/batch=16,seed=0", "sweep/batch=64,seed=0"], "sweep/report"), (["sweep", "alone"], "report")],
)  # fmt: skip
def test_where_the_report_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, roots: list[str], folder: str) -> None:
    monkeypatch.chdir(tmp_path)
    write_sweep(Path("sweep"), (16, 64), seeds=1)
    write_run(Path("alone"), learned(16, 0))
    assert make_report(roots, options()).directory == tmp_path / folder
    assert (tmp_path / folder / "report.json").exists()
    again = make_report(roots, options())  # the report's folder isn't taken for a run
    assert again.runs
    assert make_report(roots, options(dir="elsewhere")).directory == Path("elsewhere")


def command(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, str]:
    """Run a command; return what it printed to stdout and stderr."""
    assert guarded(lambda: launch.main(list(arguments), [])) == code
    out, err = capsys.readouterr()
    return out, err


def test_the_command_prints_the_table_and_where_the_files_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name, learned(16, 0), seed=int(name == "b"))
    out, _ = command(capsys, "action=report", f"run.dir=[{tmp_path}/a,{tmp_path}/b]")
    assert "digits: 2 runs that differ in the seed alone" in out
    assert f"written to {tmp_path}/report/report.md and 2 more files" in out
    out, _ = command(capsys, "action=report", f"run.dir={tmp_path}", "output=json")
    assert json.loads(out) == json.loads((tmp_path / "report/report.json").read_text())


def test_the_folder_runs_is_reported_by_default(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "runs" in command(capsys, "action=report", code=2)[1]
    write_run(tmp_path / "runs/a", learned(16, 0))
    command(capsys, "action=report")
    assert (tmp_path / "runs/report/report.json").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["run.dir=[a,b]"], "action=report"),
        (["action=plan", "run.dir=[a,b]"], "action=report"),
        (["action=report", "run.dir=a", "report.target=val/acuracy>=0.9"], "val/accuracy"),
        (["action=report", "run.dir=a", "report.metric=val/x:mx"], "val/score:max"),
        (["action=report", "run.dir=nowhere"], "nowhere"),
        (["action=report", "run.dir=a", "report.dirr=x"], "report.dir"),
        (["-m", "action=report", "seed=1,2"], "-m is a sweep"),
    ],
)
def test_a_wrong_command_is_rejected_with_what_works(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    named: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a", learned(16, 0))
    out, err = command(capsys, *arguments, code=2)
    assert not out
    assert named in err
    assert not list(tmp_path.glob("**/report.json"))


@pytest.mark.parametrize("word", ["report.dirr=x", "reprt.dir=x", "report.target=val/acuracy>=0.9", "report.metric=3"])
def test_python_rejects_what_the_command_rejects(tmp_path: Path, capsys: pytest.CaptureFixture[str], word: str) -> None:
    run = write_run(tmp_path / "a", learned(16, 0))
    _, err = command(capsys, "action=report", f"run.dir={run}", word, code=2)
    with pytest.raises(UserError) as error:
        isobatch.report(run, word)
    assert err.endswith(f"isobatch: {error.value}\n")


@pytest.mark.parametrize("word", ["run.dir=x", "output=json", ""])
def test_the_api_is_given_runs_once_and_returns_objects(tmp_path: Path, word: str) -> None:
    run = write_run(tmp_path / "run", learned(16, 0, steps=4))
    with pytest.raises(UserError) as error:
        isobatch.report(*([run, word] if word else [[]]))  # type: ignore[arg-type]
    assert error.value.key == word.partition("=")[0] or (not word and "directories" in error.value.problem)


def test_a_run_with_a_damaged_config_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "a", learned(16, 0))
    (run / "config.yaml").write_text("- [a\n")
    assert "digits: 1 run" in command(capsys, "action=report", f"run.dir={run}")[0]
    listed = command(capsys, "action=runs", f"run.dir={run}")[0]
    assert "damaged" in listed
    assert "config.yaml" in listed


def test_runs_rejected_before_they_had_a_plan_are_one_line(tmp_path: Path) -> None:
    write_run(tmp_path / "runs/good", learned(16, 0))
    for name in ("A", "B"):
        run = write_run(tmp_path / f"runs/{name}", [], state="refused")
        (run / "events.jsonl").write_text(json.dumps({"event": "refused", "cause": f"{name} is wrong"}) + "\n")
        (run / "plan.json").unlink()
    report = make_report([str(tmp_path / "runs")], options())
    assert [(one.task, len(one.runs)) for one in report.comparisons] == [("digits", 1)]
    (warning,) = [text for text in report.warnings if "rejected" in text]
    assert warning.startswith("2 runs were rejected before training: ")
    assert all(f"runs/{name} ({name} is wrong)" in warning for name in ("A", "B"))
    alone = make_report([str(tmp_path / "runs/A")], options())
    assert not alone.comparisons
    assert "1 run was rejected before training" in str(alone)


def test_a_folder_without_runs_is_named(tmp_path: Path) -> None:
    write_run(tmp_path / "runs/a", learned(16, 0))
    (tmp_path / "empty").mkdir()
    for wrong in ("empty", "nowhere"):
        with pytest.raises(UserError) as error:
            make_report([str(tmp_path / "runs"), str(tmp_path / wrong)], options())
        assert (error.value.key, error.value.value) == ("run.dir", str(tmp_path / wrong))


def test_conditions_that_no_run_meets_are_named(tmp_path: Path) -> None:
    write_run(tmp_path / "a", learned(16, 0))
    with pytest.raises(UserError) as error:
        make_report([str(tmp_path)], options(where="seed=7"))
    assert (error.value.key, error.value.value) == ("report.where", "seed=7")


def test_a_report_on_some_of_the_runs_says_so_and_what_it_replaces(tmp_path: Path) -> None:
    for seed in range(4):
        write_run(tmp_path / str(seed), learned(16, seed), seed=seed)
    whole = make_report([str(tmp_path)], options())
    assert (whole.chosen, json.loads(whole.json)["chosen"]) == ("", "")
    part = make_report([str(tmp_path)], options(where="seed<2"))
    markdown = (tmp_path / "report/report.md").read_text().replace("&lt;", "<")
    for text in (str(part), markdown, json.loads(part.json)["chosen"]):
        assert "2 of 4 runs: report.where=seed<2" in text
    (warning,) = [text for text in part.warnings if "replaces" in text]
    assert "4 runs" in warning
    assert "report.dir" in warning
    more = make_report([str(tmp_path)], options())
    assert not [text for text in more.warnings if "replaces" in text]


@pytest.mark.parametrize(
    ("sort", "batches"), [("seed", [64, 256, 16]), ("-seed", [16, 256, 64]), (None, [16, 64, 256])]
)
def test_groups_are_in_the_order_asked_for(tmp_path: Path, sort: str | None, batches: list[int]) -> None:
    for seed, batch in enumerate((64, 256, 16)):
        write_run(tmp_path / str(seed), learned(batch, 0), batch=batch, seed=seed)
    (comparison,) = make_report([str(tmp_path)], options(**({"sort": sort} if sort else {}))).comparisons
    assert [group.global_size for group in comparison.groups] == batches


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    write_run(tmp_path / "a", learned(16, 0))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as error:
        make_report([str(tmp_path / "a")], options(dir=str(tmp_path / "file/report")))
    assert (error.value.key, error.value.value) == ("report.dir", str(tmp_path / "file/report"))


def test_a_run_that_is_named_twice_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs/a", learned(16, 0))
    assert len(make_report(["runs", "runs/a", str(tmp_path / "runs")], options()).runs) == 1


def test_runs_that_change_meanwhile_are_reported(tmp_path: Path) -> None:
    """A thread appends half lines, replaces the file as a resume does, and removes it, again and again."""
    run = write_run(tmp_path / "a", learned(16, 0), state="running")
    file, done = run / "metrics.jsonl", threading.Event()
    content = file.read_text()

    def change() -> None:
        while not done.is_set():
            with open(file, "a") as opened:
                opened.write('{"step": 101, "samp')
            (run / "new").write_text(content[: len(content) // 2])
            (run / "new").rename(file)
            file.unlink()

    thread = threading.Thread(target=change)
    thread.start()
    try:
        states = {make_report([str(run)], options()).runs[0].state for _ in range(20)}
    finally:
        done.set()
        thread.join()
    assert states == {"died"}


@pytest.mark.parametrize("given", [{"target": ""}, {"metric": "3"}, {"sort": "[a]"}])
def test_values_of_another_kind_are_rejected(given: dict[str, Any]) -> None:
    with pytest.raises(UserError) as error:
        options(**given)
    assert error.value.key == f"report.{next(iter(given))}"


def test_an_earlier_reports_plots_are_removed_and_nothing_else(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", learned(16, 0))
    folder, outside = run / "report", tmp_path / "outside.svg"
    folder.mkdir()
    listed = ["old.svg", "old.png", "report.html", "gone.svg", "folder.svg", "notes.txt", "../outside.svg", "", 3, None]
    (folder / "report.json").write_text(json.dumps({"files": [*listed, str(outside), "\ud800.svg", "a\0.svg"]}))
    for file in (*(folder / name for name in ("old.svg", "old.png", "report.html", "notes.txt", "mine.svg")), outside):
        file.write_text("")
    (folder / "folder.svg").mkdir()
    report = make_report([str(run)], options())
    assert {file.name for file in folder.iterdir()} == TABLES | {"notes.txt", "mine.svg", "folder.svg"}
    assert outside.exists()
    assert set(json.loads(report.json)["files"]) == TABLES


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", '{"files": 3}', '{"files": {"a.svg": 1}}', "\udcff", '{"runs": [3, {"directory": []}]}', None],
)
def test_a_damaged_report_is_replaced(tmp_path: Path, content: str | None) -> None:
    run = write_run(tmp_path / "a", learned(16, 0))
    (run / "report").mkdir()
    if content is None:
        (run / "report/report.json").symlink_to("/dev/zero")
    else:
        (run / "report/report.json").write_bytes(content.encode(errors="surrogateescape"))
    make_report([str(run)], options())
    assert json.loads((run / "report/report.json").read_text())["runs"]


def test_text_is_no_formula_and_a_number_stays_one(tmp_path: Path) -> None:
    formulas = ["=1+1", "+1", "-2+3", "@SUM(A1)"]
    for number, formula in enumerate(formulas):
        write_run(tmp_path / str(number), ended(-0.5, formula), task=formula, task__note=formula)
    report = make_report([str(tmp_path)], options())
    assert report.directory
    lines = list(csv.DictReader(io.StringIO((report.directory / "report.csv").read_text())))
    assert [line["task"] for line in lines] == [line["task.note"] for line in lines] == [f"'{f}" for f in formulas]
    assert [line["val/score:last"] for line in lines] == ["-0.5"] * 4


def ended(value: float, note: str) -> list[dict[str, Any]]:
    return [
        {"step": 1, "samples": 16, "loss": 1.0},
        {"step": 1, "samples": 16, "val/score": value, f"train/{note}": 1.0},
    ]
