"""Test saving on real ranks, reading on any number of ranks, and the state after a failed save."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from isobatch.conf.rundir.directory import RunDir
from isobatch.trainers.checkpoints import saver as saver_module
from isobatch.trainers.checkpoints.best import Best
from isobatch.trainers.checkpoints.commit import clear_leftovers
from isobatch.trainers.checkpoints.copies import Copies
from isobatch.trainers.checkpoints.saver import Policy, Reports, Saver
from isobatch.trainers.data.state import TrainState
from isobatch.trainers.ranks.world import World
from isobatch.trainers.tensors import slices as checkpoint_module
from isobatch.trainers.tensors.manifest import Header, read
from isobatch.trainers.tensors.names import checkpoints
from isobatch.trainers.tensors.slices import Reader, Slice, write_part
from isobatch.trainers.tensors.tensorfile import ITEMSIZE, entries
from tests.support.disks import mounted
from tests.support.harness import in_ranks
from tests.support.steps import walk
from tests.unit.test_manifest import PLAN, header_of, verified


class FakeEngine:
    """An engine that gives each rank an equal part of some tensors. Ranks communicate in between."""

    def __init__(self, world: World, tensors: Mapping[str, Tensor]) -> None:
        self.world, self.tensors = world, tensors

    def slices(self) -> Iterator[Slice]:
        for name, tensor in self.tensors.items():
            flat, (rank, size) = tensor.reshape(-1), (self.world.rank, self.world.size)
            start, stop = (flat.numel() * bound // size for bound in (rank, rank + 1))
            self.world.sum(torch.ones(()))
            yield Slice(name, tuple(tensor.shape), start, flat[start:stop])

    def values(self) -> dict[str, Any]:
        return {"optim/groups": [{"lr": 0.1, "betas": [0.9, 0.999]}]}


def header(world: World, state: TrainState, evaluation: Mapping[str, float | None] | None) -> Header:
    assert world.rank == 0
    return header_of(
        state.steps,
        samples=state.samples,
        world_size=world.size,
        evaluation_owed=state.evaluation_owed,
        evaluation=evaluation,
    )


KEEP_2 = Policy(every_s=None, keep=2)


def saver(
    run: RunDir,
    world: World,
    tensors: Mapping[str, Tensor],
    *,
    policy: Policy = KEEP_2,
    best: str | None = None,
    resumed: Header | None = None,
    **reports: Any,
) -> Saver:
    engine: Any = FakeEngine(world, tensors)
    return Saver(run, world, engine, partial(header, world), policy, Best(best), Reports(**reports), resumed)


def state(step: int, **changes: Any) -> TrainState:
    return TrainState(PLAN, samples=PLAN_STEPS[step], steps=step, **changes)


PLAN_STEPS = [step.start for step in walk(PLAN)]


def every_kind() -> dict[str, Tensor]:
    """Return tensors of every dtype and many shapes, the same on all ranks."""
    noise = torch.Generator().manual_seed(1)
    found = {
        "model/weight": torch.randn(7, 11, generator=noise),
        "model/long/é \n": torch.randn(101, generator=noise).double(),
        "model/count": torch.tensor(12345678901234),
        "optim/weight/step": torch.tensor(3.0),
        "model/none": torch.empty(0, 5),
        "model/one": torch.randn(1, 1, 1, generator=noise).bfloat16(),
    }
    for name in ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64", "float64"]:
        found[f"model/{name}"] = torch.randn(3, 5, generator=noise).to(getattr(torch, name))
    for name in ["int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64", "bool"]:
        found[f"model/{name}"] = torch.randint(0, 2, (13,), generator=noise).to(getattr(torch, name))
    found["model/nan"] = torch.tensor([float("nan"), -0.0, float("inf")])
    return found


def same_bits(a: Tensor, b: Tensor) -> bool:
    whole = a.shape == b.shape and a.dtype == b.dtype
    return whole and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def steps_of(run: RunDir) -> list[int]:
    return [read(path).header.step for path in checkpoints(run)]


def names(run: RunDir) -> list[str]:
    return sorted(path.name for path in run.checkpoints.iterdir())


@pytest.mark.parametrize("size", [1, 4])
def test_tensors_are_restored_on_any_number_of_ranks(tmp_path: Path, size: int) -> None:
    run, tensors = RunDir(tmp_path), every_kind()

    def save(world: World) -> Any:
        keep = saver(run, world, tensors)
        keep.save(state(3))
        return keep.wait()

    assert in_ranks(size, save, tmp_path / "saving") == [None] * size
    checkpoint = verified(checkpoints(run)[0])
    assert checkpoint.header == header_of(3, world_size=size, evaluation=None)
    assert checkpoint.values == {"optim/groups": [{"lr": 0.1, "betas": [0.9, 0.999]}]}
    assert checkpoint.tensors.keys() == tensors.keys()

    def load(world: World) -> Any:
        reader, wrong = Reader(checkpoint), []
        for name, tensor in tensors.items():
            if not same_bits(reader.whole(name), tensor):
                wrong.append(name)
            flat = tensor.reshape(-1)
            start, stop = (flat.numel() * bound // world.size for bound in (world.rank, world.rank + 1))
            if not same_bits(reader(name, start, stop), flat[start:stop]):
                wrong.append(f"{name} {start}:{stop}")
        return world.gather(", ".join(wrong))  # keeps every rank until the other ranks are done

    for readers in (1, 3):
        assert in_ranks(readers, load, tmp_path / f"loading-{readers}") == [[""] * readers] * readers


def test_every_range_of_a_tensor_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges may start or end inside slices or be empty. The reader may open fewer files than there are slices."""
    monkeypatch.setattr(checkpoint_module, "OPEN_FILES", 2)
    run, tensor = RunDir(tmp_path), torch.arange(23)

    def save(world: World) -> Any:
        keep = saver(run, world, {"before": torch.ones(5), "w": tensor})
        keep.save(state(1))
        return keep.wait()

    in_ranks(4, save, tmp_path / "ranks")
    reader = Reader(read(checkpoints(run)[0]))
    for start in range(24):
        for stop in range(start, 24):
            assert torch.equal(reader("w", start, stop), tensor[start:stop])
    assert len(reader._open) == 2
    for start, stop in ((-1, 3), (3, 24), (5, 4)):
        with pytest.raises(AssertionError):
            reader("w", start, stop)
    with pytest.raises(KeyError):
        reader("x")


def test_files_are_safetensors(tmp_path: Path) -> None:
    tensors = every_kind()
    slices = [Slice(name, tuple(tensor.shape), 0, tensor.reshape(-1)) for name, tensor in tensors.items()]
    part = write_part(tmp_path, 0, slices, lambda: None)
    path = tmp_path / "rank-00000.safetensors"
    assert part["bytes"] == path.stat().st_size
    with path.open("rb") as opened:
        found = entries(opened, path.name)
    assert all(entry.offset % ITEMSIZE[entry.dtype] == 0 for entry in found.values())
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == {name for name, tensor in tensors.items() if tensor.numel()}
        for name in file.keys():  # noqa: SIM118
            assert same_bits(file.get_tensor(name), tensors[name].reshape(-1)), name


def test_the_copy_is_saved_while_training_changes_the_weights(tmp_path: Path) -> None:
    """The saving thread waits until the live tensors have changed. The second save reuses the copy's memory."""
    run, changed = RunDir(tmp_path), threading.Event()

    def body(world: World) -> Any:
        live = torch.zeros(1000)
        keep = saver(run, world, {"w": live}, beat=lambda: changed.wait(10) or None)
        found = []
        for step in (1, 2):
            live.fill_(step)
            changed.clear()
            keep.save(state(step))
            live.fill_(-1)
            changed.set()
            found.append(keep.wait())
        return found

    assert in_ranks(2, body, tmp_path / "ranks") == [[None, None]] * 2
    for path in checkpoints(run):
        checkpoint = verified(path)
        assert torch.equal(Reader(checkpoint).whole("w"), torch.full((1000,), float(checkpoint.header.step)))


def test_memory_of_a_copy_is_reused() -> None:
    live = {"a": torch.zeros(5), "b": torch.zeros(3, dtype=torch.int64)}
    copies = Copies()

    def take() -> dict[str, Tensor]:
        return {s.name: s.data for s in copies.take(Slice(n, tuple(t.shape), 0, t) for n, t in live.items())[0]}

    first = take()
    live["a"].fill_(7)
    live["b"] = torch.ones(3)
    second = take()
    assert second["a"].data_ptr() == first["a"].data_ptr()
    assert torch.equal(second["a"], torch.full((5,), 7.0))
    assert (second["b"].dtype, first["b"].dtype) == (torch.float32, torch.int64)
    assert torch.equal(second["b"], torch.ones(3))


# ---- failed saves


def fails_once(
    run: RunDir, size: int, folder: Path, obstruct: Callable[[World], Any], restore: Callable[[World], Any]
) -> Any:
    """Save steps 1, 2 and 3 of about 0.4 MB, the second with a failure, and return each rank's reports."""

    def body(world: World) -> Any:
        live = torch.zeros(100_000)
        keep, reports = saver(run, world, {"w": live}, policy=Policy(None, keep=5)), []
        for step in (1, 2, 3):
            live.fill_(step)
            if step == 2:
                obstruct(world)
            keep.save(state(step))
            if step == 2:
                failure = keep.failure()
                while world.rank == 0 and not failure:
                    failure = keep.failure()
                reports = [failure, keep.failure()]
            reports.append(keep.wait())
            if step == 2:
                restore(world)
        return reports

    ends = in_ranks(size, body, folder / "ranks")
    assert steps_of(run) == [3, 1]
    assert names(run) == ["step-00000001", "step-00000003"]
    for path in checkpoints(run):
        verified(path)
    return ends


def test_full_disk_of_one_rank_fails_one_save(tmp_path: Path) -> None:
    """All ranks report the cause. The new files are removed, the old ones stay, and the next save works."""

    def limit(to: int, world: World) -> None:
        if world.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (to, resource.RLIM_INFINITY))

    obstruct, restore = partial(limit, 50_000), partial(limit, resource.RLIM_INFINITY)
    ends = fails_once(RunDir(tmp_path), 3, tmp_path, obstruct, restore)
    expected = "step 2: File too large (OSError) on rank 1"
    assert ends == [[expected, None, expected, None], [None, None, expected, None], [None, None, expected, None]]


def test_unwritable_run_directory_is_reported(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")

    def body(world: World) -> Any:
        keep = saver(RunDir(tmp_path), world, {"w": torch.zeros(9)})
        keep.save(state(1))
        return keep.wait()

    aside = tmp_path / "checkpoints" / ".step-00000001.tmp"
    expected = f"step 1: Not a directory (NotADirectoryError): {aside} on rank 0, and 1 more"
    assert in_ranks(2, body, tmp_path / "ranks") == [expected, expected]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)], capture_output=True)
    if mount.returncode:
        pytest.skip(f"mounting isn't permitted: {mount.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_fails_one_save(small_disk: Path, tmp_path: Path) -> None:
    other = small_disk / "somebody else's"

    def fill(world: World) -> None:
        if world.rank == 0:
            other.write_bytes(bytes(500_000))
        world.gather("")

    def free(world: World) -> None:
        world.gather("")
        if world.rank == 0:
            other.unlink()
        world.gather("")

    ends = fails_once(RunDir(small_disk), 2, tmp_path, fill, free)
    assert str(ends[0][0]).startswith("step 2: No space left on device (OSError) on rank")
    assert ends == [[ends[0][0], None, ends[0][0], None], [None, None, ends[0][0], None]]


def test_full_disk_at_the_manifest_is_reported(small_disk: Path, tmp_path: Path) -> None:
    run = RunDir(small_disk)

    def body(world: World) -> Any:
        keep, free = saver(run, world, {"w": torch.zeros(1000)}), small_disk / "free"
        free.write_bytes(b"")
        really = keep._parts

        def fill(number: int) -> Any:
            parts = really(number)
            with suppress(OSError), free.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            return parts

        keep._parts = fill  # type: ignore[method-assign]
        keep.save(state(1))
        return keep.wait()

    (failure,) = in_ranks(1, body, tmp_path / "ranks")
    assert failure == "step 1: No space left on device (OSError)"
    assert names(run) == []


@pytest.mark.parametrize(("size_mb", "expected"), [(150, "no memory for a copy"), (3, "can't start new thread")])
def test_rank_without_memory_for_a_copy_or_a_thread_fails_one_save(tmp_path: Path, size_mb: int, expected: str) -> None:
    """The other ranks don't wait for it in the communication of slices().

    A rank's third of 150 MB is more than the freed memory that malloc may have kept.
    """
    room_mb = 25 if size_mb > 50 else 5

    def limit(world: World) -> None:
        if world.rank == 1:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (room_mb << 20), resource.RLIM_INFINITY))

    def body(world: World) -> Any:
        tensors = {"a": torch.zeros(10), "w": torch.zeros(size_mb << 20, dtype=torch.uint8), "b": torch.zeros(10)}
        keep = saver(RunDir(tmp_path), world, tensors)
        limit(world)
        keep.save(state(1))
        failed = keep.wait()
        if world.rank == 1:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        keep.save(state(1))
        return failed, keep.wait()

    ends = in_ranks(3, body, tmp_path / "ranks")
    assert {end[1] for end in ends} == {None}
    (failure,) = {end[0] for end in ends}
    assert failure.startswith(f"step 1: {expected}")
    assert failure.endswith("(MemoryError) on rank 1")
    assert steps_of(RunDir(tmp_path)) == [1]


def test_nothing_is_written_where_another_directory_took_the_runs_place(tmp_path: Path) -> None:
    """It may happen at any moment, also between the thread's last look and its first write."""
    run = RunDir(tmp_path / "run")
    run.path.mkdir()

    class Replaced(RunDir):
        looks = 0

        @property
        def gone(self) -> str:
            self.looks += 1
            if self.looks == 2:  # the thread's
                self.path.rename(tmp_path / "moved")
                self.path.mkdir()
            return ""

    def body(world: World) -> Any:
        keep = saver(Replaced(run.path), world, {"w": torch.zeros(9)})
        keep.save(state(1))
        return keep.wait()

    (failure,) = in_ranks(1, body, tmp_path / "ranks")
    assert failure.startswith("step 1: No such file or directory")
    assert list(run.path.iterdir()) == []


def test_unsupported_dtype_is_reported(tmp_path: Path) -> None:
    def body(world: World) -> Any:
        keep = saver(RunDir(tmp_path), world, {"w": torch.zeros(5, dtype=torch.complex128)})
        keep.save(state(1))
        return keep.wait()

    expected = "step 1: w is torch.complex128, which safetensors can't store (TypeError) on rank 0, and 1 more"
    assert in_ranks(2, body, tmp_path / "ranks") == [expected, expected]
    assert names(RunDir(tmp_path)) == []


def test_missing_slices_are_reported(tmp_path: Path) -> None:
    class Forgetful(FakeEngine):
        def slices(self) -> Iterator[Slice]:
            return (piece for piece in super().slices() if self.world.rank != 1)

    def body(world: World) -> Any:
        keep = saver(RunDir(tmp_path), world, {})
        keep._engine = Forgetful(world, {"w": torch.zeros(9)})  # type: ignore[assignment]
        keep.save(state(1))
        return keep.wait()

    failures = in_ranks(3, body, tmp_path / "ranks")
    assert set(failures) == {"step 1: 'w' has elements 6 to 9 after those up to 3 (Damaged)"}
    assert names(RunDir(tmp_path)) == []


# ---- kept checkpoints


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    accuracies = [0.5, 0.7, float("nan"), None, 0.6, 0.7]

    def body(world: World) -> Any:
        keep, found = saver(run, world, {"w": torch.zeros(9)}, best="val/accuracy:max"), []
        for step, accuracy in enumerate(accuracies, 1):
            values = {"val/accuracy": accuracy, "val/loss": 0.0}
            found.append(keep.best.improves(values))
            keep.save(state(step), values)
        return found, keep.wait()

    ends = in_ranks(2, body, tmp_path / "ranks")
    assert ends == [[[True, True, False, False, False, False], None]] * 2
    assert names(run) == ["best", "step-00000002", "step-00000005", "step-00000006"]
    best = verified(run.checkpoints / "best").header
    assert (best.step, best.evaluation) == (2, {"val/accuracy": 0.7, "val/loss": 0.0})


def test_best_checkpoint_that_failed_to_save_does_not_count(tmp_path: Path) -> None:
    def body(world: World) -> Any:
        keep, found = saver(RunDir(tmp_path), world, {"w": torch.zeros(100_000)}, best="val/accuracy:max"), []
        for step, accuracy, limit in ((1, 0.5, -1), (2, 0.9, 50_000), (3, 0.7, -1)):
            if world.rank == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            found.append(keep.best.improves({"val/accuracy": accuracy}))
            keep.save(state(step), {"val/accuracy": accuracy})
            keep.wait()
        return found

    assert in_ranks(2, body, tmp_path / "ranks") == [[True, True, True]] * 2
    assert read(tmp_path / "checkpoints" / "best").header.step == 3


def test_committed_checkpoint_counts_if_an_older_one_cannot_be_removed(tmp_path: Path) -> None:
    """It stays the best, the save isn't reported as failed, and one warning is given."""
    run = RunDir(tmp_path)

    def body(world: World) -> Any:
        reports: list[str] = []
        keep = saver(
            run, world, {"w": torch.zeros(9)}, policy=Policy(None, keep=1), best="val/accuracy:max", warn=reports.append
        )
        failures = []
        for step in (2, 3, 4):
            keep.save(state(step), {"val/accuracy": step / 10})
            failures.append(keep.wait())
        return failures, keep.best.improves({"val/accuracy": 0.35}), reports

    first = run.checkpoints / "step-00000001"
    first.mkdir(parents=True)
    with mounted(first):
        zero, one = in_ranks(2, body, tmp_path / "ranks")
    assert zero[:2] == one[:2] == [[None] * 3, False]
    assert one[2] == []
    assert len(zero[2]) == 1
    assert str(first) in zero[2][0]
    assert read(run.checkpoints / "best").header.step == 4


def test_a_step_is_saved_once(tmp_path: Path) -> None:
    """It is saved again once its evaluation is done, but not after the run resumed from it."""
    run = RunDir(tmp_path)

    def body(world: World) -> Any:
        keep, saved = saver(run, world, {"w": torch.zeros(9)}), []

        def save(step: int, evaluation: Any = None, **changes: Any) -> None:
            keep.save(state(step, **changes), evaluation)
            keep.wait()
            world.gather("")
            saved.append((run.checkpoints / f"step-0000000{step}").stat().st_ino)

        save(3, evaluation_owed=True)
        save(3, evaluation_owed=True)
        save(3)
        save(3)
        save(3, {"val/loss": 0.5})
        save(3)
        keep = saver(run, world, {"w": torch.zeros(9)}, resumed=read(checkpoints(run)[0]).header)
        save(3)
        save(4)
        return saved

    for inodes in in_ranks(2, body, tmp_path / "ranks"):
        owed, again, done, once_more, evaluated, after, resumed, other = inodes
        assert owed == again != done == once_more != evaluated == after == resumed != other
    assert [read(path).header.evaluation for path in checkpoints(run)] == [None, {"val/loss": 0.5}]


def test_a_save_is_due_at_intervals(tmp_path: Path) -> None:
    """It is due only on rank 0, once per interval since the last save began, and never during a save."""
    hold = threading.Event()

    def body(world: World) -> Any:
        keep = saver(
            RunDir(tmp_path),
            world,
            {"w": torch.zeros(9)},
            policy=Policy(0.2, keep=2),
            beat=lambda: hold.wait(10) or None,
        )
        never = saver(RunDir(tmp_path), world, {})
        found = [keep.due()]
        time.sleep(0.3)
        found += [keep.due(), keep.due(), never.due()]
        keep.save(state(1))
        time.sleep(0.3)
        found.append(keep.due())
        hold.set()
        keep.wait()
        return [*found, keep.due()]

    assert in_ranks(2, body, tmp_path / "ranks") == [[False, True, False, False, False, True], [False] * 6]


def test_only_the_next_save_waits_for_the_disk(tmp_path: Path) -> None:
    hold = threading.Event()

    def body(world: World) -> Any:
        keep = saver(RunDir(tmp_path), world, {"w": torch.zeros(9)}, beat=lambda: hold.wait(10) or None)
        threading.Timer(0.5, hold.set).start()
        times = []
        for step in (1, 2):
            began = time.monotonic()
            keep.save(state(step))
            times.append(time.monotonic() - began)
        return times, keep.wait()

    for (first, second), failure in in_ranks(2, body, tmp_path / "ranks"):
        assert first < 0.3 < second
        assert failure is None
    assert steps_of(RunDir(tmp_path)) == [2, 1]


def test_waiting_ranks_see_progress_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a stuck rank counts as a hang, not a slow disk."""
    monkeypatch.setattr(saver_module, "PROGRESS_S", 0.05)

    def body(world: World) -> Any:
        beats, chunks = [], 0

        def beat() -> None:
            nonlocal chunks
            beats.append(time.monotonic())
            chunks += 1
            if world.rank == 1:
                time.sleep(0.1 if chunks < 8 else 0)

        keep = saver(RunDir(tmp_path), world, {str(i): torch.zeros(2) for i in range(10)}, beat=beat)
        keep.save(state(1))
        waiting = time.monotonic() + 0.2
        keep.wait()
        return len([moment for moment in beats if moment > waiting])

    assert in_ranks(2, body, tmp_path / "ranks")[0] >= 2


def test_dropped_checkpoints_are_removed_by_the_next_start(tmp_path: Path) -> None:
    run, hold = RunDir(tmp_path), threading.Event()

    def body(world: World) -> Any:
        keep = saver(run, world, {"w": torch.zeros(9)}, beat=lambda: hold.wait(0.3) or None)
        keep.save(state(1))
        keep.close()
        world.gather("")
        left = names(run)
        world.gather("")
        if world.rank == 0:
            clear_leftovers(run)
        return left, names(run) if world.rank == 0 else [], threading.active_count()

    assert in_ranks(2, body, tmp_path / "ranks")[0][:2] == [[".step-00000001.tmp"], []]


def test_ranks_report_the_loss_of_rank_0(tmp_path: Path) -> None:
    """Rank 0 dies during a save that the other ranks wait for."""
    folder = tmp_path / "ranks"

    def body(world: World) -> Any:
        keep = saver(RunDir(tmp_path), world, {"w": torch.zeros(9)})
        if world.rank == 0:
            keep._finish = lambda *_: os._exit(0)  # type: ignore[method-assign,assignment]
            (folder / "rank-0.json").write_text("null")
        keep.save(state(1))
        return keep.wait()

    end = in_ranks(2, body, folder)[1]
    assert end["raised"] == "RuntimeError"
    assert "Connection to the other ranks lost while saving a checkpoint" in end["message"]
    assert json.loads((folder / "rank-0.json").read_text()) is None
