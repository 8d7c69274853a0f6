"""Test the forecasts of a report: of a sweep, and of points that are given without runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import isobatch
from isobatch import launch
from isobatch.scaling.errors import UserError
from isobatch.scaling.report.compare.forecasts import comparison_of_points, forecast_rows, forecasts_of
from isobatch.scaling.tuning.forecast import SpeedCurve, fit
from isobatch.trainers.launch.children import guarded
from tests.support.runs import write_sweep

RESNET = "1632:35 4096:40 8192:42 32768:56 65536:84.5"


@pytest.fixture(autouse=True)
def _without_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "plotly", "plotly.offline"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError: nothing is drawn


def command(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, str]:
    assert guarded(lambda: launch.main(list(arguments), [])) == code
    out, err = capsys.readouterr()
    return out, err


def law(batch: float) -> float:
    return 1000 * (1 + batch / 200)


def test_a_sweep_forecasts_batches_between_and_beyond_its_own(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "sweep", (16, 64, 256, 1024), seeds=2)
    report = isobatch.report(sweep, "report.target=val/accuracy>=0.95")
    entry = json.loads(report.json)["fit"][0]
    predictions = {one["batch"]: one for one in entry["predictions"]}
    assert list(predictions) == [4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
    for batch, one in predictions.items():
        samples, steps = one["samples"], one["steps"]
        assert samples["low"] < samples["value"] < samples["high"]
        assert steps["value"] == pytest.approx(samples["value"] / batch)
        assert (one["seconds"] is not None) == (16 <= batch <= 1024)  # speed is never extrapolated
    speed = next(group["samples_per_s"]["mean"] for group in json.loads(report.json)["groups"])
    assert predictions[16]["seconds"]["value"] == pytest.approx(predictions[16]["samples"]["value"] / speed)
    assert [point[0] for point in entry["points"]] == [16, 64, 256, 1024]
    assert report.directory
    for text in (str(report), (report.directory / "report.md").read_text()):
        assert "Forecast to val/accuracy ≥ 0.95" in text
        assert "4,096" in text


def test_a_sweep_that_does_not_bend_has_no_forecast(tmp_path: Path) -> None:
    report = isobatch.report(write_sweep(tmp_path / "sweep", (16, 32), seeds=1), "report.target=val/accuracy>=0.9")
    assert json.loads(report.json)["fit"][0]["predictions"] == []
    assert "Forecast" not in str(report)
    assert "a fit needs 3" in str(report)


def test_published_points_need_no_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out, _ = command(capsys, "action=report", f"report.points={RESNET}")
    assert "fitted critical batch 49,270 (95 % interval 36,270 to 69,930, from 5 batches)" in out
    assert "131,072" in out
    assert not (tmp_path / "report/report.csv").exists()  # a line for each run
    out, _ = command(capsys, "action=report", f"report.points={RESNET}", "output=json", "report.dir=there")
    content = json.loads(out)
    assert content == json.loads((tmp_path / "there/report.json").read_text())
    assert (content["runs"], content["groups"]) == ([], [])
    (entry,) = content["fit"]
    assert entry["target"] is None
    beyond = [one["batch"] for one in entry["predictions"] if not 1632 <= one["batch"] <= 65536]
    assert beyond == [408, 816, 131_072, 262_144]
    again = isobatch.report([], f"report.points='{RESNET}'")
    assert again.comparisons[0].fits[""].critical_batch == entry["critical_batch"]


def test_steps_of_points_in_any_unit_are_relative_to_the_smallest_given_batch() -> None:
    comparison = comparison_of_points(" ".join(f"{batch}:{law(batch)}" for batch in (50, 200, 800)))
    made = comparison.forecasts[""]
    rows = {row["batch"]: row for row in forecast_rows(comparison.fits[""], made, of_points=True)}
    assert rows["50"]["speed-up in steps"] == "1 ×"
    assert rows["800"]["speed-up in steps"] == f"{16 * law(50) / law(800):.3g} ×"
    assert rows["50"]["measured"] == "1,250"
    assert rows["100"]["measured"] is None
    assert rows["200"]["efficiency"] == "50%"
    assert "steps" not in rows["50"]


def test_batches_that_are_no_whole_numbers_stay_as_they_are() -> None:
    """Batches in millions of tokens, for example."""
    made = forecasts_of(fit([0.25, 1, 4], [law(batch * 100) for batch in (0.25, 1, 4)]))
    assert [one.batch for one in made] == [0.0625, 0.125, 0.25, 0.5, 1, 2, 4, 8, 16]


def test_a_table_without_speeds_has_no_times() -> None:
    found = fit([50, 200, 800], [law(batch) for batch in (50, 200, 800)])
    assert not any("time" in row for row in forecast_rows(found, forecasts_of(found), of_points=False))
    timed = forecast_rows(found, forecasts_of(found, SpeedCurve([(50, 10.0), (100, 20.0)])), of_points=False)
    assert [row["batch"] for row in timed if row["time"]] == ["50", "100"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("16:100 64:150", "2 batches are given, and a fit needs 3"),
        ("16:100 64:100 256:100", "the amounts don't bend"),
        ("1:1 4:4 16:16", "the amounts grow in proportion"),
        ("16:100 64:5 256:700 1024:3", "the amounts go up and down"),
    ],
)
def test_points_without_a_bend_say_so(tmp_path: Path, text: str, says: str) -> None:
    report = isobatch.report([], f"report.points='{text}'", f"report.dir={tmp_path}")
    assert says in str(report)
    assert "Forecast" not in str(report)
    assert "reached" not in str(report)


def test_steps_in_place_of_data_are_rejected_with_the_data(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        isobatch.report([], "report.points='64:14100 128:7100 256:3900'", f"report.dir={tmp_path}")
    assert "fall from 14,100 at batch 64 to 3,900 at batch 256, as steps do" in caught.value.problem
    assert "report.points='64:902400 128:908800 256:998400'" in caught.value.fix
    isobatch.report([], "report.points='64:100 128:70 256:60'", f"report.dir={tmp_path}")


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["report.points='16 32'"], "report.points"),
        (["report.points='16:a'"], "report.points"),
        (["report.points='16:1:2'"], "report.points"),
        (["report.points='0:1 1:2'"], "report.points"),
        (["report.points='1:-1'"], "report.points"),
        (["report.points='nan:1'"], "report.points"),
        (["report.points='1:1e60'"], "report.points"),
        (["report.points='1:1 2:2'", "report.metric=val/loss"], "report.points"),
        (["report.points='1:1 2:2'", "report.where=state=finished"], "report.points"),
    ],
)
def test_points_that_cannot_be_read_or_used_are_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], key: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        isobatch.report([], *words)
    assert error.value.key == key
    assert not list(tmp_path.iterdir())


def test_points_beside_runs_are_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, err = command(capsys, "action=report", f"run.dir={tmp_path}", f"report.points={RESNET}", code=2)
    assert "run.dir" in err
    assert not list(tmp_path.iterdir())
