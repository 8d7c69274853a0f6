"""Test hints for users who wait, or whose code fails in a common way."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from isobatch.conf import terminal
from isobatch.scaling.errors import UserError
from isobatch.trainers.model.targets import locate
from isobatch.trainers.ranks.failure import Reached, describe_failure


@pytest.mark.parametrize(("takes_s", "expected"), [(0.0, ""), (0.3, "opening the data …\n")])
def test_only_slow_work_is_announced(
    takes_s: float, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "SLOW_S", 0.1)
    with terminal.say_if_slow("opening the data …"):
        time.sleep(takes_s)
    time.sleep(0.2)
    assert capsys.readouterr().out == expected


def test_cuda_calls_without_cuda_get_a_hint() -> None:
    message = describe_failure(AssertionError("Torch not compiled with CUDA enabled"), 0, "", Reached()).cause
    assert "leave out .cuda()" in message
    assert "leave out .cuda()" not in describe_failure(AssertionError("something else"), 0, "", Reached()).cause


def test_a_missing_module_names_the_searched_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a module fails while it is imported, its error and its line are named."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "/beside/configs")
    with pytest.raises(UserError) as error:
        locate("task._target_", "no_such_module_here.Task")
    assert (error.value.key, error.value.value) == ("task._target_", "no_such_module_here.Task")
    assert all(named in error.value.fix for named in (str(tmp_path), "/beside/configs", "install it"))
    (tmp_path / "broken_one.py").write_text("import missing_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"missing_dependency.*broken_one.py:1") as error:
        locate("task._target_", "broken_one.Task")
    assert error.value.fix == ""
