"""Test which runs of a report are one group, what groups are named, and which of their runs count."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from isobatch.scaling.report.compare.compare import as_dict
from isobatch.scaling.report.compare.tables import text_of
from isobatch.scaling.report.run import read
from tests.support.compared import compare, ended, read_all, write_values
from tests.support.runs import write_run


def change(run: Path, name: str, **content: Any) -> None:
    """Change keys of a JSON file of a run."""
    (run / name).write_text(json.dumps(json.loads((run / name).read_text()) | content))


def flat(lines: int, seed: int, noise: float = 0.1) -> list[dict[str, Any]]:
    """Return lines of a loss that learns nothing."""
    draw = random.Random(seed)
    return [{"step": step, "samples": step, "loss": 2.3 + draw.gauss(0, noise)} for step in range(1, lines + 1)]


@pytest.mark.parametrize("lines", [2, 5, 19, 20, 40, 100])
def test_noise_is_no_divergence(tmp_path: Path, lines: int) -> None:
    runs = [read(write_run(tmp_path / str(seed), flat(lines, seed))) for seed in range(40)]
    assert sum(run.done.diverged for run in runs) <= 1


@pytest.mark.parametrize("lines", [20, 40, 100])
def test_a_loss_that_ends_above_its_noise_has_diverged(tmp_path: Path, lines: int) -> None:
    for seed in range(10):
        risen = [line | {"loss": line["loss"] + (line["step"] > lines / 2)} for line in flat(lines, seed)]
        assert read(write_run(tmp_path / str(seed), risen)).done.diverged


def named(folder: Path) -> list[str]:
    return [group.label for group in compare(read_all(folder)).comparisons[0].groups]


def test_groups_of_one_batch_and_rate_are_told_apart_by_what_differs(tmp_path: Path) -> None:
    for batch in (16, 64):
        for decay in (0.0, 0.1):
            run = write_run(tmp_path / f"{batch},{decay}", ended(0.9), batch=batch, optimizer__weight_decay=decay)
            config = (run / "config.yaml").read_text()
            (run / "config.yaml").write_text(config.replace("- optimizer.weight_decay\n", ""))  # a default of a YAML
    groups = compare(read_all(tmp_path)).comparisons[0].groups
    assert [group.label for group in groups] == [
        "batch 16 · weight_decay=0", "batch 64 · weight_decay=0", "batch 16 · weight_decay=0.1",
        "batch 64 · weight_decay=0.1",
    ]  # fmt: skip
    assert len({group.family for group in groups}) == 2


def test_groups_that_nothing_tells_apart_have_their_identity_in_their_name(tmp_path: Path) -> None:
    for number in range(2):
        run = write_run(tmp_path / str(number), ended(0.9), lr__peak=0.1 + 1e-12 * number)
        change(run, "plan.json", identity=f"id{number}", lr={"peak": 0.1 + 1e-12 * number})
    groups = compare(read_all(tmp_path)).comparisons[0].groups
    assert [(group.label, group.family) for group in groups] == [("batch 64 · id0", "id0"), ("batch 64 · id1", "id1")]


def test_how_a_batch_is_cut_makes_another_group_only_if_it_changes_the_result(tmp_path: Path) -> None:
    for numerics, groups in (("fast", 1), ("bitwise", 2)):
        folder = tmp_path / numerics
        for seed, (per_gpu, accumulation) in enumerate(((16, 4), (32, 2))):
            run = write_run(
                folder / str(seed), ended(0.9), seed=seed, batch__per_gpu=per_gpu, batch__accumulation=accumulation
            )
            config = (run / "config.yaml").read_text().replace("- batch.global_size\n", "")
            (run / "config.yaml").write_text(f"{config}numerics: {numerics}\n")
        assert len(named(folder)) == groups
    assert named(folder) == ["batch 64 · per_gpu=16", "batch 64 · per_gpu=32"]


def test_the_rate_of_a_group_is_the_peak_of_its_plan(tmp_path: Path) -> None:
    write_values(tmp_path, {(64, 0.1): [0.8], (64, 0.2): [0.9]})
    write_run(tmp_path / "base", ended(0.7), lr=0.4, lr__base=0.05)
    assert named(tmp_path) == ["batch 64 · LR 0.1", "batch 64 · LR 0.2", "batch 64 · LR 0.4"]


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ("2026-01-02T01:00:00+0200", "2026-01-01T23:30:00+0000"),
        ("2026-01-01T00:00:00Z", "2026-01-01T00:00:00.5Z"),
        ("2026-01-01T10:30:00", "2026-01-01T09:45:00-0100"),
    ],
)
def test_times_are_compared_as_times(tmp_path: Path, older: str, newer: str) -> None:
    for name, value, time in (("z", 0.5, older), ("a", 0.9, newer)):
        run = write_run(tmp_path / name, ended(value))
        (run / "events.jsonl").write_text(json.dumps({"event": "finished", "time": time}))
    assert list(as_dict(compare(read_all(tmp_path)))["groups"][0]["left_out"]) == [str(tmp_path / "z")]


def test_runs_that_a_stop_rule_ended_are_marked(tmp_path: Path) -> None:
    write_values(tmp_path, {(16, 0.1): [0.90, 0.91, 0.92], (64, 0.1): [0.5]})
    change(tmp_path / "batch=16,lr=0.1,seed=1", "outcome.json", cause="stop.at=val/accuracy>=0.9: it is 0.91")
    report = compare(read_all(tmp_path))
    assert report.comparisons[0].values[0].last
    assert report.comparisons[0].values[0].last.n == 3
    (warning,) = [text for text in report.warnings if "early" in text]
    assert "1 run ended early" in warning
    assert "batch 16 · seed 1" in warning
    assert "3: 1 ended early" in text_of(report)


def test_groups_without_the_measure_are_named(tmp_path: Path) -> None:
    write_values(tmp_path, {(16, 0.1): [0.9, 0.8], (64, 0.1): [0.7]})
    write_run(tmp_path / "other", ended(0.9, name="val/f1"), batch=256)
    lines = [*ended(0.9), {"step": 11, "samples": 704, "val/accuracy": None}]
    write_run(tmp_path / "nan", lines, batch=16, seed=2)
    (warning,) = [text for text in compare(read_all(tmp_path), "val/accuracy").warnings if "finite" in text]
    assert all(text in warning for text in ("val/accuracy", "batch 256 (0 of 1)", "batch 16 (2 of 3)"))
    assert "batch 64" not in warning


def test_a_run_without_its_plan_is_known_by_its_config(tmp_path: Path) -> None:
    for seed in range(2):
        write_run(tmp_path / str(seed), ended(0.9), seed=seed)
    (tmp_path / "1/plan.json").unlink()
    (comparison,) = compare(read_all(tmp_path)).comparisons
    assert comparison.task == "digits"
    assert [len(group.runs) for group in comparison.groups] == [2]


def test_a_run_of_an_unknown_task_is_named_and_not_compared(tmp_path: Path) -> None:
    write_run(tmp_path / "good", ended(0.9))
    lost = write_run(tmp_path / "lost", ended(0.8), state="crashed")
    (lost / "plan.json").unlink()
    (lost / "config.yaml").write_text("- [a\n")
    report = compare(read_all(tmp_path))
    assert [one.task for one in report.comparisons] == ["digits"]
    assert any(f"{lost} (config.yaml" in text and "task" in text for text in report.warnings)


def test_a_time_to_the_target_is_that_of_all_runs_or_none(tmp_path: Path) -> None:
    write_run(tmp_path / "0", ended(0.9))
    untimed = [{key: value for key, value in line.items() if key != "time_s"} for line in ended(0.9)]
    write_run(tmp_path / "1", untimed, seed=1)
    (values,) = compare(read_all(tmp_path), target="val/accuracy>=0.5").comparisons[0].values
    assert values.to_steps
    assert values.to_time_s is None
