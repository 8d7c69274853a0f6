"""Which files a rejected start leaves."""

import json
import shutil
from pathlib import Path

import pytest

from isobatch.conf.rundir import rejected
from isobatch.conf.rundir.outcome import Outcome
from isobatch.conf.rundir.rejected import removed_if_rejected

LONGEST = "x" * 255  # bytes of a file name on Linux


def start(directory: Path, state: str = "refused") -> None:
    """Leave in ``directory`` what a start with two ranks leaves that ended in ``state``."""
    (directory / "logs").mkdir(parents=True)
    outcome = {"state": state, "cause": "no data", "step": 0, "samples": 0, "attempt": "a"}
    for name in ("lock", "config.yaml", "events.jsonl", "logs/rank-0.log", "logs/rank-1.log", "logs/error-rank-1.json"):
        (directory / name).write_text("text")
    (directory / "outcome.json").write_text(json.dumps(outcome))


@pytest.mark.parametrize("name", ["run", "new/folders/run", LONGEST])
def test_a_rejected_start_leaves_nothing(tmp_path: Path, name: str) -> None:
    with removed_if_rejected(tmp_path / name):
        start(tmp_path / name)
    assert not [*tmp_path.iterdir()]


def test_a_start_rejected_before_it_has_logs_leaves_nothing(tmp_path: Path) -> None:
    with removed_if_rejected(tmp_path / "run"):
        start(tmp_path / "run")
        shutil.rmtree(tmp_path / "run/logs")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("state", ["crashed", "oom", "stopped", "finished", "running"])
def test_any_other_start_leaves_its_directory(tmp_path: Path, state: str) -> None:
    with removed_if_rejected(tmp_path / "run"):
        start(tmp_path / "run", state)
    assert (tmp_path / "run/logs/rank-0.log").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "notes.txt"])
def test_a_rejected_start_leaves_a_directory_with_other_files(tmp_path: Path, name: str) -> None:
    with removed_if_rejected(tmp_path / "run"):
        start(tmp_path / "run")
        (tmp_path / "run" / name).write_text("of someone else")
    assert {"outcome.json", name} <= {file.name for file in (tmp_path / "run").iterdir()}


def test_a_file_that_arrives_during_the_removal_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def arrives(directory: Path, rejects=rejected._is_rejected) -> bool:
        answer = rejects(directory)
        (directory / "logs/notes.txt").write_text("of someone else")
        return answer

    with removed_if_rejected(tmp_path / "run"):
        start(tmp_path / "run")
        # The file appears after the second look, which is at the directory set aside.
        monkeypatch.setattr(rejected, "_is_rejected", lambda d: arrives(d) if d.name != "run" else True)
    assert [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.txt")] == ["run/logs/notes.txt"]


def test_a_start_that_follows_during_the_removal_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with removed_if_rejected(tmp_path / "run"):
        start(tmp_path / "run", "running")
        monkeypatch.setattr(rejected, "known_outcome", _refused_once(rejected.known_outcome))
    assert json.loads((tmp_path / "run/outcome.json").read_text())["state"] == "running"
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


def _refused_once(read):
    """Return ``read`` preceded by an answer from before the following start."""
    answers = iter([Outcome("refused", "no data", 0, 0, "a")])
    return lambda directory: next(answers, None) or read(directory)


def test_a_rejection_is_raised_although_the_disk_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(directory: Path) -> bool:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(rejected, "_is_rejected", fails)
    with pytest.raises(ValueError, match="rejected"), removed_if_rejected(tmp_path / "run"):
        raise ValueError("rejected")
