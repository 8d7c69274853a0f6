"""What a run directory says of its run, whatever state it is in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scaling.report import Result, grid, result


def test_result_of_a_finished_run(tmp_path: Path) -> None:
    (tmp_path / "outcome.json").write_text(json.dumps({"state": "finished", "step": 1200, "samples": 4800}))
    (tmp_path / "plan.json").write_text(json.dumps({"lr": {"peak": 0.4}}))
    lines = [{"step": 1, "loss": 2.0}, {"step": 1, "val/loss": 9.0, "val/f1": 0.1}, {"loss": 1.5}, {"val/loss": 1.25}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"loss": 0.')  # killed while writing
    found = result(tmp_path)
    assert found == Result("finished", 1200, 4800, loss=1.5, val={"val/loss": 1.25}, peak=0.4)
    assert str(found) == "finished after 1,200 steps, 4,800 samples · loss 1.5 · val/loss 1.25"


@pytest.mark.parametrize("content", [None, "", "{", "[]", "3"])
def test_result_of_a_run_that_got_nowhere(tmp_path: Path, content: str | None) -> None:
    for name in ("outcome.json", "plan.json", "metrics.jsonl"):
        if content is not None:
            (tmp_path / name).write_text(content)
    assert result(tmp_path) == Result()


def test_table_has_numbers_to_the_right_and_a_column_for_every_name() -> None:
    rows = [
        {"seed": "1", "state": "finished", "steps": 12000, "loss": 0.123456},
        {"seed": "10", "state": "—", "val": 1.0},
    ]
    assert grid(rows).splitlines() == [
        "seed  state      steps    loss  val",
        "1     finished  12,000  0.1235    —",
        "10    —              —       —    1",
    ]
