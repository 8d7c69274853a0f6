"""Test how runs are grouped, compared and told apart in a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from isobatch.scaling.errors import UserError
from isobatch.scaling.report.compare.compare import as_dict
from isobatch.scaling.report.compare.comparison import Report
from isobatch.scaling.report.compare.pictures import MOST_INTERVALS, MOST_MEASURES, pictures_of
from isobatch.scaling.report.compare.tables import csv_of, markdown_of, rows_of, text_of
from isobatch.scaling.report.measures import Measure, direction_of, first_reaching
from isobatch.scaling.report.run import read
from isobatch.scaling.report.runs import directories
from isobatch.scaling.stopping import Target
from tests.support.compared import compare, ended, read_all, write_values
from tests.support.runs import learned, write_run, write_sweep


@pytest.mark.parametrize(
    ("name", "direction"),
    [
        ("val/loss", "min"), ("val/accuracy", "max"), ("ema/top1_error", "min"), ("val/ppl", "min"), ("val/f1", "max"),
        ("val/macro-F1", "max"), ("train/mlm_loss", "min"), ("val/WER", "min"), ("val/temperature", None),
        ("val/glossary", None), ("val/map", "max"),
    ],
)  # fmt: skip
def test_the_name_tells_which_direction_is_better(name: str, direction: str | None) -> None:
    assert direction_of(name) == direction


def test_a_measure_keeps_what_a_target_needs() -> None:
    measure = Measure("min")
    for step, value in enumerate([3.0, None, 2.0, 2.5, 1.0, float("nan")], 1):
        measure.add(value, {"step": step, "samples": 10 * step, "time_s": 0.1 * step})
    assert [(record.step, record.value) for record in measure.records] == [(1, 3.0), (3, 2.0), (5, 1.0)]
    assert measure.last is None
    reached = first_reaching(Target("loss", "<=", 2.2), {"loss": measure})
    assert reached
    assert (reached.step, reached.samples, reached.time_s) == (3, 30, pytest.approx(0.3))
    assert first_reaching(Target("loss", "<", 1.0), {"loss": measure}) is None
    assert first_reaching(Target("val/x", ">=", 0.5), {"loss": measure}) is None


def test_runs_that_differ_in_the_seed_alone_are_one_group(tmp_path: Path) -> None:
    write_values(tmp_path, {(16, 0.1): [0.5, 0.7], (64, 0.1): [0.8, 0.9, 1.0]})
    comparison = compare(read_all(tmp_path)).comparisons[0]
    assert [(group.label, len(group.runs)) for group in comparison.groups] == [("batch 16", 2), ("batch 64", 3)]
    small, large = comparison.values
    assert small.last
    assert large.last
    assert (small.last.mean, small.last.n) == (pytest.approx(0.6), 2)
    assert small.last.deviation == pytest.approx(0.1 * 2**0.5)
    assert (large.last.mean, large.last.deviation) == (pytest.approx(0.9), pytest.approx(0.1))


@pytest.mark.parametrize("key", ["task__width", "optimizer__momentum", "batch__schedule"])
def test_any_other_key_of_the_science_makes_another_group(tmp_path: Path, key: str) -> None:
    for value in (1, 2):
        write_run(tmp_path / str(value), ended(0.9), **{key: value})
    labels = [group.label for group in compare(read_all(tmp_path)).comparisons[0].groups]
    name = key.rpartition("__")[2]
    assert labels == [f"batch 64 · {name}=1", f"batch 64 · {name}=2"]


def test_hardware_makes_no_other_group(tmp_path: Path) -> None:
    for seed, world in enumerate((1, 4)):
        run = write_run(tmp_path / str(world), ended(0.9), seed=seed, cluster__gpus_per_node=world)
        plan = json.loads((run / "plan.json").read_text())
        (run / "plan.json").write_text(json.dumps(plan | {"world_size": world, "per_gpu": 64 // world}))
    report = compare(read_all(tmp_path))
    assert len(report.comparisons[0].groups) == 1
    assert any("1 and 4 ranks" in warning for warning in report.warnings)


def test_tasks_are_compared_by_themselves(tmp_path: Path) -> None:
    write_run(tmp_path / "a", ended(0.9), task="digits")
    write_run(tmp_path / "b", ended(0.1), task="images")
    write_run(tmp_path / "c", ended(0.2), task="images", seed=1)
    report = compare(read_all(tmp_path))
    assert [(one.task, len(one.runs), len(one.groups)) for one in report.comparisons] == [
        ("digits", 1, 1), ("images", 2, 1),
    ]  # fmt: skip
    content = as_dict(report)
    assert [group["last"]["mean"] for group in content["groups"]] == [pytest.approx(0.9), pytest.approx(0.15)]


def test_tasks_of_one_name_are_told_apart_by_their_class(tmp_path: Path) -> None:
    write_run(tmp_path / "a", ended(0.9), task="mine", task___target_="one.Task")
    write_run(tmp_path / "b", ended(0.1), task="mine", task___target_="other.Task")
    assert [one.task for one in compare(read_all(tmp_path)).comparisons] == ["mine (one.Task)", "mine (other.Task)"]


def test_repeats_of_a_seed_count_once_and_the_newest_does(tmp_path: Path) -> None:
    for name, seed, value, time in (("z", 0, 0.5, "01"), ("new", 0, 0.7, "03"), ("other", 1, 0.9, "02")):
        run = write_run(tmp_path / name, ended(value), seed=seed)
        (run / "events.jsonl").write_text(json.dumps({"event": "finished", "time": f"2026-01-{time}T00:00:00+0000"}))
    write_run(tmp_path / "stopped", ended(0.1), seed=1, state="stopped")
    report = compare(read_all(tmp_path))
    last = report.comparisons[0].values[0].last
    assert last
    assert (last.mean, last.n) == (pytest.approx(0.8), 2)
    left = {str(tmp_path / "z"): "repeats seed 0", str(tmp_path / "stopped"): "stopped"}
    assert as_dict(report)["groups"][0]["left_out"] == left
    assert any("repeats seed 0" in warning and str(tmp_path / "z") in warning for warning in report.warnings)


def test_one_seed_that_was_run_twice_shows_no_spread(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name, ended(0.9))
    report = compare(read_all(tmp_path))
    assert "1 seed, so no spread is known" in report.comparisons[0].findings[0]
    assert "2 runs of one seed" in text_of(report)
    assert "1 of 2: repeats seed 0" in text_of(report)


BAD: dict[str, Any] = {
    "loss is null": [{"step": 1, "samples": 64, "loss": 2.0}, {"step": 2, "samples": 128, "loss": None}],
    "short": [{"step": step, "samples": step, "loss": loss} for step, loss in enumerate((2.3, 9, 29.2, 13.7, 9.7), 1)],
    "short, by a third": [
        {"step": step, "samples": step, "loss": loss} for step, loss in enumerate((2.3, 3.1, 4, 3.1, 3.3), 1)
    ],
    "loss ends above its start": [{"step": step, "samples": 64 * step, "loss": 2.0 + step} for step in range(1, 40)],
}


@pytest.mark.parametrize("bad", BAD)
def test_a_diverged_run_is_marked_and_not_averaged(tmp_path: Path, bad: str) -> None:
    write_run(tmp_path / "good", ended(0.9))
    write_run(tmp_path / "bad", [*ended(0.1)[:1], {"step": 1, "samples": 64, "val/accuracy": 0.1}, *BAD[bad]], seed=1)
    report = compare(read_all(tmp_path))
    values = report.comparisons[0].values[0]
    assert values.last
    assert (values.last.mean, values.last.n) == (pytest.approx(0.9), 1)
    assert any("1 run diverged" in warning and "seed 1" in warning for warning in report.warnings)
    assert "1 of 2: diverged" in text_of(report)


@pytest.mark.parametrize(
    "losses", [[2.3, 9, 9, 2.2, 9], [2.3, 3.4, 2.9, 2.8, 2.7], [2.3, 9, 9, 9], [-2.0, -1, -1, -1, -1]]
)
def test_a_short_run_that_may_only_be_noisy_has_not_diverged(tmp_path: Path, losses: list[float]) -> None:
    lines = [{"step": step, "samples": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    assert not read(write_run(tmp_path / "a", lines)).done.diverged


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_a_loss_on_a_plateau_has_not_diverged(tmp_path: Path, noise: float) -> None:
    losses = [1.0 + noise * ((-1) ** step) * step / 100 for step in range(100)]
    lines = [{"step": step, "samples": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    assert not read(write_run(tmp_path / "a", lines)).done.diverged


@pytest.mark.parametrize("state", ["crashed", "oom", "stopped", "running"])
def test_a_run_that_has_not_finished_is_shown_but_not_compared(tmp_path: Path, state: str) -> None:
    write_run(tmp_path / "good", ended(0.5), batch=16)
    write_run(tmp_path / "other", ended(0.9), batch=64, state=state)
    report = compare(read_all(tmp_path))
    comparison = report.comparisons[0]
    shown = "died" if state == "running" else state
    assert [group.label for group, _ in comparison.ranked()] == ["batch 16"]
    assert any(f"1 run {shown}" in warning and "batch 64" in warning for warning in report.warnings)
    assert f"0 of 1: {shown}" in text_of(report)
    assert "(0.9)" in text_of(report)
    for text in (text_of(report), markdown_of(report, {})):
        assert "(…) not finished" in text
    assert as_dict(report)["groups"][1]["left_out"] == {str(tmp_path / "other"): shown}


def test_runs_of_which_none_has_finished_are_reported(tmp_path: Path) -> None:
    write_run(tmp_path / "a", ended(0.5), state="stopped")
    write_run(tmp_path / "b", [], batch=16, state="stopped")
    report = compare(read_all(tmp_path))
    assert "nothing is compared" in " ".join(report.comparisons[0].findings)
    json.dumps(as_dict(report), allow_nan=False)


def test_one_run_is_described_by_itself(tmp_path: Path) -> None:
    lines = [*ended(0.9), {"step": 11, "samples": 704, "val/accuracy": 0.8}]
    write_run(tmp_path / "a", lines, state="stopped")
    report = compare(read_all(tmp_path))
    assert report.comparisons[0].findings == ["val/accuracy 0.8 so far (stopped after step 11), best 0.9 at step 10"]
    assert not report.warnings
    assert "target" not in text_of(report)
    (tmp_path / "a/outcome.json").write_text((tmp_path / "a/outcome.json").read_text().replace("stopped", "finished"))
    assert "0.8 at the end" in compare(read_all(tmp_path)).comparisons[0].findings[0]


def test_one_seed_each_claims_no_order(tmp_path: Path) -> None:
    write_values(tmp_path, {(16, 0.1): [0.90], (64, 0.1): [0.95]})
    finding = compare(read_all(tmp_path)).comparisons[0].findings[0]
    assert "batch 64" in finding
    assert "no spread is known" in finding


def test_a_difference_within_the_spread_is_no_winner(tmp_path: Path) -> None:
    write_values(tmp_path, {(16, 0.1): [0.90, 0.92, 0.94], (64, 0.1): [0.91, 0.93, 0.95], (256, 0.1): [0.1, 0.1, 0.12]})
    finding = compare(read_all(tmp_path)).comparisons[0].findings[0]
    assert "can't be told apart from batch 16:" in finding
    assert "batch 256" not in finding


def test_a_difference_beyond_the_spread_has_its_interval(tmp_path: Path) -> None:
    write_values(tmp_path, {(16, 0.1): [0.90, 0.91, 0.92], (64, 0.1): [0.71, 0.72, 0.73]})
    finding = compare(read_all(tmp_path)).comparisons[0].findings[0]
    assert "batch 16 with 0.910 ± 0.010, ahead of batch 64" in finding
    assert "0.167 to 0.213" in finding  # 0.19 ± 2.776·√(2·0.01²/3)


def test_seeds_without_any_spread_claim_nothing_about_chance(tmp_path: Path) -> None:
    write_values(tmp_path, {(16, 0.1): [0.9, 0.9], (64, 0.1): [0.8, 0.8]})
    assert "isn't known" in compare(read_all(tmp_path)).comparisons[0].findings[0]


GRIDS: dict[str, Any] = {
    "smallest batch": ({(16, 0.1): 0.9, (64, 0.1): 0.8, (256, 0.1): 0.7}, "16, is the smallest"),
    "largest batch": ({(16, 0.1): 0.7, (64, 0.1): 0.8, (256, 0.1): 0.9}, "256, is the largest"),
    "largest LR": (
        {(16, 0.1): 0.7, (16, 0.2): 0.8, (64, 0.1): 0.9, (64, 0.2): 0.8}, "0.2 (the largest) at batch 16"
    ),
}  # fmt: skip


@pytest.mark.parametrize("grid", GRIDS)
def test_a_best_value_on_the_edge_of_the_grid_is_warned_of(tmp_path: Path, grid: str) -> None:
    values, named = GRIDS[grid]
    seeds = {place: [value, value + 0.01] for place, value in values.items()}
    assert any(named in warning for warning in compare(read_all(write_values(tmp_path / "2", seeds))).warnings)
    one_each = {place: [value] for place, value in values.items()}
    assert not compare(read_all(write_values(tmp_path / "1", one_each))).warnings


def test_a_note_on_open_values_needs_one(tmp_path: Path) -> None:
    write_run(tmp_path / "good", ended(0.9), batch=16)
    write_run(tmp_path / "bad", [{"step": 1, "samples": 64, "loss": None}])
    assert "(…)" not in text_of(compare(read_all(tmp_path)))


def test_all_groups_that_chance_may_place_first_stand_out(tmp_path: Path) -> None:
    values = {(16, 0.1): [0.90, 0.92, 0.94], (64, 0.1): [0.91, 0.93, 0.95], (256, 0.1): [0.1, 0.1, 0.12]}
    report = compare(read_all(write_values(tmp_path, values)))
    assert "0.920 ± 0.020 *" in text_of(report)
    assert "0.930 ± 0.020 *" in text_of(report)
    assert "of val/accuracy, also those that can't be told apart" in text_of(report)
    assert "**0.930 ± 0.020**" in markdown_of(report, {})


def test_every_column_shows_its_spread_and_how_many_runs_have_a_value(tmp_path: Path) -> None:
    for seed, noise in enumerate((40.0, 80.0, None)):
        lines = [line | {"noise/scale": noise, "time_s": line["time_s"] * (1 + seed)} for line in ended(0.9)]
        write_run(tmp_path / str(seed), lines, seed=seed)
    cells = rows_of(compare(read_all(tmp_path)).comparisons[0])[0]
    assert cells["noise scale"] == "60 ± 28 (2 of 3)"
    assert cells["time"] == "10.0 ± 5.0 s"
    assert cells["samples/s"].startswith("78 ± 44")


def test_the_interval_of_the_noise_scale_is_drawn_where_it_is_narrow(tmp_path: Path) -> None:
    """It is unknown in line 1, wide in line 4 and known from then on; with many runs it isn't drawn."""
    bounds = [(None, None), (20.0, 90.0), (30.0, 80.0), (1.0, 500.0), (40.0, 70.0), (45.0, 60.0), (46.0, 58.0)]
    lines = [
        {"step": n, "samples": 8 * n, "loss": 1.0, "noise/scale": low and 50.0, "noise/low": low, "noise/high": high}
        for n, (low, high) in enumerate(bounds, 1)
    ]  # fmt: skip
    for seed in range(MOST_INTERVALS):
        write_run(tmp_path / str(seed), lines, seed=seed)
    (picture,) = [one for one in pictures_of(compare(read_all(tmp_path)).comparisons[0]) if one.name == "course"]
    (panel,) = [one for one in picture.panels if one.title == "Gradient noise scale"]
    bands = [curve for curve in panel.curves if curve.kind == "band"]
    assert [(band.x, band.y) for band in bands[:2]] == [
        ([16, 24, 24, 16], [20.0, 30.0, 80.0, 90.0]),
        ([40, 48, 56, 56, 48, 40], [40.0, 45.0, 46.0, 58.0, 60.0, 70.0]),
    ]
    assert (len(bands), "95 % interval" in picture.about) == (2 * MOST_INTERVALS, True)
    write_run(tmp_path / "more", lines, seed=MOST_INTERVALS)
    pictures = pictures_of(compare(read_all(tmp_path)).comparisons[0])
    assert not [c for one in pictures for panel in one.panels for c in panel.curves if c.kind == "band"]


def test_the_target_at_which_all_runs_stop_comes_first(tmp_path: Path) -> None:
    for batch, at in ((16, 0.8), (64, 0.8), (256, 0.7)):
        write_run(tmp_path / str(batch), ended(0.9, batch=batch), batch=batch, stop__at=f"val/accuracy>={at}")
    runs = read_all(tmp_path)
    (comparison,) = compare([run for run in runs if run.recipe.global_size != 256]).comparisons
    assert (str(comparison.target), comparison.target_from) == ("val/accuracy ≥ 0.8", "stop.at")
    assert comparison.findings[0].startswith("to val/accuracy ≥ 0.8")
    assert comparison.findings[1].startswith("best val/accuracy")
    assert compare(runs).comparisons[0].target_from == ""
    assert str(compare(runs, target="val/accuracy>=0.6").comparisons[0].target) == "val/accuracy ≥ 0.6"


def test_a_run_without_a_config_is_no_task_of_an_empty_class(tmp_path: Path) -> None:
    write_run(tmp_path / "a", ended(0.9))
    (write_run(tmp_path / "b", ended(0.9)) / "config.yaml").unlink()
    assert [one.task for one in compare(read_all(tmp_path)).comparisons] == [
        "digits (trainers.tasks.digits.Digits)",
        "digits",
    ]


def test_measures_that_are_not_drawn_are_named(tmp_path: Path) -> None:
    names = [f"val/{number:02}" for number in range(MOST_MEASURES + 2)]
    for batch in (16, 64):
        lines = [{"step": 1, "samples": batch, "loss": 1.0}, {"step": 1, "samples": batch, **dict.fromkeys(names, 1.0)}]
        write_run(tmp_path / str(batch), lines, batch=batch)
    report = compare(read_all(tmp_path))
    drawn = {panel.y_label for picture in pictures_of(report.comparisons[0]) for panel in picture.panels}
    (warning,) = [text for text in report.warnings if "not drawn" in text]
    assert [name for name in names if name not in drawn and name in warning] == names[-2:]
    assert {*names} <= drawn | {*names[-2:]}


def test_an_edge_that_chance_may_explain_is_not_warned_of(tmp_path: Path) -> None:
    alike = {(16, 0.1): [0.90, 0.92, 0.94], (64, 0.1): [0.89, 0.91, 0.93], (256, 0.1): [0.1, 0.1, 0.12]}
    assert not compare(read_all(write_values(tmp_path / "alike", alike))).warnings
    apart = alike | {(64, 0.1): [0.59, 0.61, 0.63]}
    warning = compare(read_all(write_values(tmp_path / "apart", apart))).warnings[0]
    assert "the best batch by val/accuracy, 16, is the smallest" in warning


def test_equal_values_have_no_single_winner(tmp_path: Path) -> None:
    write_values(tmp_path, {(16, 0.1): [0.9], (64, 0.1): [0.9], (256, 0.1): [0.8]})
    report = compare(read_all(tmp_path))
    assert "batch 16 and batch 64, all with 0.9" in report.comparisons[0].findings[0]
    assert text_of(report).count("0.9 *") == 2
    assert "fewest steps batch 16 and batch 64 (" in report.comparisons[0].findings[1]


def test_a_best_value_inside_of_the_grid_is_not_warned_of(tmp_path: Path) -> None:
    inside = {
        (batch, lr): [0.9 if (batch, lr) == (64, 0.2) else 0.5] for batch in (16, 64, 256) for lr in (0.1, 0.2, 0.4)
    }
    inside |= {(16, 0.2): [0.6], (256, 0.2): [0.6]}
    assert not compare(read_all(write_values(tmp_path, inside))).warnings


def test_the_usual_target_is_reached_by_every_run(tmp_path: Path) -> None:
    write_values(tmp_path, {(16, 0.1): [1.0], (64, 0.1): [0.8]})
    comparison = compare(read_all(tmp_path)).comparisons[0]
    assert str(comparison.target) == "val/accuracy ≥ 0.8"
    fast, slow = comparison.values
    assert fast.to_steps
    assert slow.to_steps
    assert (fast.to_steps.mean, slow.to_steps.mean) == (6, 10)
    assert fast.to_samples
    assert fast.to_time_s
    assert (fast.to_samples.mean, fast.to_time_s.mean) == (96, 3.0)


def test_a_group_in_which_a_run_misses_the_target_has_no_mean(tmp_path: Path) -> None:
    write_values(tmp_path, {(16, 0.1): [1.0, 0.9], (64, 0.1): [1.0, 1.0]})
    report = compare(read_all(tmp_path), target="val/accuracy>=0.95")
    small, large = report.comparisons[0].values
    assert (small.reached, small.to_steps) == (1, None)
    assert large.to_steps
    assert any("not all runs of batch 16 (1 of 2)" in warning for warning in report.warnings)
    report = compare(read_all(tmp_path), target="val/accuracy>=1.5")
    assert "no run reached val/accuracy ≥ 1.5 (the best was 1, batch" in "".join(report.warnings)
    assert "critical batch" not in "".join(report.comparisons[0].findings)


def test_the_target_of_a_single_run_is_stated(tmp_path: Path) -> None:
    write_run(tmp_path / "a", ended(0.9))
    report = compare(read_all(tmp_path), target="val/accuracy>=0.7")
    assert "target: val/accuracy ≥ 0.7 (report.target)" in text_of(report)
    assert "Target: val/accuracy ≥ 0.7 (report.target)." in markdown_of(report, {})


def test_the_measure_and_its_direction_can_be_chosen(tmp_path: Path) -> None:
    for value, batch in ((3.0, 16), (5.0, 64)):
        write_run(tmp_path / str(batch), ended(value, name="val/glow", batch=batch), batch=batch)
    runs = [read(run, directions={"val/glow": "min"}) for run in directories(tmp_path)]
    comparison = compare(runs, metric="val/glow:min").comparisons[0]
    assert comparison.metric == ("val/glow", "min")
    assert [group.label for group, _ in comparison.ranked()] == ["batch 16", "batch 64"]
    with pytest.raises(UserError) as error:
        compare(runs, metric="val/glow")
    assert "val/glow:max" in error.value.fix
    assert compare(runs).comparisons[0].metric == ("val/glow", "min")


@pytest.mark.parametrize(
    ("asked", "key"), [({"metric": "val/acuracy"}, "report.metric"), ({"target": "val/acuracy>=0.9"}, "report.target")]
)
def test_an_unknown_measure_names_those_there_are(tmp_path: Path, asked: dict[str, str], key: str) -> None:
    write_run(tmp_path / "a", ended(0.9))
    with pytest.raises(UserError) as error:
        compare(read_all(tmp_path), **asked)
    assert (error.value.key, error.value.value) == (key, "val/acuracy")
    assert "did you mean val/accuracy?" in error.value.fix
    assert "loss" in error.value.fix


@pytest.mark.parametrize("target", ["val/accuracy", ">=3", "val/accuracy>=x", "val/accuracy=0.9", "a b>=3"])
def test_what_is_no_target_is_rejected(tmp_path: Path, target: str) -> None:
    write_run(tmp_path / "a", ended(0.9))
    with pytest.raises(UserError) as error:
        compare(read_all(tmp_path), target=target)
    assert (error.value.key, error.value.value) == ("report.target", target)


def test_the_fit_is_that_of_each_batches_best_rate(tmp_path: Path) -> None:
    write_sweep(tmp_path, (16, 64, 256, 1024), seeds=2)
    for seed in range(2):  # a rate that is worse, and is left out of the fit
        lines = learned(64, seed, quality=0.2, steps=400)
        write_run(tmp_path / f"slow{seed}", lines, batch=64, lr=0.2, seed=seed)
    report = compare(read_all(tmp_path), target="val/accuracy>=0.9")
    found = report.comparisons[0].fits[""]
    assert found.critical_batch == pytest.approx(256, rel=0.6)
    entry = as_dict(report)["fit"][0]
    assert (entry["task"], entry["critical_batch"]) == ("digits", found.critical_batch)
    assert "fitted critical batch" in " ".join(report.comparisons[0].findings)


def test_runs_of_earlier_versions_are_reported(tmp_path: Path) -> None:
    old = Path(__file__).parents[1] / "data" / "f0a1b05"
    report = compare(read_all(old))
    entry = as_dict(report)["runs"][0]
    assert (entry["task"], entry["optimizer"], entry["global_size"], entry["world_size"]) == ("digits", "sgd", 64, 2)
    assert entry["time_s"] is None
    assert entry["samples_per_s"] > 0
    assert entry["metrics"]["val/accuracy"]["best_step"] == 68


def text_forms(report: Report) -> str:
    return text_of(report) + markdown_of(report, {}) + csv_of(report) + json.dumps(as_dict(report))


def test_a_damaged_run_is_named_and_the_others_are_compared(tmp_path: Path) -> None:
    write_values(tmp_path, {(16, 0.1): [0.9], (64, 0.1): [0.8]})
    damaged = write_run(tmp_path / "damaged", ended(0.99), batch=256)
    (damaged / "metrics.jsonl").write_text("{]\n" + (damaged / "metrics.jsonl").read_text())
    report = compare(read_all(tmp_path))
    assert any("damaged" in warning and "metrics.jsonl, line 1" in warning for warning in report.warnings)
    assert [group.label for group, _ in report.comparisons[0].ranked()] == ["batch 16", "batch 64"]


@pytest.mark.parametrize(
    ("missing", "changed"),
    [
        ("plan.json", {"identity", "per_gpu", "world_size", "planned_steps", "planned_samples"}),
        ("config.yaml", {"settings"}),
        ("metrics.jsonl", {"time_s", "samples_per_s", "metrics"}),
        ("events.jsonl", set()),
        ("outcome.json", {"state"}),
    ],
)
def test_a_missing_file_leaves_its_values_open(tmp_path: Path, missing: str, changed: set[str]) -> None:
    write_values(tmp_path, {(16, 0.1): [0.9], (64, 0.1): [0.8]})
    lacks = write_run(tmp_path / "lacks", ended(0.7), batch=256)
    whole = read(lacks).summary()
    (lacks / missing).unlink()
    found = read(lacks).summary()
    assert {name for name, value in whole.items() if found[name] != value} == changed
    assert all(found[name] in (None, "—", {}) for name in changed)
    report = compare(read_all(tmp_path))
    assert str(lacks) in text_forms(report)
    others = {entry["label"]: entry["last"]["mean"] for entry in as_dict(report)["groups"] if entry["last"]}
    assert (others["batch 16"], others["batch 64"]) == (0.9, 0.8)


def test_text_of_runs_commands_neither_terminal_nor_page(tmp_path: Path) -> None:
    name = "val/\x1b[2J<script>|**accuracy"
    for batch in (16, 64):
        write_run(
            tmp_path / f"{batch}<b>",
            ended(0.9, name=name, batch=batch),
            batch=batch,
            task="<i>\x07x",
            task__width="a|b",
        )
    report = compare(read_all(tmp_path))
    assert "\x1b" not in text_of(report) + csv_of(report)
    markdown = markdown_of(report, {})
    assert "\x1b" not in markdown
    assert "<" not in markdown
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in rows}) == 1
