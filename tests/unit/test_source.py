"""Test how a run's code is recorded: hashes of its files, their changes, and the repository."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from isobatch.conf.compose import compose
from isobatch.conf.rundir.directory import RunDir
from isobatch.trainers.launch import source as source_module
from isobatch.trainers.launch.changes import changes
from isobatch.trainers.launch.source import Source, commit_of, folder_of, repository_of

TASK = ("task=custom", "lr.peak=0.1")
CODE: dict[str, Any] = {"commit": "", "repository": None}


@pytest.fixture(params=["package", "namespace", "module"])
def project(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Create a task with a helper module and a module that is imported late. Return target, late module and files."""
    name = f"task_in_{request.param}"
    files = {"helper_of.py": "", f"{name}.py": "import helper_of\nclass Task: ...\n"}
    target, late = f"{name}.Task", "late_of"
    if request.param != "module":
        files = {f"{name}/models/net.py": "", f"{name}/tasks/task.py": f"import {name}.models.net\nclass Task: ...\n"}
        target, late = f"{name}.tasks.task.Task", f"{name}.late"
    if request.param == "package":
        files |= {f"{name}/{folder}__init__.py": "" for folder in ("", "models/", "tasks/")}
    files[late.replace(".", "/") + ".py"] = ""
    for file, text in files.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield target, late, files
    for module in set(sys.modules) - before:
        del sys.modules[module]


def trained(folder: Path, files: dict[str, str], **code: Any) -> RunDir:
    run = RunDir(folder)
    run.path.mkdir(exist_ok=True)
    run.event("start", **CODE | code)
    run.event("source", files=files)
    return run


def test_changed_files_are_named_also_in_another_checkout(
    project: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, late, files = project
    config = compose([*TASK, f"task._target_={target}"])
    importlib.import_module(target.rpartition(".")[0])
    source = Source(config)
    source.look()
    assert set(source.files) == files.keys() - {late.replace(".", "/") + ".py"}
    importlib.import_module(late)
    assert list(source.look()) == [late.replace(".", "/") + ".py"]
    run = trained(tmp_path / "run", source.files)
    assert not changes(run, config, CODE)

    elsewhere = tmp_path / "elsewhere"
    for file, text in files.items():
        (elsewhere / file).parent.mkdir(parents=True, exist_ok=True)
        (elsewhere / file).write_text(text)
    monkeypatch.setattr(sys, "path", [str(elsewhere), *(path for path in sys.path if path != str(tmp_path))])
    for module in [name for name in sys.modules if name.replace(".", "/") + ".py" in files or name in target]:
        del sys.modules[module]
    importlib.invalidate_caches()
    assert folder_of(config).is_relative_to(elsewhere)
    assert not changes(run, config, CODE)
    helper, other = sorted(set(files) - {f"{target.rpartition('.')[0].replace('.', '/')}.py"})[:2]
    (elsewhere / helper).write_text("# edited")
    (elsewhere / other).unlink()
    found = changes(run, config, CODE)
    assert found.files.keys() == {helper, other}
    assert f"{other} (gone)" in str(found)
    assert not set(sys.modules) & {target.rpartition(".")[0]}, "the task was imported"
    run.event("start", **CODE)
    run.event("source", files=found.files)
    assert not changes(run, config, CODE)


def test_an_edit_during_training_is_reported_at_the_next_start(project: Any, tmp_path: Path) -> None:
    target = project[0]
    config = compose([*TASK, f"task._target_={target}"])
    importlib.import_module(target.rpartition(".")[0])
    source = Source(config)
    source.look()
    file = f"{target.rpartition('.')[0].replace('.', '/')}.py"
    (tmp_path / file).write_text("# edited")
    importlib.import_module("wave")  # a late import
    assert not source.look()
    assert changes(trained(tmp_path / "run", source.files), config, CODE).files.keys() == {file}


def test_libraries_and_missing_modules_are_not_compared(tmp_path: Path) -> None:
    config = compose(["optimizer=custom", "optimizer._target_=torch.optim.RMSprop", "lr.peak=0.1"])
    source = Source(config)
    source.look()
    assert not source.files.keys() - {"trainers/tasks/digits.py"}
    missing = compose([*TASK, "task._target_=not_here.Task"])
    assert not changes(trained(tmp_path, {"not_here.py": "0"}), missing, CODE)
    assert folder_of(missing) == Path.cwd()


def test_a_start_that_did_not_train_is_ignored(tmp_path: Path) -> None:
    config = compose([])
    run = trained(tmp_path, {}, repository={"commit": "a", "dirty": False}, commit="1")
    run.event("start", repository={"commit": "b", "dirty": False}, commit="2")  # refused
    now = {"commit": "2", "repository": {"commit": "b", "dirty": True}}
    found = changes(run, config, now)
    assert (found.repository[0]["commit"], found.commit) == ("a", ["1", "2"])
    assert str(found) == "the repository (a, now b with uncommitted changes), Isobatch (1, now 2)"
    for unknown in (None, {"commit": "a", "dirty": None}):
        assert not changes(run, config, {"commit": "1", "repository": unknown})


# ---- the repository


def git(folder: Path, *arguments: str) -> None:
    who = ("-c", "user.name=A", "-c", "user.email=a@example.org")
    subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True)


def test_the_commit_and_uncommitted_changes_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert repository_of(tmp_path / "not there") is None
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert repository_of(tmp_path) is None
    git(tmp_path, "init")
    assert repository_of(tmp_path) == {"commit": "", "dirty": False}
    (tmp_path / "task.py").write_text("1")
    git(tmp_path, "add", "task.py")
    git(tmp_path, "commit", "-m", "one")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/log").write_text("untracked")
    monkeypatch.setenv("GIT_DIR", "/elsewhere")
    clean = repository_of(tmp_path / "runs")
    assert clean == {"commit": commit_of(tmp_path), "dirty": False}
    assert len(commit_of(tmp_path)) == 40
    (tmp_path / "task.py").write_text("2")
    assert repository_of(tmp_path) == {**clean, "dirty": True}


def test_git_may_fail_or_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "GIT_S", 0.2)
    fake = tmp_path / "git"
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for script, expected in (
        ("exit 128", None),
        ("case $* in *status*) exec sleep 9;; esac; echo abc", {"commit": "abc", "dirty": None}),
    ):
        fake.write_text(f"#!/bin/sh\n{script}\n")
        fake.chmod(0o755)
        assert repository_of(tmp_path) == expected
    monkeypatch.setenv("PATH", "")
    assert repository_of(tmp_path) is None
