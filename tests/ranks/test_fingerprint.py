"""Test that a fingerprint is the same in every process, changes with each sample, and ignores random numbers."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from array import array
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Subset

from isobatch.scaling.order import indices
from isobatch.trainers.data.fingerprint import LOOKS, fingerprint
from isobatch.trainers.data.look import Unseen, look
from isobatch.trainers.model.randomness import generators_state
from tests.support.tasks import Counted, Many, OneByOne


@dataclass
class Record:
    label: Any


class Picture:
    """An object with the attributes of a PIL image."""

    mode, size = "L", (2, 2)

    def __init__(self, pixels: bytes) -> None:
        self.pixels = pixels

    def tobytes(self) -> bytes:
        return self.pixels


class Made(list):  # type: ignore[type-arg]
    """A list that creates its samples at each fetch."""

    def __getitem__(self, index: Any) -> Any:
        made = super().__getitem__(index)
        return made() if callable(made) else made


CHANGES: dict[str, tuple[Any, Any]] = {
    "tensor": (torch.zeros(3), torch.tensor([0.0, 0.0, 1e-30])),
    "dtype": (torch.zeros(2), torch.zeros(2).int()),
    "shape": (torch.zeros(2, 3), torch.zeros(3, 2)),
    "stride": (torch.arange(6).view(2, 3), torch.arange(6).view(3, 2).T),
    "bfloat16": (torch.ones(2).bfloat16(), torch.tensor([1, 1.0078125]).bfloat16()),
    "scalar": (torch.tensor(1), torch.tensor(2)),
    "array": (np.arange(4), np.array([0, 1, 2, 4])),
    "array of objects": (np.array([[1], None], object), np.array([[2], None], object)),
    "number of numpy": (np.float32(1), np.float32(2)),
    "array of Python": (array("i", [1, 2]), array("i", [1, 3])),
    "float": (0.1, np.nextafter(0.1, 1).item()),
    "int": (2**70, 2**70 + 1),
    "int or bool": (1, True),
    "none": (None, 0),
    "text": ("a word", "a world"),
    "bytes": (b"\0", b"\1"),
    "nested": ({"x": [1, (2, {"y": torch.zeros(1)})]}, {"x": [1, (2, {"y": torch.ones(1)})]}),
    "where a list ends": ([[1], [2, 3]], [[1, 2], [3]]),
    "key": ({"a": 1}, {"b": 1}),
    "tuple": ((torch.zeros(1), 1), (torch.zeros(1), 2)),
    "image": (Picture(b"1234"), Picture(b"1235")),
    "dataclass": (Record([1]), Record([2])),
    "file": ("/data/a.png", "/data/b.png"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_any_changed_sample_changes_the_fingerprint(kind: str) -> None:
    before, after = CHANGES[kind]
    data = [before] * 100
    same = fingerprint(data, seed=1)
    assert same is not None
    assert same == fingerprint([deepcopy(before)] * 100, seed=1)
    looked_at = indices(1, 100, 0, LOOKS).tolist()
    for row in (looked_at[0], looked_at[-1]):
        assert fingerprint([*data[:row], after, *data[row + 1 :]], seed=1) != same


def test_a_changed_length_changes_the_fingerprint() -> None:
    assert len({fingerprint([1] * length, seed=0) for length in (1, 3, 15, 16, 17, 500)}) == 6


def test_moved_files_and_other_objects_do_not_count() -> None:
    assert fingerprint(["/here/a.png"] * 9, seed=0) == fingerprint(["/scratch/77/a.png"] * 9, seed=0)
    assert fingerprint(Made([object] * 9), seed=0) == fingerprint(Made([object] * 9), seed=0)


class Drawing:
    """A dataset of randomly cropped pictures with labels."""

    def __init__(self, draw: Any, label: int = 0) -> None:
        self.draw, self.label = draw, label

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> Any:
        return torch.full((3,), float(self.draw())), index + self.label


class Stateful:
    def __init__(self) -> None:
        self.own = random.Random()

    def __call__(self) -> float:
        return float(self.own.random() < 0.5)


def clock() -> int:
    """Return a time that float32 represents exactly."""
    return time.perf_counter_ns() % 10**6


@pytest.mark.parametrize("draw", [Stateful, lambda: clock], ids=["generator", "clock"])
def test_part_that_varies_is_left_out(draw: Any) -> None:
    """The other parts of a sample still count. Without other parts there is no fingerprint."""
    found = {fingerprint(Drawing(draw()), seed=0) for _ in range(10)}
    assert len(found) == 1
    assert found != {fingerprint(Drawing(draw(), label=1), seed=0)}
    assert fingerprint(Made([draw()] * 50), seed=0) is None


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: torch.rand(())])
def test_default_generators_are_keyed(draw: Any) -> None:
    """The fingerprint therefore includes randomly cropped pictures."""
    same = fingerprint(Drawing(draw), seed=0)
    draw()
    assert same == fingerprint(Drawing(draw), seed=0)
    assert same != fingerprint(Drawing(lambda: draw() + 1), seed=0)


def test_generators_are_restored() -> None:
    """A run draws the same weights with and without a fingerprint."""
    for data in (Counted().train_data(), OneByOne(Counted())):
        before = generators_state()
        look([partial(fingerprint, data, seed=0)])
        look([partial(fingerprint, data, seed=0)], here=True)
        assert generators_state() == before


def test_sample_that_cannot_be_fetched_gives_no_fingerprint() -> None:
    broken = Made([1] * 20)
    broken[3] = lambda: 1 / 0
    assert fingerprint(broken, seed=0) is None


def test_fingerprint_does_not_depend_on_how_samples_are_fetched() -> None:
    counted = Counted()
    one, many = fingerprint(OneByOne(counted), seed=0), fingerprint(Many(counted), seed=0)
    assert one == many
    assert fingerprint(Subset(Many(counted), range(500)), seed=0) == one
    assert fingerprint(Subset(OneByOne(counted), range(499, -1, -1)), seed=0) != one


class Opening:
    """A dataset that opens its file at the first access, as many do."""

    def __init__(self) -> None:
        self.opened_by: int | None = None

    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> int:
        self.opened_by = self.opened_by or os.getpid()
        return index


def test_look_does_not_open_files_in_this_process() -> None:
    looked_at, direct = Opening(), Opening()
    assert look([partial(fingerprint, looked_at, seed=0)]) == [fingerprint(direct, seed=0)]
    assert (looked_at.opened_by, direct.opened_by) == (None, os.getpid())


class Records:
    """A dataset that reads records one after another from a file that is open from the start."""

    def __init__(self, file: Path) -> None:
        file.write_bytes(bytes(range(100)))
        self.file = open(file, "rb", buffering=0)  # noqa: SIM115

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> bytes:
        return self.file.read(1)


def test_look_does_not_move_the_position_of_an_open_file(tmp_path: Path) -> None:
    data = Records(tmp_path / "records")
    look([partial(fingerprint, data, seed=0)])
    assert data[0] == b"\0"


def test_look_reports_a_failure_a_death_and_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isobatch.trainers.data.look.LOOK_S", 0.5)
    works = [lambda: 1 / 0, lambda: 3, lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: 4]
    first, second, *rest = look(works)
    assert first == Unseen("ZeroDivisionError: division by zero")
    assert second == 3
    assert [type(result) for result in rest] == [Unseen, Unseen]
    (late,) = look([lambda: time.sleep(60)])
    assert "timed out" in late.why
    lost, kept = look([lambda: lambda: 1, lambda: 3])  # a lambda can't be pickled
    assert ("pickled" in lost.why, kept) == (True, 3)


def test_fingerprint_is_the_same_in_another_process() -> None:
    """The other process has another hash seed, which orders sets differently."""
    data = '[{"text": "a", "ids": [1, 2.5], "of": {"x", "y", "z"}, "image": np.eye(2), "label": torch.ones(2)}] * 40'
    imports = "import numpy as np, torch; from isobatch.trainers.data.fingerprint import fingerprint"
    code = f"{imports}; print(fingerprint({data}, 3))"
    environment = {**os.environ, "PYTHONHASHSEED": "12", "PYTHONPATH": "."}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == fingerprint(eval(data), 3), done.stderr


def test_tensors_in_memory_are_hashed_whole() -> None:
    """A change of any value of any sample changes the fingerprint."""
    found = set()
    for row in range(0, 500, 50):
        counted = Counted()
        counted.inputs[row, 3] += 1
        found.add(fingerprint(counted.train_data(), seed=0))
    assert len(found | {fingerprint(Counted().train_data(), seed=0)}) == 11
