"""Test the report's plots, as matplotlib draws them."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import isobatch
from isobatch.scaling.report.compare.picture import Curve, Panel, Picture
from isobatch.scaling.report.compare.plots import _draw_panel, draw
from tests.support.runs import learned, write_run, write_sweep

SINGLE = {"loss", "evaluations", "time", "course"}


def plots(report: isobatch.Report) -> Iterator[Path]:
    """Yield the plots of a report; fail if a PNG or SVG isn't one."""
    assert report.directory
    for name in report.files:
        file = report.directory / name
        if file.suffix == ".png":
            image = Image.open(BytesIO(file.read_bytes()))
            assert len(image.convert("L").getcolors(256) or []) > 10  # something is drawn
            assert 500 < image.width < 2400
            yield file
        elif file.suffix == ".svg":
            assert ElementTree.fromstring(file.read_text()).tag.endswith("svg")
            yield file


def test_a_run_and_a_sweep_have_the_plots_they_have_values_for(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "sweep", (16, 64, 256, 1024))
    files = {file.name for file in plots(isobatch.report(sweep))}
    names = SINGLE | {"by-batch", "target"}
    assert files == {f"{name}.{suffix}" for name in names for suffix in ("png", "svg")}
    of_one = {file.stem for file in plots(isobatch.report(sweep / "batch=16,seed=0"))}
    assert of_one == SINGLE


def test_the_fit_its_interval_and_the_critical_batch_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = write_sweep(tmp_path / "sweep", (16, 64, 256, 1024), seeds=1)
    of_runs = isobatch.report(sweep, "report.target=val/accuracy>=0.95")
    of_points = isobatch.report([], "report.points='1632:35 4096:40 8192:42 32768:56 65536:84.5'")
    assert {file.stem for file in plots(of_points)} == {"forecast"}
    for report, name in ((of_runs, "target.svg"), (of_points, "forecast.svg")):
        critical = f"critical batch {report.comparisons[0].fits[''].critical_batch:,.0f}"[:17]
        drawn = next(file for file in plots(report) if file.name == name)
        assert critical in "".join(ElementTree.fromstring(drawn.read_text()).itertext())
        page = (drawn.parent / "report.html").read_text()
        assert critical in page
        assert '"kind":"band"' in page
        assert "Forecast" in page


@pytest.mark.parametrize("text", ["1e-40:1 1:1.5 1e40:1e41", "1:1e-40 10:1.5e-40 100:1e-39", "3:3 2:5 1:9 2:1"])
def test_extreme_points_are_drawn(tmp_path: Path, text: str, recwarn: pytest.WarningsRecorder) -> None:
    report = isobatch.report([], f"report.points='{text}'", f"report.dir={tmp_path}")
    assert {file.stem for file in plots(report)} == {"forecast"}
    assert not report.warnings
    assert not [str(warning.message) for warning in recwarn if warning.category in (RuntimeWarning, UserWarning)]


def test_a_grid_of_batches_and_rates_has_its_table(tmp_path: Path) -> None:
    for batch in (16, 64):
        for lr in (0.1, 0.2):
            lines = learned(batch, 0, quality=lr * 5, steps=6400 // batch)
            write_run(tmp_path / f"{batch}-{lr}", lines, batch=batch, lr=lr)
    report = isobatch.report(tmp_path)
    file = next(file for file in plots(report) if file.name == "batch-by-lr.svg")
    texts = "".join(ElementTree.fromstring(file.read_text()).itertext())
    assert all(text in texts for text in ("0.1", "0.2", "16", "64", "learning rate", "global batch"))


def test_plots_show_the_groups_of_failed_runs_and_say_which_they_leave_out(tmp_path: Path) -> None:
    write_sweep(tmp_path / "sweep", (16, 64), seeds=1)
    for lr, state in ((0.2, "finished"), (0.4, "crashed")):
        lines = learned(64, 0, quality=0.2, steps=300)
        write_run(tmp_path / "sweep" / str(lr), lines, batch=64, lr=lr, state=state)
    report = isobatch.report(tmp_path / "sweep")
    loss = next(file for file in plots(report) if file.name == "loss.svg").read_text()
    assert "LR 0.4" in loss
    assert "LR 0.2" not in loss
    assert report.directory
    for text in (loss, *((report.directory / name).read_text() for name in ("report.md", "report.html"))):
        assert "those with failed runs are drawn" in text


def test_the_same_runs_give_the_same_files(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "sweep", (16, 64), seeds=2)
    first = {file.name: file.read_bytes() for file in plots(isobatch.report(sweep))}
    again = isobatch.report([sweep], f"report.dir={tmp_path / 'again'}")
    assert {file.name: file.read_bytes() for file in plots(again)} == first


@pytest.mark.parametrize("text", ["$x^{2", "</svg><script>", "a\x1b[2Jb", "日本 ⚙", "%s {0} \\n", "\ud800"])
def test_any_text_of_runs_can_be_drawn(tmp_path: Path, text: str) -> None:
    for batch in (16, 64):
        lines = [line | {f"val/{text}": 0.5} if "val/loss" in line else line for line in learned(batch, 0)]
        write_run(tmp_path / f"{batch}", lines, task=text, batch=batch, task__note=f"{text}{batch}")
    drawn = list(plots(isobatch.report(tmp_path)))
    assert drawn
    assert not any(b"<script" in file.read_bytes() for file in drawn if file.suffix == ".svg")


def test_values_of_any_size_are_drawn_without_a_warning(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    sizes = {
        "loss": itertools.cycle([1e-320, 1e49, 0.0, -1e49, 1e300]),
        "noise/scale": itertools.cycle([1e49, 1e-50, 1e-320]),
    }
    for batch in (1, 2**62):
        lines = [
            {name: next(sizes[name]) if name in sizes else value for name, value in line.items()}
            for line in learned(batch, 0, steps=20)
        ]
        write_run(tmp_path / f"{batch}", [line | {"samples": line["step"]} for line in lines], batch=batch)
    report = isobatch.report(tmp_path)
    assert {file.stem for file in plots(report)} >= SINGLE
    assert not [text for text in report.warnings if "drawn" in text]
    assert not [str(warning.message) for warning in recwarn if warning.category in (RuntimeWarning, UserWarning)]


def test_runs_without_lines_and_with_missing_values_are_drawn(tmp_path: Path) -> None:
    write_run(tmp_path / "empty", [], state="running")
    write_run(tmp_path / "one", learned(64, 0, steps=1), batch=16)
    old = [{name: value for name, value in line.items() if name != "time_s"} for line in learned(64, 1)]
    write_run(tmp_path / "old", old, batch=64)
    holes = [line | {"loss": None} if line["step"] % 3 == 0 and "loss" in line else line for line in learned(256, 2)]
    write_run(tmp_path / "holes", holes, batch=256)
    report = isobatch.report(tmp_path)
    assert {file.stem for file in plots(report)} >= {"loss", "evaluations"}


@pytest.mark.parametrize("ends", [(6e3, 16e3), (3.0, 8.0), (1.0, 50.0), (1.0, 1e6)])
def test_a_logarithmic_axis_has_some_ticks(ends: tuple[float, float]) -> None:
    curve = Curve([1, 2], [*ends], "a", None)
    panel = Panel("", "", "", y_log=True, curves=[curve], x_ticks=[1.0])
    drawn = draw(Picture("a", "", "", [panel]), [])["svg"]
    ticks = [text for text in ElementTree.fromstring(drawn).itertext() if re.fullmatch(r"[\d.,]+( [kM])?", text)]
    assert 3 < len(ticks) < 12, ticks  # one of them at the other axis


def test_tasks_with_similar_names_have_their_own_plots(tmp_path: Path) -> None:
    for task in ("a b", "a/b", "a_b-2", "A_b"):
        write_run(tmp_path / task.replace("/", "|"), learned(16, 0, steps=20), task=task)
    report = isobatch.report(tmp_path)
    losses = [file for file in plots(report) if file.name.endswith("-loss.svg")]
    assert len({file.name.lower() for file in losses}) == len(losses) == 4
    assert report.directory
    markdown = (report.directory / "report.md").read_text()
    assert all(markdown.count(f"({file.name})") == 1 for file in losses)


def test_plots_of_values_that_are_no_longer_there_are_removed(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "sweep", (16, 64), seeds=1)
    before = set(isobatch.report(sweep).files)
    report = isobatch.report(sweep / "batch=16,seed=0", f"report.dir={sweep / 'report'}")
    assert "by-batch.svg" in before - set(report.files)
    assert {file.name for file in (sweep / "report").iterdir()} == set(report.files)


def test_what_cannot_be_drawn_is_a_warning_and_the_rest_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = write_sweep(tmp_path / "sweep", (16, 64), seeds=1)
    drawn = _draw_panel

    def fail(axes: Any, panel: Any, *rest: Any, **more: Any) -> None:
        assert (sweep / "report/report.csv").exists()
        if panel.title == "Learning rate":
            raise OverflowError("a value that it can't draw")
        drawn(axes, panel, *rest, **more)

    monkeypatch.setattr("isobatch.scaling.report.compare.plots._draw_panel", fail)
    report = isobatch.report(sweep)
    assert {file.stem for file in plots(report)} == (SINGLE | {"by-batch", "target"}) - {"course"}
    (warning,) = [text for text in report.warnings if "course" in text]
    assert "a value that it can't draw" in warning
    assert "report.html" in report.files
