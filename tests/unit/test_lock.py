"""Test the lock of a run directory with and without flock, on this and other machines, and when it is lost."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from isobatch.conf.rundir import lock as lock_module
from isobatch.conf.rundir.directory import RunDir
from isobatch.conf.rundir.lock import BEAT_S, DYING_S, LOCK, LOOKS, works
from isobatch.conf.rundir.outcome import Outcome
from isobatch.conf.rundir.owner import OWNER, Seen
from isobatch.scaling.errors import UserError
from tests.support.disks import mounted
from tests.support.noflock import without_flock

ROOT = Path(__file__).parents[2]
TAKES = """
import sys, time
from isobatch.conf.rundir.directory import RunDir
from isobatch.scaling.errors import UserError
try:
    lock = RunDir(sys.argv[1]).lock()
except UserError as error:
    sys.exit(print(error) or 2)
print("has it", flush=True)
time.sleep(float(sys.argv[2]))
"""
OUTCOME = Outcome("running", "", 3, 96, "a1")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    (run.path / "config.yaml").write_text("")
    return run


@pytest.fixture
def elsewhere(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the owner a process on another machine, whose locks aren't visible here."""
    monkeypatch.setattr(lock_module, "SILENT_S", 0.5)
    disown(run, boot="another")
    yield
    assert not list(run.path.glob(f"{OWNER}?*"))  # no temporary files


def start(folder: Path, stays_s: float = 60, **env: str) -> subprocess.Popen[str]:
    """Start a process that takes the directory and waits, or is rejected."""
    command = [sys.executable, "-c", TAKES, str(folder), str(stays_s)]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **env}, stdout=subprocess.PIPE, text=True)


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def disown(run: RunDir, **changes: Any) -> None:
    """Write an owner file with ``changes`` for this process, which doesn't hold the lock."""
    run.lock(attempt="a1").file.close()
    run.write_outcome(OUTCOME)
    change(run, **changes)


def change(run: RunDir, **changes: Any) -> None:
    seen = Seen.of(run.path)
    assert seen
    assert seen.owner
    (run.path / OWNER).write_text(json.dumps(dataclasses.asdict(dataclasses.replace(seen.owner, **changes))))


# ---- without flock


def test_only_one_of_many_launches_gets_the_directory(tmp_path: Path) -> None:
    env = without_flock(tmp_path)
    many = [start(tmp_path / "run", **env) for _ in range(6)]
    lines = []
    try:
        for process in many:
            assert process.stdout
            lines.append(process.stdout.readline())
    finally:
        for process in many:
            end(process)
    assert sum(line == "has it\n" for line in lines) == 1, lines
    assert sum("another launch works in" in line for line in lines) == 5, lines


def test_the_directory_of_a_dead_process_is_free_at_once(tmp_path: Path) -> None:
    """The dead process is a zombie, since nobody has waited for it."""
    env = without_flock(tmp_path)
    first = start(tmp_path / "run", **env)
    assert first.stdout
    assert first.stdout.readline() == "has it\n"
    second = start(tmp_path / "run", **env)
    assert second.wait() == 2
    first.kill()
    began = time.monotonic()
    RunDir(tmp_path / "run").lock().close()
    assert time.monotonic() - began < DYING_S
    end(first)


@pytest.mark.parametrize("removed", [("lock",), (OWNER,), ("lock", OWNER)])
def test_removed_files_do_not_free_the_directory(run: RunDir, removed: tuple[str, ...]) -> None:
    lock = run.lock(attempt="a1")
    run.write_outcome(OUTCOME)
    lost: list[str] = []
    lock.keep(lost.append)
    for name in removed:
        (run.path / name).unlink()
    other = start(run.path)
    assert other.wait() == 2, "another launch got the directory, too"
    lock.release()
    assert not lost
    assert not (run.path / OWNER).exists()


# ---- on other machines


@pytest.mark.usefixtures("elsewhere")
def test_a_silent_owner_on_another_machine_is_dead(run: RunDir) -> None:
    """The clocks of the machines may differ."""
    os.utime(run.path / OWNER, (time.time() + 3600,) * 2)
    began = time.monotonic()
    run.lock().close()
    assert time.monotonic() - began > 0.5


@pytest.mark.usefixtures("elsewhere")
def test_a_live_owner_on_another_machine_is_named(run: RunDir) -> None:
    seen, over = Seen.of(run.path), threading.Event()
    assert seen
    os.utime(run.path / OWNER, (9, 9))  # its clock is wrong

    def beats() -> None:
        for beat in range(10, 1000):
            if over.wait(0.1):
                return
            os.utime(run.path / OWNER, (beat, beat))

    thread = threading.Thread(target=beats)
    thread.start()
    try:
        with pytest.raises(UserError, match=rf"another launch works in .*\({seen.owner}; its heartbeat was seen\)"):
            run.lock()
    finally:
        over.set()
        thread.join()


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(
    "text", ["", "no JSON", '{"host": 3}', "[" * 4000, json.dumps({"host": 1, "pid": "x"}), "\0" * 9]
)
def test_an_owner_that_cannot_be_read_is_watched(run: RunDir, text: str) -> None:
    (run.path / OWNER).write_text(text)
    began = time.monotonic()
    run.lock().close()
    assert time.monotonic() - began > 0.5


def test_an_owner_in_another_pid_namespace_is_watched(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner is in a container of this machine whose flock isn't visible."""
    monkeypatch.setattr(lock_module, "SILENT_S", 0.5)
    disown(run, namespace="pid:[1]", pid=1 << 30, lock=0)
    began = time.monotonic()
    run.lock().close()
    assert time.monotonic() - began > 0.5


@pytest.mark.parametrize("way", ["ended", "job", "launch", "pid", "flock"])
def test_an_owner_known_to_have_ended_is_not_watched(run: RunDir, way: str) -> None:
    """For ``flock`` the owner is init, which runs but doesn't hold this flock."""
    changes = {"pid": {"pid": 1 << 30, "lock": 0}, "flock": {"pid": 1}}.get(way, {"boot": "another"})
    disown(run, job="7", job_restart=1, **changes)
    if way == "ended":
        run.write_outcome(dataclasses.replace(OUTCOME, state="stopped"))
    began = time.monotonic()
    run.lock("7" if way == "job" else "", 2, launches=["a1"] if way == "launch" else []).close()
    assert time.monotonic() - began < DYING_S


@pytest.mark.parametrize("change", [{"state": "over"}, {"step": None}, {"samples": -1}])
def test_a_damaged_outcome_does_not_end_an_owner(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    monkeypatch.setattr(lock_module, "SILENT_S", 0.5)
    disown(run, boot="another")
    ended = dataclasses.asdict(dataclasses.replace(OUTCOME, state="stopped"))
    (run.path / "outcome.json").write_text(json.dumps(ended | change))
    began = time.monotonic()
    run.lock().close()
    assert time.monotonic() - began > 0.5


def test_the_flock_of_an_earlier_start_of_the_same_job_is_awaited(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "DYING_S", 0.2)
    first = run.lock("7", 0)
    with pytest.raises(UserError, match=re.escape(f"another launch works in {run.path} ({first.owner})")):
        RunDir(run.path).lock("8", 1)
    closing = threading.Timer(0.6, first.file.close)
    closing.start()
    RunDir(run.path).lock("7", 1).close()
    closing.join()


def test_a_copy_of_a_directory_is_free(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner still works in the other directory."""
    monkeypatch.setattr(lock_module, "SILENT_S", 0.5)
    lock = run.lock(attempt="a1")
    shutil.copytree(run.path, run.path.with_name("copy"))
    RunDir(run.path.with_name("copy")).lock().close()
    lock.close()


def test_an_owner_that_has_just_taken_over_is_put_back(run: RunDir) -> None:
    """Two launches found the same dead owner. The first took over before the second removes the file."""
    disown(run, boot="another")
    seen = Seen.of(run.path)
    assert seen
    change(run, token="another")
    seen.remove(run.path)
    now = Seen.of(run.path)
    assert now
    assert now.owner
    assert now.owner.token == "another"


def test_a_working_launch_is_recognised(run: RunDir, tmp_path: Path) -> None:
    """Its flock may be invisible."""
    assert not works(run.path)
    first = start(run.path, **without_flock(tmp_path))
    assert first.stdout
    first.stdout.readline()
    assert works(run.path)
    end(first)
    assert not works(run.path)
    change(run, boot="another")
    assert works(run.path)
    os.utime(run.path / OWNER, (9, 9))
    assert not works(run.path)


# ---- a moved or removed directory


def moved(run: RunDir) -> None:
    run.path.rename(run.path.with_name("there"))


def replaced(run: RunDir) -> None:
    moved(run)
    other = RunDir(run.path)
    other.path.mkdir()
    other.write_outcome(dataclasses.replace(OUTCOME, attempt="b2"))
    other.lock(attempt="b2")


def deleted(run: RunDir) -> None:
    shutil.rmtree(run.path)


def emptied(run: RunDir) -> None:
    for path in run.path.iterdir():
        path.unlink()


def written_to_again(run: RunDir) -> None:
    """By a worker that was about to record an event when the directory was emptied."""
    emptied(run)
    (run.path / "events.jsonl").write_text('{"event": "saved"}\n')


def moved_and_written_to(run: RunDir) -> None:
    written_to_again(run)
    moved(run)


def taken(run: RunDir) -> None:
    change(run, token="another", host="elsewhere")


@pytest.mark.parametrize(
    ("what", "cause", "place"),
    [
        (moved, r"was moved to \S+/there during the run", "there"),
        (replaced, r"was moved to \S+/there during the run", "there"),
        (deleted, "was deleted during the run", None),
        (emptied, "was emptied during the run", "run"),
        (written_to_again, "was emptied during the run", "run"),
        (moved_and_written_to, "was deleted during the run", None),
        (taken, r"another launch has taken run directory \S+ \(host elsewhere, pid", "run"),
    ],
)
def test_a_lost_directory_is_reported_once(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, what: Callable[[RunDir], None], cause: str, place: str | None
) -> None:
    """It is reported within a few checks, and nothing is created again."""
    monkeypatch.setattr(lock_module, "BEAT_S", 0.1)
    lock, lost, reported = run.lock(attempt="a1"), [], threading.Event()

    def tell(cause: str) -> None:
        lost.append(cause)
        reported.set()

    assert lock.beat() == ""
    lock.keep(tell)
    what(run)
    assert reported.wait(3 * LOOKS * BEAT_S)
    (message,) = lost
    assert re.search(cause, message), message
    assert lock.place == (run.path.with_name(place) if place else None)
    assert run.path.exists() == (what not in (moved, moved_and_written_to, deleted))
    lock.close()
    if what is replaced:
        seen = Seen.of(run.path)
        assert seen
        assert seen.owner
        assert seen.owner.attempt == "b2"


def test_a_failing_disk_does_not_count_as_an_emptied_directory(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network disk may report stale file handles for a moment."""

    def lstat(path: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    lock = run.lock()
    with monkeypatch.context() as patched:
        patched.setattr("os.lstat", lstat)
        cause = lock.beat()
    assert cause == ""


def test_simultaneous_heartbeats_keep_the_directory(run: RunDir) -> None:
    """A thread sends heartbeats, and so does every event. After ``.owner`` is removed, any of them writes it again."""
    lock = run.lock()
    with ThreadPoolExecutor(8) as pool:
        for _ in range(100):
            (run.path / OWNER).unlink()
            assert set(pool.map(lambda _: lock.beat(), range(8))) == {""}
        beats = [pool.submit(lock.beat) for _ in range(100)]
        lock.release()
        assert {beat.result() for beat in beats} == {""}
    assert not (run.path / OWNER).exists()


def test_an_event_after_the_release_creates_no_owner_file(run: RunDir) -> None:
    lock = run.lock(attempt="a1")
    run.write_outcome(OUTCOME)
    lock.release()
    run.event("finished")
    assert (run.path / "events.jsonl").exists()
    assert not (run.path / OWNER).exists()


@contextmanager
def full_disk(folder: Path) -> Iterator[tuple[RunDir, Path]]:
    """Yield a run directory with a lock file on a full disk, and the file that fills it."""
    with mounted(folder, "size=64k"):
        run, filler = RunDir(folder / "run"), folder / "filler"
        run.path.mkdir()
        (run.path / LOCK).write_text("x")
        with suppress(OSError), open(filler, "wb", buffering=0) as file:
            while file.write(b"x" * 4096):
                pass
        yield run, filler


def test_a_run_starts_on_a_full_disk(tmp_path: Path) -> None:
    with full_disk(tmp_path) as (run, filler):
        lock = run.lock()
        assert not (run.path / OWNER).exists()
        filler.unlink()
        run.write_outcome(OUTCOME)
        assert lock.beat() == ""
        assert Seen.of(run.path)
        lock.close()


def test_the_owner_is_named_on_a_full_disk(tmp_path: Path) -> None:
    with full_disk(tmp_path) as (run, _), run.lock() as lock:
        assert not (run.path / OWNER).exists()
        assert f"({lock.owner})" in str(start(run.path).communicate()[0])


def test_a_run_starts_on_a_disk_without_space_to_name_the_owner(tmp_path: Path) -> None:
    with full_disk(tmp_path) as (run, filler):
        (run.path / LOCK).write_text("")
        with suppress(OSError), open(filler, "ab", buffering=0) as file:
            file.write(b"x" * 4096)
        with run.lock():
            assert (run.path / LOCK).read_text() == ""
            assert "it just started" in str(start(run.path).communicate()[0])


def test_only_the_process_that_took_the_lock_releases_it(run: RunDir) -> None:
    lock = run.lock()
    if (pid := os.fork()) == 0:
        lock.close()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert Seen.of(run.path)
    lock.close()
    assert Seen.of(run.path) is None


def test_a_new_run_may_have_links_to_another_disk(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    (tmp_path / "checkpoints").symlink_to("elsewhere")
    (tmp_path / "final").symlink_to("elsewhere")
    run.lock()
    run.refuse_foreign()
    (tmp_path / "final").unlink()
    (tmp_path / "final").mkdir()
    with pytest.raises(UserError, match="holds no run, but final"):
        run.refuse_foreign()


UNUSABLE: dict[str, Callable[[Path], object]] = {
    "a folder as owner": lambda folder: (folder / OWNER).mkdir(),
    "a link to nothing as owner": lambda folder: (folder / OWNER).symlink_to(folder / "nowhere"),
    "a link to itself as owner": lambda folder: (folder / OWNER).symlink_to(OWNER),
    "a folder as lock": lambda folder: (folder / LOCK).mkdir(),
    "a pipe as lock": lambda folder: os.mkfifo(folder / LOCK),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unusable_lock_or_owner_is_rejected(run: RunDir, name: str) -> None:
    UNUSABLE[name](run.path)
    with pytest.raises(UserError, match="can't be used"):
        run.lock()


def test_owner_files_exclude_launches_on_a_disk_without_flock(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: object, kind: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    with run.lock(attempt="a1"):
        assert works(run.path)
        other = start(run.path)
        assert "another launch works" in str(other.communicate()[0])
    assert not works(run.path)
