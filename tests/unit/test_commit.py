"""Test that a run can resume from a checkpoint at any moment while checkpoints are committed and dropped."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from isobatch.conf.rundir.directory import RunDir
from isobatch.trainers.checkpoints.commit import (
    aside_of,
    clear_leftovers,
    commit,
    compose,
    drop_older,
    link_best,
    pass_over,
)
from isobatch.trainers.tensors.manifest import NAME, Damaged, read
from isobatch.trainers.tensors.names import checkpoints
from tests.support.disks import mounted
from tests.unit.test_manifest import header_of, save, verified, write_files


def commit_step(run: RunDir, step: int, *, best: bool = False, **header: Any) -> list[str]:
    """Write and commit a checkpoint like ranks."""
    parts = write_files(aside_of(run, step))
    return commit(run, step, compose(header_of(step, **header), parts, {}), best=best)


def names(run: RunDir) -> list[str]:
    return sorted(path.name for path in run.checkpoints.iterdir())


def test_a_committed_checkpoint_is_complete_and_no_other_files_remain(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    commit_step(run, 3)
    assert names(run) == ["step-00000003"]
    assert verified(checkpoints(run)[0]).header == header_of(3)


def test_the_link_to_the_best_can_be_moved_with_the_run(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "a")
    for step, best in ((1, True), (2, True), (3, False)):
        commit_step(run, step, best=best)
    moved = run.path.rename(tmp_path / "b")
    assert verified(moved / "checkpoints" / "best").header.step == 2


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for step in range(1, 8):
        commit_step(run, step, best=step == 2)
        drop_older(run, step, keep=2)
    assert names(run) == ["best", "step-00000002", "step-00000006", "step-00000007"]
    commit_step(run, 8, best=True)
    drop_older(run, 8, keep=1)
    assert names(run) == ["best", "step-00000008"]


def test_kept_checkpoints_are_never_removed(tmp_path: Path) -> None:
    """They count among the newest, and one that was passed over is replaced by the run's next one."""
    run = RunDir(tmp_path)
    for step in range(1, 8):
        commit_step(run, step, kept=step in (2, 4, 7))
        drop_older(run, step, keep=2)
    assert names(run) == ["step-00000002", "step-00000004", "step-00000006", "step-00000007"]
    pass_over(run, 3)
    for step in (4, 5, 8, 9):
        commit_step(run, step, kept=step == 4)
        drop_older(run, step, keep=1)
    assert names(run) == ["passed-over", "step-00000002", "step-00000004", "step-00000009"]
    (run.checkpoints / "step-00000002" / NAME).write_text("")
    drop_older(run, 9, keep=1)
    assert "step-00000002" not in names(run)  # nothing can use a damaged one


def test_a_passed_over_checkpoint_is_kept_but_no_longer_used(tmp_path: Path) -> None:
    """The run resumed from step 2, since steps 4 and 9 were damaged, and resumed again later."""
    run = RunDir(tmp_path)
    for step in (1, 2, 4, 9):
        commit_step(run, step, best=step == 9)
    assert pass_over(run, 9) == []
    assert [path.name for path in pass_over(run, 2)] == ["step-00000009", "step-00000004"]
    assert names(run) == ["passed-over", "step-00000001", "step-00000002"]
    for step in (3, 4):
        commit_step(run, step, best=step == 3)
        drop_older(run, step, keep=2)
    (again,) = pass_over(run, 3)
    assert again == run.checkpoints / "passed-over/step-00000004-2"
    assert names(run) == ["best", "passed-over", "step-00000003"]
    assert sorted(path.name for path in again.parent.iterdir()) == ["step-00000004", again.name, "step-00000009"]


@pytest.mark.parametrize("kind", ["damaged", "a file", "a link"])
def test_an_existing_path_of_the_same_name_is_replaced(tmp_path: Path, kind: str) -> None:
    run = RunDir(tmp_path)
    folder = save(run, 3)
    if kind == "damaged":
        (folder / NAME).write_text("")
    else:
        shutil.rmtree(folder)
        folder.write_text("") if kind == "a file" else folder.symlink_to(tmp_path)
    commit_step(run, 3)
    assert names(run) == ["step-00000003"]
    assert verified(checkpoints(run)[0]).header == header_of(3)
    assert tmp_path.is_dir()


def test_a_checkpoint_stays_if_it_cannot_be_replaced(tmp_path: Path) -> None:
    """A mount point can't be renamed."""
    run = RunDir(tmp_path)
    save(run, 3)
    aside = aside_of(run, 3)
    aside.mkdir()
    with mounted(aside):
        manifest = compose(header_of(3, skipped=1), write_files(aside), {})
        with pytest.raises(OSError, match="busy"):
            commit(run, 3, manifest, best=True)
    clear_leftovers(run)
    assert names(run) == ["step-00000003"]
    assert verified(checkpoints(run)[0]).header.skipped == 0


def test_a_checkpoint_that_cannot_be_removed_is_named_and_the_others_are_removed(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for step in (1, 2, 3, 4):
        commit_step(run, step)
    stuck = run.checkpoints / "step-00000002"
    with mounted(stuck):
        (warning,) = drop_older(run, 4, keep=1)
    assert "busy" in warning
    assert str(stuck) in warning
    assert names(run) == ["step-00000002", "step-00000004"]


def test_a_failure_after_the_commit_is_a_warning(tmp_path: Path) -> None:
    """A folder in the place of the link can't be replaced."""
    run = RunDir(tmp_path)
    (run.checkpoints / "best").mkdir(parents=True)
    parts = write_files(aside_of(run, 3))
    (warning,) = commit(run, 3, compose(header_of(3), parts, {}), best=True)
    assert "best" in warning
    assert verified(checkpoints(run)[0]).header == header_of(3)


def move_and_link(run: RunDir, step: int, to: Path) -> Path:
    """Move a checkpoint to another path, and link to it by a relative path."""
    path = run.checkpoints / f"step-{step:08d}"
    shutil.move(path, to)
    path.symlink_to(os.path.relpath(to, path.parent))
    return path


def test_a_link_to_a_moved_checkpoint_is_a_checkpoint(tmp_path: Path) -> None:
    run, away = RunDir(tmp_path / "run"), tmp_path / "away"
    for step in (1, 2, 3):
        commit_step(run, step, best=step == 2)
    link = move_and_link(run, 2, away)
    assert [verified(path).header.step for path in checkpoints(run)] == [3, 2, 1]
    assert verified(run.checkpoints / "best").header.step == 2  # a link to a link
    link_best(run, run.checkpoints / "step-00000003")
    assert drop_older(run, 3, keep=1) == []  # the user's link and its target stay
    assert names(run) == ["best", "step-00000002", "step-00000003"]
    (moved,) = pass_over(run, 2)[:1]
    assert moved.name == "step-00000003"
    (moved,) = pass_over(run, 1)
    assert verified(moved).header.step == 2  # the relative link works one folder deeper
    assert not link.is_symlink()


def test_a_broken_link_is_a_damaged_checkpoint(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    commit_step(run, 2)
    move_and_link(run, 2, tmp_path / "away").parent.joinpath("step-00000009").symlink_to(tmp_path / "gone")
    found = checkpoints(run)
    assert [path.name for path in found] == ["step-00000009", "step-00000002"]
    with pytest.raises(Damaged, match=r"it is a link to .*gone, which doesn't exist"):
        read(found[0])
    assert verified(found[1]).header.step == 2


def test_a_replaced_link_is_reported(tmp_path: Path) -> None:
    run, away = RunDir(tmp_path / "run"), tmp_path / "away"
    commit_step(run, 3)
    move_and_link(run, 3, away)
    (warning,) = commit(run, 3, compose(header_of(3), write_files(aside_of(run, 3)), {}), best=False)
    assert "step-00000003 was a link" in warning
    assert (away / NAME).exists()
    assert names(run) == ["step-00000003"]


def test_the_folder_of_checkpoints_may_be_a_link(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    (tmp_path / "away").mkdir()
    run.path.mkdir()
    run.checkpoints.symlink_to("../away")
    for step in (1, 2, 3):
        assert commit_step(run, step, best=True) == drop_older(run, step, keep=2) == []
    clear_leftovers(run)
    assert names(run) == ["best", "step-00000002", "step-00000003"]
    assert run.checkpoints.is_symlink()


EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.truncate", "shutil.rmtree")


def killed_at(event: int, run: RunDir) -> bool:
    """Save step 3 again in a process, and kill it at its ``event``-th disk operation. Return False if it has fewer."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0
    seen = 0

    def hook(name: str, _: Any) -> None:
        nonlocal seen
        seen += name in EVENTS
        if name in EVENTS and seen == event:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    try:
        commit_step(run, 3, best=True, skipped=1)
        drop_older(run, 3, keep=1)
    finally:
        os._exit(0)


def test_a_kill_at_any_moment_leaves_a_valid_checkpoint(tmp_path: Path) -> None:
    """Step 3 always exists, in its old or its new version, and no temporary files remain."""
    event, skipped = 0, []
    killed = True
    while killed:
        event += 1
        run = RunDir(tmp_path / str(event))
        save(run, 2)
        save(run, 3)
        killed = killed_at(event, run)
        clear_leftovers(run)
        newest = verified(checkpoints(run)[0])
        assert newest.header.step == 3
        skipped.append(newest.header.skipped)
        assert set(names(run)) <= {"best", "step-00000002", "step-00000003"}, event
    assert event > 20
    assert skipped == sorted(skipped)
    assert (skipped[0], skipped[-1]) == (0, 1)
    assert names(run) == ["best", "step-00000003"]


def test_only_our_own_leftovers_are_removed(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    clear_leftovers(run)
    save(run, 3)
    for name in (".step-00000004.tmp", ".old-step-00000001", ".precious", "mine"):
        (run.checkpoints / name).mkdir()
        (run.checkpoints / name / "file").write_text("")
    (run.checkpoints / ".best.tmp").symlink_to("nowhere")
    (run.checkpoints / ".step-00000005.tmp").symlink_to(tmp_path)
    clear_leftovers(run)
    assert names(run) == [".precious", "mine", "step-00000003"]
    assert tmp_path.is_dir()


def test_a_committed_checkpoint_is_kept_over_a_complete_uncommitted_one(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    save(run, 3)
    parts = write_files(aside_of(run, 3))
    (aside_of(run, 3) / NAME).write_bytes(compose(header_of(3, skipped=1), parts, {}))
    clear_leftovers(run)
    assert names(run) == ["step-00000003"]
    assert verified(checkpoints(run)[0]).header.skipped == 0
