"""Test keyword arguments that aren't part of the identity: ``task.local`` and ``data.local``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from isobatch.conf.compose import compose
from isobatch.conf.identity import identity, science
from isobatch.conf.saved import dump
from isobatch.scaling.errors import UserError
from isobatch.trainers.ranks.session import refuse_other_commands
from isobatch.trainers.tasks.task import make_task
from tests.support.harness import World, in_ranks

HERE = "tests.ranks.test_local"
TASK = ("task=custom", f"task._target_={HERE}.Placed", "lr.peak=0.1")
DATA = (*TASK, f"data._target_={HERE}.Rows", "data.args.rows=3", "data.val_args.rows=1")


class Rows:
    def __init__(self, rows: int, cache: Any = None) -> None:
        self.rows, self.cache = rows, cache

    def __len__(self) -> int:
        return self.rows


class Placed:
    def __init__(self, width: int = 1, folder: str = "here", cache: Any = None) -> None:
        self.width, self.folder, self.cache = width, folder, cache

    def _collate(self) -> None: ...

    def __augment(self) -> None: ...

    def model(self) -> None: ...

    def train_data(self) -> None: ...

    def loss(self) -> None: ...


def task_of(*overrides: str) -> Any:
    return make_task(compose(overrides))


def test_local_is_passed_to_the_constructors_with_args() -> None:
    cache = f"{{_target_: {HERE}.Rows, rows: 7}}"
    task = task_of(
        *TASK, "task.args.width=2", "task.args.folder=null", "task.local.folder=/x", f"task.local.cache={cache}"
    )
    assert (task.own.width, task.own.folder, task.own.cache.rows) == (2, "/x", 7)
    task = task_of(*DATA, f"data.local.cache={cache}")
    assert [(data.rows, data.cache.rows) for data in (task.train_data(), task.val_data())] == [(3, 7), (1, 7)]


def test_objects_in_args_are_built_innermost_first() -> None:
    """The identity is that of the description; the error of an argument names its place."""
    inner = f"{{_target_: {HERE}.Rows, rows: 7, cache: [{{_target_: {HERE}.Rows, rows: 2}}]}}"
    config = compose([*TASK, f"task.args.cache={inner}"])
    cache = make_task(config).own.cache
    assert (cache.rows, cache.cache[0].rows) == (7, 2)
    assert science(config)["task.args"]["cache"]["rows"] == 7
    with pytest.raises(UserError) as error:
        task_of(*TASK, f"task.args.cache={{_target_: {HERE}.Rows, row: 7}}")
    assert error.value.key == "task.args.cache"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((*TASK, "task.args.folder=/x", "task.local.folder=/y"), "task.local.folder repeats task.args.folder"),
        (("task.local.width=8",), "task.local.width repeats task.args.width"),
        ((*DATA, "data.local.rows=2"), "data.local.rows repeats data.args.rows"),
        ((*TASK, "data.local.cache=/x"), "data.local need data._target_"),
    ],
)
def test_argument_given_twice_is_rejected(overrides: tuple[str, ...], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        compose(overrides)


def test_unknown_argument_is_rejected() -> None:
    with pytest.raises(UserError, match=r"task.args and task.local=.*'foldr'.*width, folder, cache"):
        task_of(*TASK, "task.local.foldr=/x")


def test_local_may_change_on_a_resume(tmp_path: Path) -> None:
    """Each argument that isn't given again is kept. action=evaluate may change them, too."""
    before = compose([*DATA, "task.local={folder: /x, cache: 1}", "data.local.cache=/x"])
    assert identity(before) == identity(compose(DATA))
    (tmp_path / "config.yaml").write_text(dump(before))
    (tmp_path / "plan.json").touch()
    resumed = compose([f"run.dir={tmp_path}", "task.local.folder=/y"])
    evaluated = compose(["action=evaluate", f"init_from={tmp_path}", "task.local.folder=/y"])
    for config in (resumed, evaluated):
        assert (config.task.local, config.data.local) == ({"folder": "/y", "cache": 1}, {"cache": "/x"})
    assert identity(resumed) == identity(before)


def test_local_may_differ_between_machines(tmp_path: Path) -> None:
    def body(world: World) -> Any:
        local = f"task.local.folder=/scratch/{world.rank}"
        refuse_other_commands(compose([*DATA, local, f"data.local.cache={world.rank}"]), world)
        refuse_other_commands(compose([*TASK, f"task.args.width={world.rank}"]), world)

    assert all("rank 1 was started with task.args" in end["message"] for end in in_ranks(2, body, tmp_path))


def test_private_method_is_not_a_misspelling(capsys: pytest.CaptureFixture[str]) -> None:
    task_of(*TASK)
    assert capsys.readouterr().out == ""
