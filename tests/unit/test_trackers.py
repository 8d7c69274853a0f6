"""Test the section log of the config, and which lines a tracker's follower may send when."""

from __future__ import annotations

import json
import math
import os
import sys
import tomllib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from isobatch.conf.compose import compose
from isobatch.conf.rundir.directory import RunDir
from isobatch.conf.trackers import TRACKERS, refuse_missing_packages
from isobatch.scaling.errors import UserError
from isobatch.trainers.trackers.follow import Steps, Training
from isobatch.trainers.trackers.tracker import SWEEP, RunInfo, draw_id, make_tracker, numbers

ROOT = Path(__file__).parents[2]


def test_each_tracker_has_a_file_and_an_extra() -> None:
    files = {path.stem for path in (ROOT / "trainers/trackers").glob("*.py")}
    assert files - set(TRACKERS) == {"__init__", "follow", "followers", "tracker"}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(TRACKERS) <= files & set(extras)


def test_one_tracker_needs_no_brackets() -> None:
    assert compose(["log.to=wandb"]).log.to == compose(["log.to=[wandb]"]).log.to == ("wandb",)


def test_arguments_of_ones_own_tracker_lie_beside_those_of_the_others() -> None:
    log = compose(
        ["log.to=[wandb]", "log._target_=my.Tracker", "log.args.path=x", "log.args.wandb={project: p, tags: [a, b]}"]
    ).log
    assert log.own_args == {"path": "x"}


@pytest.mark.parametrize(
    ("overrides", "key", "named"),
    [
        (["log.to=[wandb,nadb]"], "log.to.1", ["nadb", *TRACKERS]),
        (["log.to=wand"], "log.to.0", ["wandb"]),
        (["log.to=[wandb,wandb]"], "log.to", ["wandb"]),
        (["log.to=5"], "log.to", ["5"]),
        (["log.args.wandb.project=x"], "log.to", ["wandb", "log.to=[wandb]"]),
        (["log.args.project=x"], "log.args.project", [*TRACKERS, "log._target_"]),
        (["log.to=wandb", "log.args.wnadb.project=x"], "log.args.wnadb", ["log.args.wandb"]),
        (["log.to=wandb", "log.args.wandb.projct=x"], "log.args.wandb.projct", ["project", "entity", "group"]),
        (["log.to=wandb", "log.args.wandb=x"], "log.args.wandb", ["x", "project"]),
        (["log.to=wandb", "log.args.wandb.project=5"], "log.args.wandb.project", ["5", "'5'"]),
        (["log.to=mlflow", "log.args.mlflow.tags=[a]"], "log.args.mlflow.tags", ["['a']"]),
        (["log.to=tensorboard", "log.args.tensorboard.x=1"], "log.args.tensorboard.x", ["no arguments"]),
        (["log._target_=tracker"], "log._target_", ["tracker", "my_package.Name"]),
    ],
)
def test_an_invalid_tracker_is_named(overrides: list[str], key: str, named: list[str]) -> None:
    with pytest.raises(UserError) as error:
        compose(overrides)
    assert error.value.key == key
    assert all(name in str(error.value) for name in named), str(error.value)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also where a folder of its name lies in the working directory, as W&B makes one."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"isobatch\[wandb\]") as error:
        refuse_missing_packages(["wandb"])
    assert (error.value.key, error.value.value) == ("log.to", "wandb")
    (tmp_path / "tracker_of_nobody").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="tracker_of_nobody"):
        refuse_missing_packages(["tracker_of_nobody"])


@pytest.mark.parametrize("name", ["tensorbord", "custom", "../custom"])
def test_a_tracker_that_a_run_does_not_have_is_named_with_those_there_are(name: str) -> None:
    """Also in a run of an earlier version, whose section log has no trackers."""
    with pytest.raises(UserError) as error:
        make_tracker(name, {"every": "10st"})
    assert name in error.value.problem or "log._target_" in error.value.problem
    assert all(known in error.value.fix for known in (*TRACKERS, "custom", "log._target_"))


def write(file: Path, *lines: dict[str, Any], rest: str = "") -> None:
    with file.open("a") as opened:
        opened.write("".join(json.dumps(line) + "\n" for line in lines) + rest)


def test_the_lines_of_a_step_are_sent_as_one_once_it_is_complete(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    write(file, {"step": 10, "loss": 1.0}, {"step": 20, "loss": 0.5})
    steps = Steps(file)
    assert list(steps.take(math.inf, whole=False)) == [{"step": 10, "loss": 1.0}]
    write(file, {"step": 20, "val/loss": 0.6}, rest='{"step": 30, "lo')
    assert list(steps.take(math.inf, whole=False)) == []
    write(file, rest='ss": 0.4}\n')
    assert list(steps.take(19, whole=False)) == []
    assert list(steps.take(20, whole=False)) == [{"step": 20, "loss": 0.5, "val/loss": 0.6}]
    assert list(steps.take(29, whole=True)) == []
    assert list(steps.take(30, whole=True)) == [{"step": 30, "loss": 0.4}]


def test_damaged_lines_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    write(file, {"step": 1}, rest='nonsense\n[1]\n5\n{"loss": 1}\n{"step": null}\n')
    write(file, {"step": 2})
    assert list(Steps(file).take(math.inf, whole=True)) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize(
    ("other", "found"),
    [
        ([{"step": 1}, {"step": 2}, {"step": 3}], [{"step": 3}]),  # the same file, as a network disk may replace it
        ([{"step": 1}], None),
        ([{"step": 1}, {"step": 4}, {"step": 5}], None),
    ],
)
def test_a_replaced_file_is_read_on_only_with_the_same_content(
    tmp_path: Path, other: list[dict[str, Any]], found: list[dict[str, Any]] | None
) -> None:
    file = tmp_path / "metrics.jsonl"
    write(file, {"step": 1}, {"step": 2}, rest='{"ste')
    steps = Steps(file)
    assert len(list(steps.take(math.inf, whole=True))) == 2
    write(tmp_path / "other", *other)
    os.replace(tmp_path / "other", file)
    if found is None:
        with pytest.raises(RuntimeError, match="replaced"):
            list(steps.take(math.inf, whole=True))
    else:
        assert list(steps.take(math.inf, whole=True)) == found


class Keeps:
    pass


class Rewrites:
    rewrites = True


@pytest.mark.parametrize(
    ("saved", "state", "keeps"),
    [([], "running", -1), ([40, 80], "running", 79), ([40], "crashed", 39), ([80], "finished", math.inf)],
)
def test_a_tracker_that_keeps_lines_gets_only_safe_ones(
    tmp_path: Path, saved: list[int], state: str, keeps: float
) -> None:
    """A step below the newest checkpoint can't be lost; that of the checkpoint itself may lack its evaluation."""
    for step in saved:
        (tmp_path / f"checkpoints/step-{step:08d}").mkdir(parents=True)
    outcome = {"state": state, "cause": "", "step": 90, "samples": 90, "attempt": "a", "restarts": 0}
    (tmp_path / "outcome.json").write_text(json.dumps(outcome))
    training = Training(RunDir(tmp_path), follows=state == "running")
    assert training.safe(Keeps()) == keeps  # type: ignore[arg-type]
    assert training.safe(Rewrites()) == math.inf  # type: ignore[arg-type]


def test_an_id_is_drawn_once(tmp_path: Path) -> None:
    assert draw_id(tmp_path) == draw_id(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["trackers.json"]


def test_a_run_began_at_its_first_start(tmp_path: Path) -> None:
    """A job is submitted before that, and every resume is a later start."""
    for name in ("config.yaml", "plan.json"):
        (tmp_path / name).write_text("{}")
    kinds = ("submitted", "start", "crashed", "start")
    times = [{"event": kind, "time": f"2026-11-30T04:2{minute}:00+0000"} for minute, kind in enumerate(kinds)]
    write(tmp_path / "events.jsonl", *times)
    assert RunInfo.read(tmp_path).began == datetime(2026, 11, 30, 4, 21, tzinfo=UTC).timestamp()


def test_only_finite_numbers_are_sent() -> None:
    line = {"step": 1, "loss": None, "lr": 0.1, "skipped": 3, "on": True, "name": "x", "mfu": math.inf}
    assert numbers(line) == {"lr": 0.1, "skipped": 3}


@pytest.mark.parametrize(
    ("folder", "is_sweep"),
    [
        ("digits-sweep-dad136094819", True),
        ("digits-sweep-dad136094819-2", True),
        ("digits-814799feb745", False),
        ("sweep-abc", False),
    ],
)
def test_the_folder_of_a_sweep_is_recognised(folder: str, is_sweep: bool) -> None:
    assert (SWEEP.fullmatch(folder) is not None) == is_sweep
