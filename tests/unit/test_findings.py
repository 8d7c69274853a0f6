"""Test that a report claims no more than its runs show, and by what target it measures them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from isobatch.scaling.errors import UserError
from isobatch.scaling.report.compare.flatness import _still_falls
from isobatch.scaling.report.compare.measure import asked
from isobatch.scaling.report.compare.pictures import pictures_of
from isobatch.scaling.report.compare.tables import text_of
from isobatch.scaling.report.run import read
from tests.support.compared import compare, ended, read_all, write_values
from tests.support.runs import learned, write_run

Values = dict[tuple[int, float], list[float]]


def findings(folder: Path, values: Values) -> str:
    return "\n".join(compare(read_all(write_values(folder, values))).comparisons[0].findings)


def test_two_groups_of_one_seed_have_no_sure_order(tmp_path: Path) -> None:
    found = findings(tmp_path, {(16, 0.1): [0.9], (64, 0.1): [0.8]})
    assert "chance" in found.splitlines()[0]
    assert "isn't tested" in found.splitlines()[1]


def test_seeds_without_spread_show_it_as_zero(tmp_path: Path) -> None:
    found = findings(tmp_path, {(16, 0.1): [0.9, 0.9], (64, 0.1): [0.8, 0.8]})
    assert "0.9 ± 0, then batch 64" in found
    assert "isn't known" in found


def test_equal_groups_are_in_the_order_of_batch_rate_and_name(tmp_path: Path) -> None:
    for width in (2, 1):
        values: Values = {(64, 0.1): [0.9], (16, 0.2): [0.9], (16, 0.1): [0.9]}
        write_values(tmp_path / str(width), values, task__width=width)
    comparison = compare(read_all(tmp_path)).comparisons[0]
    assert [(group.global_size, group.lr_peak, group.family) for group, _ in comparison.ranked()] == [
        (batch, lr, f"width={width}") for batch, lr in ((16, 0.1), (16, 0.2), (64, 0.1)) for width in (1, 2)
    ]
    assert "all with 0.9" in comparison.findings[0]


def test_a_group_without_finite_values_wins_and_loses_nothing(tmp_path: Path) -> None:
    write_values(tmp_path, {(16, 0.1): [0.9, 0.8]})
    for seed in range(2):
        lines = [*ended(0.9), {"step": 11, "samples": 704, "val/accuracy": None}]
        write_run(tmp_path / f"nan{seed}", lines, batch=64, seed=seed)
    found = compare(read_all(tmp_path)).comparisons[0].findings[0]
    assert "only batch 16" in found
    assert "nothing is compared" in found


def test_a_third_group_that_chance_may_explain_is_named(tmp_path: Path) -> None:
    values: Values = {(16, 0.1): [0.90, 0.91, 0.92], (64, 0.1): [0.80, 0.81, 0.82], (256, 0.1): [0.5, 0.8, 1.1]}
    assert "can't be told apart from batch 256" in findings(tmp_path, values)


def test_a_run_that_ended_early_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", ended(0.9))
    outcome = run / "outcome.json"
    outcome.write_text(outcome.read_text().replace('"cause": ""', '"cause": "stop.after=1min: it is 61 s"'))
    assert "early: stop.after=1min" in compare(read_all(tmp_path)).comparisons[0].findings[0]
    write_run(tmp_path / "b", ended(0.9), batch=16)
    (warning,) = compare(read_all(tmp_path)).warnings
    assert warning.endswith("compare them by report.target")
    assert "report.target" not in compare(read_all(tmp_path), target="val/accuracy>=0.7").warnings[0]


def test_the_usual_target_leaves_out_groups_that_hardly_learned(tmp_path: Path) -> None:
    write_values(tmp_path, {(16, 0.1): [0.97, 0.96], (64, 0.1): [0.95, 0.9], (256, 0.1): [0.2, 0.15]})
    report = compare(read_all(tmp_path))
    assert str(report.comparisons[0].target) == "val/accuracy ≥ 0.9"
    text = text_of(report)
    assert text.count("reached it") == 1
    assert "0 of 2 reached it" in text
    assert "(the best value that every counted run reached; runs that got less than halfway to the overall" in text


@pytest.mark.parametrize("direction", ["min", "max"])
def test_the_usual_target_of_runs_evaluated_once_is_reached_by_one_at_least(tmp_path: Path, direction: str) -> None:
    for batch, value in ((16, 0.5), (64, 0.5), (256, 0.4)):
        line = {"step": 1, "samples": batch, "loss": 1.0}
        write_run(tmp_path / str(batch), [line, {"step": 1, "samples": batch, "val/accuracy": value}], batch=batch)
    runs = read_all(tmp_path)
    for run in runs:
        run.measures["val/accuracy"].direction = "min" if direction == "min" else "max"
    (comparison,) = compare(runs, f"val/accuracy:{direction}").comparisons
    assert [values.reached for values in comparison.values] == ([0, 0, 1] if direction == "min" else [1, 1, 0])


CONTRADICTIONS = [
    ("val/loss:max", "val/loss<=0.3"), ("val/accuracy:min", "val/accuracy>=0.9"), (None, "val/loss>=0.3"),
    ("val/accuracy", "val/loss>0.3"),
]  # fmt: skip


@pytest.mark.parametrize(("metric", "target"), CONTRADICTIONS)
def test_a_target_against_the_better_direction_is_rejected(metric: str | None, target: str) -> None:
    with pytest.raises(UserError) as error:
        asked(metric, target)
    assert (error.value.key, error.value.value) == ("report.target", target)
    assert "report.metric=" in error.value.fix


@pytest.mark.parametrize("bound", ["nan", "inf", "-inf", "1e999", "9" * 400])
def test_a_target_that_is_no_finite_number_is_rejected(bound: str) -> None:
    with pytest.raises(UserError) as error:
        asked(None, f"val/accuracy>={bound}")
    assert error.value.key == "report.target"


def test_a_measure_of_unknown_direction_needs_one_also_beside_another_target(tmp_path: Path) -> None:
    write_run(tmp_path / "a", ended(0.9, name="val/glow"))
    with pytest.raises(UserError) as error:
        compare(read_all(tmp_path), "val/glow", "loss<=1.5")
    assert error.value.key == "report.metric"


def test_the_fit_and_the_plotted_points_are_of_the_same_groups(tmp_path: Path) -> None:
    """At each batch the slower rate has the better value at the end."""
    for batch in (16, 64, 256, 1024):
        lines = learned(batch, 0, steps=25_600 // batch)
        write_run(tmp_path / f"quick{batch}", lines, batch=batch, lr=0.2)
        slow = [
            line | ({"val/accuracy": line["val/accuracy"] - 0.1 * (line["step"] < lines[-1]["step"]) + 0.01})
            for line in lines
            if "val/accuracy" in line
        ]
        write_run(tmp_path / f"slow{batch}", slow, batch=batch, lr=0.1)
    (comparison,) = compare(read_all(tmp_path), target="val/accuracy>=0.9").comparisons
    assert {group.lr_peak for group, _ in comparison.best_lrs()} == {0.1}
    (picture,) = [picture for picture in pictures_of(comparison) if picture.name == "target"]
    (panel,) = [panel for panel in picture.panels if panel.title.startswith("Samples")]
    fitted = comparison.fits[""]
    points = next(curve for curve in panel.curves if curve.kind != "guide")
    for x, y in zip(points.x, points.y, strict=True):
        assert x is not None
        assert y == pytest.approx(fitted.predict(x), rel=0.2)
    assert any("LR 0.2" in text for text in points.texts)
    assert not any("LR 0.1" in text for text in points.texts)


def test_one_is_no_plural(tmp_path: Path) -> None:
    write_values(tmp_path, {(16, 0.1): [0.9], (64, 0.1): [0.5]})
    text = text_of(compare(read_all(tmp_path), target="val/accuracy>=0.8"))
    assert "1 batch reached the target" in text
    assert "1 batches" not in text


def with_sharpness(
    folder: Path, values: Values, of: dict[int, list[float]], losses: dict[int, float] | None = None
) -> str:
    """Return the report's text of runs of which the sharpness is known, a list by seed for each batch.

    Args:
        losses: the training loss by batch, of the samples at which the sharpness was measured.
    """
    write_values(folder, values)
    for run in read_all(folder):
        assert run.recipe.global_size
        assert run.recipe.seed is not None
        loss = (losses or {}).get(run.recipe.global_size, 0.5) + 0.001 * run.recipe.seed
        found = {"sharpness": of[run.recipe.global_size][run.recipe.seed], "perturbed": 0.25, "loss": loss}
        (Path(run.directory) / "tune").mkdir()
        (Path(run.directory) / "tune" / "tune.json").write_text(json.dumps({"sharpness": found, "noise": {}}))
    return text_of(compare(read_all(folder)))


def test_a_report_says_whether_smaller_batches_ended_flatter(tmp_path: Path) -> None:
    """By seeds, both ways and unclear; the columns are in the table."""
    values: Values = {(16, 0.1): [0.9, 0.91], (64, 0.1): [0.8, 0.81]}
    flatter = with_sharpness(tmp_path / "a", values, {16: [3.0, 3.1], 64: [9.0, 9.2]})
    expected = (
        "did smaller batches end flatter? Yes: by the largest curvature, batch 16 ended flatter (3.05 against 9.1). "
    )
    assert f"{expected}No: by the loss added by a perturbation, batch 16 and batch 64 ended alike (0.25)\n" in flatter
    head = next(line for line in flatter.splitlines() if line.startswith("group"))
    assert head.split()[-2:] == ["sharpness", "perturbed"]
    assert "3.050 ± 0.071" in flatter
    large = with_sharpness(tmp_path / "b", values, {16: [9.0, 9.2], 64: [3.0, 3.1]})
    assert "flatter? No: by the largest curvature, batch 64 ended flatter (3.05 against 9.1)" in large
    assert "this may be chance" not in large
    unclear = with_sharpness(tmp_path / "c", values, {16: [3.0, 9.0], 64: [4.0, 11.0]})
    assert "Not clear: by the largest curvature, seeds differ as much as the batches (6 at batch 16, 7.5 at" in unclear


def test_flatness_of_one_seed_may_be_chance(tmp_path: Path) -> None:
    each = with_sharpness(tmp_path / "a", {(16, 0.1): [0.9], (64, 0.1): [0.8]}, {16: [3.0], 64: [9.0]})
    assert each.count("With one seed each this may be chance") == 1
    one = with_sharpness(tmp_path / "b", {(16, 0.1): [0.9, 0.91], (64, 0.1): [0.8]}, {16: [3.0, 3.1], 64: [9.0]})
    assert "With one seed at batch 64 this may be chance" in one


def test_flatness_of_batches_out_of_order_is_said(tmp_path: Path) -> None:
    values: Values = {(16, 0.1): [0.9, 0.91], (32, 0.1): [0.85, 0.86], (64, 0.1): [0.8, 0.81]}
    sharp = {16: [3.0, 3.1], 32: [1.0, 1.1], 64: [9.0, 9.2]}
    text = with_sharpness(tmp_path, values, sharp)
    assert "(3.05 against 9.1). The batches between them aren't in order. No: by the loss added" in text


def test_flatness_is_no_comparison_of_minima_at_other_losses(tmp_path: Path) -> None:
    values: Values = {(16, 0.1): [0.9, 0.91], (64, 0.1): [0.8, 0.81]}
    of = {16: [3.0, 3.1], 64: [9.0, 9.2]}
    assert "But their" not in with_sharpness(tmp_path / "a", values, of, {16: 0.5, 64: 0.52})
    apart = with_sharpness(tmp_path / "b", values, of, {16: 0.25, 64: 0.5})
    expected = ". But their training losses differ (0.2505 at batch 16, 0.5005 at batch 64), and curvature changes with"
    assert expected in apart


@pytest.mark.parametrize(("fall", "falls"), [(0.0, False), (0.02, True)])
def test_flatness_of_runs_that_still_learn_is_said(tmp_path: Path, fall: float, falls: bool) -> None:
    steps = range(1, 101)
    lines = [{"step": step, "samples": 16 * step, "loss": 3 - fall * step + 0.05 * (step % 2)} for step in steps]
    run = read(write_run(tmp_path / "run", lines))
    assert _still_falls(run) == falls


def test_a_report_without_sharpness_says_nothing_of_it(tmp_path: Path) -> None:
    assert "flatter" not in findings(tmp_path, {(16, 0.1): [0.9], (64, 0.1): [0.8]})
