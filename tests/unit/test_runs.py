"""Test the rows of the list of runs for runs in any state."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from isobatch.conf.rundir.reading import last_step
from isobatch.scaling.report.grid import grid
from isobatch.scaling.report.result import result
from isobatch.scaling.report.run import read
from isobatch.scaling.report.runs import cells, directories

PLAN = {"steps": 100, "samples": 6400}
SUBMITTED = {"event": "submitted", "job": "7"}


def make(folder: Path, state: str | None, events: list[dict[str, Any]], metrics: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True)
    if state:
        outcome = {"state": state, "cause": "", "step": 40, "samples": 2560, "attempt": "a1"}
        (folder / "outcome.json").write_text(json.dumps(outcome))
        (folder / "plan.json").write_text(json.dumps(PLAN))
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    return folder


def test_runs_are_found_in_a_folder_and_in_its_sweeps(tmp_path: Path) -> None:
    for name in ("b", "a", "sweep/seed=1", "sweep/seed=2"):
        make(tmp_path / name, "finished", [], [])
    (tmp_path / "something else").mkdir()
    assert [str(found.relative_to(tmp_path)) for found in directories(tmp_path)] == [
        "a", "b", "sweep/seed=1", "sweep/seed=2",
    ]  # fmt: skip
    assert directories(tmp_path / "a") == [tmp_path / "a"]
    assert directories(tmp_path / "nowhere") == []


def test_a_working_run_shows_when_it_will_finish(tmp_path: Path) -> None:
    lines = [{"step": 50, "samples": 3200, "loss": 0.5, "samples_per_s": 10.0}, {"step": 50, "val/loss": 0.4}]
    found = read(make(tmp_path / "r", "running", [], lines), works=True)
    assert (found.state, found.done.step, found.recipe.steps, found.loss) == ("running", 50, 100, 0.5)
    assert (found.done.samples_per_s, found.done.eta_s) == (10.0, 320.0)
    assert "0:05:20" in grid([cells(found)])
    died = read(tmp_path / "r", works=False)
    assert (died.state, died.done.eta_s) == ("died", None)


@pytest.mark.parametrize(
    ("state", "queue", "shown"),
    [
        (None, {"7": "PENDING, Priority"}, "queued"),
        ("stopped", {"7": "PENDING, BeginTime"}, "queued"),
        ("stopped", {"8": "PENDING"}, "stopped"),
        ("stopped", {}, "stopped"),
        ("finished", {}, "finished"),
        (None, {}, "—"),
    ],
)
def test_a_run_shows_its_state_in_the_queue(
    tmp_path: Path, state: str | None, queue: dict[str, str], shown: str
) -> None:
    found = read(make(tmp_path / "r", state, [SUBMITTED], []), works=False, queue=queue)
    assert found.state == shown
    assert found.job == "7"
    assert found.queue == queue.get("7")
    assert (f"7 {queue['7']}" if "7" in queue else "7 over") in grid([cells(found)])


DEEP = "[" * 100_000
DAMAGE: dict[str, Any] = {
    "deep": lambda file: file.write_text(DEEP),
    "binary": lambda file: file.write_bytes(bytes(range(256)) * 4),
    "a folder": lambda file: file.mkdir(),
    "a pipe": lambda file: os.mkfifo(file),
    "a device": lambda file: file.symlink_to("/dev/zero"),
    "a link to itself": lambda file: file.symlink_to(file),
    "a list": lambda file: file.write_text("[1, 2]\n"),
    "text": lambda file: file.write_text('"finished"\n'),
    "a key twice": lambda file: file.write_text('{"step": 1, "step": 2}\n'),
    "10,000 digits": lambda file: file.write_text('{"step": %s, "steps": %s}\n' % (("1" * 10_000,) * 2)),
    "NaN": lambda file: file.write_text('{"loss": NaN, "samples": NaN, "lr": NaN}\n'),
}  # fmt: skip
VALUES = ["x", [], {}, True, -1, 1.5, 10**30, 1e999, [[[1]]]]
NAMES = ("outcome.json", "plan.json", "events.jsonl", "metrics.jsonl")
# a numeric field of each file
FIELDS = {"outcome.json": "step", "plan.json": "samples", "events.jsonl": "step", "metrics.jsonl": "samples"}


def whole(folder: Path) -> Path:
    events = [{"event": "start"}, {"event": "stopped", "cause": "SIGTERM", "step": 40}]
    return make(folder, "stopped", events, [{"step": 40, "samples": 2560, "loss": 0.5, "val/loss": 0.25}])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_shown_in_its_runs_row_and_the_list_is_complete(
    tmp_path: Path, name: str, damage: str
) -> None:
    for run in "abc":
        whole(tmp_path / run)
    file = tmp_path / "b" / name
    file.unlink()
    DAMAGE[damage](file)
    found = [read(run) for run in directories(tmp_path)]
    assert [each.state for each in found] == ["stopped", "damaged", "stopped"]
    assert name in (found[1].cause or "")
    assert "damaged" in grid(list(map(cells, found)))
    json.loads(json.dumps([run.summary() for run in found], allow_nan=False))
    assert f"damaged: {name}" in str(result(tmp_path / "b"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", VALUES, ids=str)
def test_a_value_of_another_type_is_damage(tmp_path: Path, name: str, value: Any) -> None:
    run = whole(tmp_path / "a")
    line = json.loads((run / name).read_text().splitlines()[-1])
    (run / name).write_text(json.dumps(line | {FIELDS[name]: value}).replace("Infinity", "1e999") + "\n")
    found = read(run, works=True, queue={})
    assert found.state == "damaged"
    assert found.cause
    assert FIELDS[name] in found.cause
    str(result(run))
    assert last_step(run) in (0, 40)


def test_a_line_being_written_is_no_damage(tmp_path: Path) -> None:
    run = whole(tmp_path / "a")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 41, "sam')
    assert read(run).state == "stopped"


def test_the_cause_of_the_last_stop_is_shown(tmp_path: Path) -> None:
    events = [
        {"event": "stopped", "cause": "SIGTERM"},
        {
            "event": "requeue",
            "cause": "preempted: a job with a higher priority took its place, and that is a long cause",
        },
        {"event": "start"},
    ]
    found = read(make(tmp_path / "r", "stopped", events, []), works=False, queue={})
    assert found.cause == events[1]["cause"]
    assert cells(found)["stopped last by"] == f"{events[1]['cause'][:60]}…"
