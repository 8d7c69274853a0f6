"""Test the result read from a run directory in any state."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from isobatch.conf.rundir.outcome import Outcome
from isobatch.scaling.report.grid import grid
from isobatch.scaling.report.result import Result, result

ROOT = Path(__file__).parents[2]


def test_result_of_a_finished_run_is_read(tmp_path: Path) -> None:
    (tmp_path / "outcome.json").write_text(json.dumps(asdict(Outcome("finished", "", 1200, 4800, "a1"))))
    (tmp_path / "plan.json").write_text(json.dumps({"lr": {"peak": 0.4}}))
    lines = [{"step": 1, "loss": 2.0}, {"step": 1, "val/loss": 9.0, "val/f1": 0.1}, {"loss": 1.5}, {"val/loss": 1.25}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"loss": 0.')  # killed while writing
    found = result(tmp_path)
    assert found == Result("finished", 1200, 4800, loss=1.5, val={"val/loss": 1.25}, peak=0.4)
    assert str(found) == "finished after 1,200 steps, 4,800 samples · loss 1.5 · val/loss 1.25"


def test_restarts_and_skipped_steps_are_reported(tmp_path: Path) -> None:
    (tmp_path / "outcome.json").write_text(json.dumps(asdict(Outcome("finished", "", 9, 90, "a1"))))
    lines = [{"loss": 0.5}, {"loss": None}, {"val/loss": 0.25, "ema/loss": 0.125}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    events = [
        {"event": "start"},
        {"event": "restart", "kind": "crashed", "cause": "killed"},
        {"event": "skip", "step": 3},
        {"event": "skip", "step": 5},
        {"event": "restart", "kind": "oom", "per_gpu_before": 2048, "per_gpu": 1024},
        {"event": "going_on", "step": 4},
        {"event": "restart", "kind": "oom", "per_gpu_before": 1024, "per_gpu": 512},
        {"event": "going_on", "step": 4},
        {"event": "skip", "step": 7},
    ]
    (tmp_path / "events.jsonl").write_text("\n".join(map(json.dumps, events)) + '\n{"event": "rest')
    found = result(tmp_path)
    assert str(found) == (
        "finished after 9 steps, 90 samples · 3 restarts · per-GPU batch 2,048 → 512 (out of memory) · "
        "2 steps skipped (not finite) · loss 0.5 · val/loss 0.25 · ema/loss 0.125"
    )
    assert {"restarts": 3, "skipped": 2}.items() <= found.row().items()
    assert not {"restarts", "skipped"} & Result().row().keys()


@pytest.mark.parametrize("content", [None, "", "{", "[]", "3"])
def test_result_without_readable_files_is_empty(tmp_path: Path, content: str | None) -> None:
    for name in ("outcome.json", "plan.json", "metrics.jsonl", "events.jsonl"):
        if content is not None:
            (tmp_path / name).write_text(content)
    assert result(tmp_path) == Result()


def test_table_aligns_numbers_right_and_has_a_column_per_name() -> None:
    rows = [
        {"seed": "1", "state": "finished", "steps": 12000, "loss": 0.123456},
        {"seed": "10", "state": "—", "val": 1.0},
    ]
    assert grid(rows).splitlines() == [
        "seed  state      steps    loss  val",
        "1     finished  12,000  0.1235    —",
        "10    —              —       —    1",
    ]


def test_a_command_imports_reports_only_if_it_makes_one() -> None:
    loaded = "[name for name in sys.modules if name.startswith('isobatch.scaling.report')]"
    code = (
        f"import sys, isobatch.launch, isobatch.api; print(*{loaded}); print(sys.modules['isobatch'].Report.__name__)"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    modules, report = out.splitlines()
    assert {name.rpartition(".")[2] for name in modules.split()} == {"report", "grid", "plan_json", "plan_table"}
    assert report == "Report"
