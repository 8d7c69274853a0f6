"""Test that damaged, contradictory and malicious checkpoints are rejected, without torch."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isobatch.conf.rundir.directory import RunDir
from isobatch.scaling.plan import Plan
from isobatch.scaling.tuning.controllers import LATEST, Memory, Timed
from isobatch.trainers.checkpoints.commit import compose
from isobatch.trainers.tensors.manifest import NAME, Checkpoint, Damaged, Header, parse, read, sealed, verify
from isobatch.trainers.tensors.names import checkpoints, file_of, folder_of
from isobatch.trainers.tensors.tensorfile import HEADER_BYTES, ITEMSIZE, entries
from tests.support.examples import examples
from tests.unit.test_plan import make

PLAN = make(1000, batches=((0, 32), (320, 64)))
RANKS = 2
CONTROL = Memory(48, 50.5, count=7, larger=1, smaller=0, timed=(Timed(32, (0.5, 0.25)), Timed(48, (0.75,))))


def header_of(step: int = 3, plan: Plan = PLAN, **changes: Any) -> Header:
    fields = {
        "identity": "0123456789ab",
        "duration": "10ep",
        "world_size": RANKS,
        "step": step,
        "samples": step * 32,
        "skipped": 0,
        "evaluation_owed": False,
        "fingerprint": "abc",
        "evaluation": {"val/loss": 0.5, "val/accuracy": None},
        "plan": plan,
        "control": CONTROL,
    }
    return Header(**(fields | changes))  # type: ignore[arg-type]


def tensor_file(tensors: dict[str, tuple[str, int]]) -> bytes:
    """Return a safetensors file of (dtype, elements) by name."""
    header, end = {}, 0
    for name, (dtype, count) in tensors.items():
        span = (end, end := end + count * ITEMSIZE[dtype])
        header[name] = {"dtype": dtype, "shape": [count], "data_offsets": span}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(i % 251 for i in range(end))


# "w" is 5 × 4 and sharded at element 12, "b" is whole on rank 1, "n" has no elements, and "c" no dimensions.
FILES = [{"w": ("F32", 12), "c": ("I64", 1)}, {"w": ("F32", 8), "b": ("BF16", 3)}]
SLICES = [
    {"w": ["F32", [5, 4], 0, 12], "c": ["I64", [], 0, 1], "n": ["F32", [0, 7], 0, 0]},
    {"w": ["F32", [5, 4], 12, 20], "b": ["BF16", [3], 0, 3], "n": ["F32", [0, 7], 0, 0]},
]


def write_files(folder: Path) -> list[dict[str, Any]]:
    """Write the files of all ranks, and return the results of their ``write_part``."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for rank in range(RANKS):
        content = tensor_file(FILES[rank])
        (folder / file_of(rank)).write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
        parts.append({"bytes": len(content), "sha256": sha256, "slices": SLICES[rank]})
    return parts


def save(run: RunDir, step: int = 3, **header: Any) -> Path:
    """Write a complete checkpoint."""
    folder = folder_of(run, step)
    text = compose(header_of(step, **header), write_files(folder), {"optim/groups": [{"lr": 0.1}]})
    (folder / NAME).write_bytes(text)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(RunDir(tmp_path))


def verified(folder: Path) -> Checkpoint:
    checkpoint = read(folder)
    verify(checkpoint, checkpoint.files)
    return checkpoint


def damage_of(folder: Path) -> str:
    """Return the reason why a checkpoint is rejected as damaged."""
    with pytest.raises(Damaged) as error:
        verified(folder)
    assert len(str(error.value)) < 400
    return str(error.value)


def test_a_checkpoint_is_read_as_it_was_written(folder: Path) -> None:
    beats = []
    checkpoint = read(folder)
    verify(checkpoint, checkpoint.files, lambda: beats.append(1))
    assert checkpoint.path == folder
    assert checkpoint.header == header_of()
    assert checkpoint.values == {"optim/groups": [{"lr": 0.1}]}
    assert {name: (stored.dtype, stored.shape, stored.slices) for name, stored in checkpoint.tensors.items()} == {
        "w": ("F32", (5, 4), ((file_of(0), 0, 12), (file_of(1), 12, 20))),
        "c": ("I64", (), ((file_of(0), 0, 1),)),
        "n": ("F32", (0, 7), ()),
        "b": ("BF16", (3,), ((file_of(1), 0, 3),)),
    }
    assert len(beats) == RANKS


def test_manifest_and_commit_import_no_torch() -> None:
    modules = "isobatch.trainers.tensors.manifest, isobatch.trainers.checkpoints.commit"
    code = f"import {modules}, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_end_of_a_run_is_a_valid_position(tmp_path: Path) -> None:
    """The last step is whole, so it may exceed the duration."""
    assert (PLAN.steps, PLAN.samples, PLAN.added) == (21, 1000, 24)
    assert read(save(RunDir(tmp_path), 21, samples=1024)).header.step == 21
    with pytest.raises(Damaged, match="samples=1025"):
        save(RunDir(tmp_path / "else"), 21, samples=1025)


def test_values_that_json_lacks_are_read_as_none(tmp_path: Path) -> None:
    folder = save(RunDir(tmp_path), evaluation={"val/loss": float("nan"), "val/x": float("inf"), "val/y": 1.0})
    assert read(folder).header.evaluation == {"val/loss": None, "val/x": None, "val/y": 1.0}


def test_only_checkpoints_are_listed_newest_first(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert checkpoints(run) == []
    for step in (2, 10, 123456789):
        folder_of(run, step).mkdir(parents=True)
    for name in (".step-00000005.tmp", ".old-step-00000001", "step-5", "step-0000000x", "step-00000005.bak", "final"):
        (run.checkpoints / name).mkdir()
    (run.checkpoints / "step-٠٠٠٠٠٠٠٧").mkdir()
    (run.checkpoints / "step-00000004").write_text("")
    (run.checkpoints / "best").symlink_to("step-00000010")
    (run.checkpoints / "step-00000099").symlink_to("step-00000010")
    found = ["step-123456789", "step-00000099", "step-00000010", "step-00000002"]
    assert [path.name for path in checkpoints(run)] == found


def test_a_checkpoint_is_read_through_a_link(folder: Path) -> None:
    link = folder.parent / "best"
    link.symlink_to(folder.name)
    assert read(link).path == folder
    link.unlink()
    link.symlink_to("best")
    assert "can't be read" in damage_of(link)


# ---- damaged files

Damage = Callable[[Path], Any]


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def replace_by_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


FILES_DAMAGED: dict[str, tuple[Damage, str]] = {
    "no manifest": (lambda f: (f / NAME).unlink(), "manifest.json is missing"),
    "an empty manifest": (lambda f: (f / NAME).write_text(""), "manifest.json isn't JSON"),
    "an empty object": (lambda f: (f / NAME).write_text("{}"), "manifest.json has format None"),
    "a manifest cut short": (lambda f: os.truncate(f / NAME, 300), "manifest.json isn't JSON"),
    "a manifest of zeros": (lambda f: (f / NAME).write_bytes(bytes(4096)), "manifest.json isn't JSON"),
    "a manifest in latin-1": (lambda f: (f / NAME).write_bytes(b'{"\xe9": 1}'), "manifest.json isn't JSON"),
    "a manifest in utf-16": (lambda f: (f / NAME).write_text("{}", "utf-16"), "manifest.json"),
    "a manifest too large": (lambda f: os.truncate(f / NAME, 1 << 40), "manifest.json is larger than"),
    "a byte of the manifest": (lambda f: flip(f / NAME, 500), "manifest.json"),
    "a manifest that is a folder": (lambda f: ((f / NAME).unlink(), (f / NAME).mkdir()), "manifest.json isn't a file"),
    "a manifest that is a link": (lambda f: replace_by_link(f / NAME), "manifest.json isn't a file"),
    "a manifest that never ends": (lambda f: replace_by_pipe(f / NAME), "manifest.json isn't a file"),
    "a file missing": (lambda f: (f / file_of(1)).unlink(), "rank-00001.safetensors is missing"),
    "a file cut short": (lambda f: os.truncate(f / file_of(1), 80), "has 80 bytes, not the"),
    "a file too long": (lambda f: os.truncate(f / file_of(1), 1000), "has 1000 bytes, not the"),
    "a file that is a link": (lambda f: replace_by_link(f / file_of(0)), "rank-00000.safetensors isn't a file"),
    "a file that never ends": (lambda f: replace_by_pipe(f / file_of(0)), "rank-00000.safetensors isn't a file"),
    "a byte of a tensor": (lambda f: flip(f / file_of(1), -1), "rank-00001.safetensors has other bytes than"),
    "a byte of a header": (lambda f: flip(f / file_of(0), 20), "rank-00000.safetensors has other bytes than"),
}


@pytest.mark.parametrize("damage", FILES_DAMAGED)
def test_damaged_files_are_rejected(folder: Path, damage: str) -> None:
    cause, reason = FILES_DAMAGED[damage]
    cause(folder)
    assert reason in damage_of(folder)


def test_a_missing_folder_or_a_file_is_no_checkpoint(folder: Path, tmp_path: Path) -> None:
    assert "manifest.json is missing" in damage_of(folder.with_name("step-00000004"))
    (tmp_path / "step-00000001").write_text("")
    assert "can't be read" in damage_of(tmp_path / "step-00000001")


def test_a_manifest_of_another_step_is_rejected(folder: Path) -> None:
    moved = folder.rename(folder.with_name("step-00000004"))
    assert "manifest.json belongs to step 3" in damage_of(moved)


# ---- manifests with wrong content, each with the right checksum, as from an attacker


def reseal(folder: Path, text: str | bytes) -> None:
    """Write a manifest with the right checksum."""
    content = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    (folder / NAME).write_bytes(sealed(content.removeprefix(b"{")))


def fields_of(folder: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((folder / NAME).read_bytes())
    del fields["sha256"]
    return fields


def at(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    """Return a function that sets the value at a path of a manifest. A callable gets the old value."""

    def change(fields: Any) -> None:
        for key in path[:-1]:
            fields = fields[key]
        fields[path[-1]] = to(fields.get(path[-1])) if callable(to) else to

    return change


def renamed(*path: str, to: str) -> Callable[[dict[str, Any]], None]:
    def change(fields: Any) -> None:
        for key in path[:-1]:
            fields = fields[key]
        fields[to] = fields.pop(path[-1])

    return change


R0, R1 = file_of(0), file_of(1)
W = ("tensors", "w")

LIES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another format": (at("format", to=2), "has format 2, but this version reads 1"),
    "format true": (at("format", to=True), "'format'"),
    "format 1.0": (at("format", to=1.0), "'format'"),
    "no plan": (lambda f: f.pop("plan"), "'plan'"),
    "something more": (at("more", to=1), "'more'"),
    "a plan of another kind": (at("plan", to=[]), "'plan'"),
    "a plan damaged": (at("plan", "seed", to="x"), "not a plan"),
    "a plan edited": (at("plan", "steps", to=9), "contradicts itself in steps"),
    "a plan without end": (at("plan", "segments", to=[]), "'plan'"),
    "a number as text": (at("step", to="3"), "'step'"),
    "a number as a float": (at("step", to=3.0), "'step'"),
    "a bool as a number": (at("skipped", to=True), "'skipped'"),
    "a number as a bool": (at("evaluation_owed", to=0), "'evaluation_owed'"),
    "a negative step": (at("step", to=-3), "'step'"),
    "a step before its samples": (at("step", to=2), "step=2, samples=96"),
    "samples inside a step": (at("samples", to=97), "inside a step"),
    "samples beyond the end": (at("samples", to=1 << 62), "samples=4611686018427387904"),
    "more samples than any": (at("samples", to=10**4000), "'samples'"),
    "negative samples": (at("samples", to=-32), "'samples'"),
    "more skipped than done": (at("skipped", to=4), "skipped=4"),
    "an identity that is none": (at("identity", to=None), "'identity'"),
    "an evaluation of texts": (at("evaluation", to={"val/loss": "0.5"}), "'evaluation.val/loss'"),
    "an evaluation of bools": (at("evaluation", to={"val/loss": True}), "'evaluation.val/loss'"),
    "an evaluation not finite": (at("evaluation", to={"val/loss": float("inf")}), "'evaluation.val/loss'"),
    "a controller of another kind": (at("control", to=[]), "'control'"),
    "a controller without a batch": (lambda f: f["control"].pop("size"), "'control.size'"),
    "a controller with more": (at("control", "more", to=1), "'control.more'"),
    "a batch of none": (at("control", "size", to=0), "'control.size'"),
    "a batch as a float": (at("control", "size", to=48.0), "'control.size'"),
    "a batch beyond any": (at("control", "size", to=10**16), "'control.size'"),
    "a batch asked for, negative": (at("control", "asked", to=-1.0), "'control.asked'"),
    "a batch asked for, not a number": (at("control", "asked", to=float("nan")), "'control.asked'"),
    "a batch asked for, infinite": (at("control", "asked", to=float("inf")), "'control.asked'"),
    "a negative count of measurements": (at("control", "count", to=-1), "'control.count'"),
    "a negative count in a row": (at("control", "smaller", to=-1), "'control.smaller'"),
    "a bool as a count": (at("control", "larger", to=True), "'control.larger'"),
    "no times of a batch": (at("control", "timed", to=[[32, []]]), "'control.timed.0"),
    "more times than are kept": (at("control", "timed", to=[[32, [0.5] * (LATEST + 1)]]), "'control.timed.0"),
    "a huge list of times": (at("control", "timed", to=[[32, [0.5] * 10**5]]), "'control.timed.0"),
    "a time of none": (at("control", "timed", to=[[32, [0.0]]]), "'control.timed.0"),
    "a time that isn't finite": (at("control", "timed", to=[[32, [float("nan")]]]), "'control.timed.0"),
    "times of no batch": (at("control", "timed", to=[[0, [0.5]]]), "'control.timed.0"),
    "a batch timed twice": (at("control", "timed", to=[[32, [0.5]], [32, [0.5]]]), "'control'"),
    "no ranks": (at("world_size", to=0), "'world_size'"),
    "more ranks than files": (at("world_size", to=3), "its files aren't"),
    "absurdly many ranks": (at("world_size", to=10**18), "its files aren't"),
    "fewer ranks than files": (at("world_size", to=1), "its files aren't"),
    "no files": (at("files", to={}), "its files aren't"),
    "files as a list": (at("files", to=[]), "'files'"),
    "a file above": (renamed("files", R1, to=f"../step-00000003/{R1}"), "its files aren't"),
    "an absolute file": (renamed("files", R1, to="/etc/passwd"), "its files aren't"),
    "a file of another kind": (renamed("files", R1, to="rank-00001.pt"), "its files aren't"),
    "a file of another rank": (renamed("files", R1, to=file_of(2)), "its files aren't"),
    "a file of a negative size": (at("files", R1, "bytes", to=-1), "'files.rank-00001.safetensors.bytes'"),
    "a file of an absurd size": (
        at("files", R1, "bytes", to=1 << 62),
        "bytes, not the 4611686018427387904",
    ),
    "a file smaller than its slices": (at("files", R1, "bytes", to=10), "bytes, not the 10 that were written"),
    "a file with another checksum": (at("files", R1, "sha256", to="0" * 64), "other bytes than were written"),
    "a checksum that is none": (at("files", R1, "sha256", to=None), "'files.rank-00001.safetensors.sha256'"),
    "tensors as a list": (at("tensors", to=[]), "'tensors'"),
    "no slices": (at(*W, "slices", to=[]), "'w' has shape [5, 4], but slices of 0 elements"),
    "slices missing at the end": (at(*W, "slices", to=lambda s: s[:1]), "but slices of 12 elements"),
    "slices missing at the start": (at(*W, "slices", to=lambda s: s[1:]), "elements 12 to 20 after those up to 0"),
    "slices overlapping": (at(*W, "slices", to=[[R0, 0, 12], [R1, 11, 20]]), "elements 11 to 20 after those up to 12"),
    "slices with a gap": (at(*W, "slices", to=[[R0, 0, 12], [R1, 13, 20]]), "elements 13 to 20 after those up to 12"),
    "slices unsorted": (at(*W, "slices", to=lambda s: s[::-1]), "elements 12 to 20 after those up to 0"),
    "slices twice": (at(*W, "slices", to=lambda s: s + s), "elements 0 to 12 after those up to 20"),
    "slices backwards": (at(*W, "slices", to=[[R0, 0, 12], [R1, 12, 3]]), "elements 12 to 3 after"),
    "an empty slice": (at(*W, "slices", to=lambda s: [[R0, 0, 0], *s]), "elements 0 to 0 after"),
    "a negative slice": (at(*W, "slices", to=lambda s: [[R0, -4, 12], s[1]]), "'tensors.w.slices.0.1'"),
    "a slice of floats": (at(*W, "slices", to=lambda s: [[R0, 0, 12.0], s[1]]), "'tensors.w.slices.0.2'"),
    "a slice of bools": (at(*W, "slices", to=lambda s: [[R0, False, 12], s[1]]), "'tensors.w.slices.0.1'"),
    "a slice of two": (at(*W, "slices", to=lambda s: [[R0, 0], s[1]]), "'tensors.w.slices.0.2'"),
    "a slice of four": (at(*W, "slices", to=lambda s: [[R0, 0, 12, 1], s[1]]), "'tensors.w.slices.0'"),
    "two slices in a file": (at(*W, "slices", to=[[R0, 0, 6], [R0, 6, 12], [R1, 12, 20]]), "holds other tensors than"),
    "a slice elsewhere": (at(*W, "slices", to=lambda s: [["../x", 0, 12], s[1]]), "'../x', which isn't one of"),
    "a slice of an absolute file": (at(*W, "slices", to=[["/etc/passwd", 0, 20]]), "which isn't one of its files"),
    "a slice beyond its file": (at(*W, "slices", to=[[R0, 0, 13], [R1, 13, 20]]), "holds other tensors than"),
    "slices in each other's files": (at(*W, "slices", to=[[R1, 0, 12], [R0, 12, 20]]), "holds other tensors than"),
    "another shape": (at(*W, "shape", to=[5, 5]), "'w' has shape [5, 5], but slices of 20"),
    "a huge shape": (at(*W, "shape", to=[1 << 62] * 64), "but slices of 20 elements"),
    "a shape beyond any": (at(*W, "shape", to=[10**400]), "'tensors.w.shape.0'"),
    "a shape of too many": (at(*W, "shape", to=[1] * 100), "'tensors.w.shape'"),
    "a negative shape": (at(*W, "shape", to=[-5, -4]), "'tensors.w.shape.0'"),
    "a shape of floats": (at(*W, "shape", to=[5.0, 4]), "'tensors.w.shape.0'"),
    "a shape of bools": (at(*W, "shape", to=[True, 20]), "'tensors.w.shape.0'"),
    "a number for a shape": (at(*W, "shape", to=20), "'tensors.w.shape'"),
    "an unknown dtype": (at(*W, "dtype", to="F31"), "'tensors.w.dtype'"),
    "another dtype": (at(*W, "dtype", to="I32"), "holds other tensors than"),
    "another dtype's size": (at(*W, "dtype", to="F64"), "holds other tensors than"),
    "another name": (renamed("tensors", "w", to="v"), "holds other tensors than"),
    "a tensor less": (lambda f: f["tensors"].pop("b"), "holds other tensors than"),
    "elements from nowhere": (at("tensors", "n", "shape", to=[1]), "'n' has shape [1], but slices of 0"),
    "values as a list": (at("values", to=[]), "'values'"),
}


@pytest.mark.parametrize("lie", LIES)
def test_wrong_manifests_are_rejected(folder: Path, lie: str) -> None:
    change, reason = LIES[lie]
    fields = fields_of(folder)
    change(fields)
    reseal(folder, json.dumps(fields))
    assert reason in damage_of(folder)


TEXTS: dict[str, tuple[Callable[[str], str], str]] = {
    "a tensor twice": (lambda text: text.replace('"b": {', '"w": {', 1), "holds other tensors than"),
    "nested without end": (lambda text: text.replace('"values": {', '"values": {"x": ' + "[" * 10**6, 1), "isn't JSON"),
    "nested and closed": (
        lambda text: text.replace('"values": {', '"values": {"x": ' + "[" * 10**5 + "]" * 10**5 + ", ", 1),
        "isn't JSON",
    ),
    "a number without end": (lambda text: text.replace('"step": 3', '"step": ' + "9" * 10**5), "isn't JSON"),
    "an infinite number": (lambda text: text.replace('"skipped": 0', '"skipped": 1e999'), "'skipped'"),
    "half a letter": (lambda text: text.replace('"w"', '"\\ud800"'), "manifest.json"),
    "more behind it": (lambda text: text + "{}", "isn't JSON"),
}


@pytest.mark.parametrize("text", TEXTS)
def test_texts_that_are_no_manifest_are_rejected(folder: Path, text: str) -> None:
    change, reason = TEXTS[text]
    before = json.dumps(fields_of(folder))
    after = change(before)
    assert after != before
    reseal(folder, after)
    assert reason in damage_of(folder)


def test_errors_have_no_control_characters(folder: Path) -> None:
    fields = fields_of(folder)
    fields["tensors"]["\x1b[2J\nfine"] = {"dtype": "\x1b", "shape": [], "slices": []}
    reseal(folder, json.dumps(fields))
    assert damage_of(folder).isprintable()


@examples(100)
@given(data=st.data())
def test_any_value_anywhere_is_damage_or_harmless(folder: Path, data: st.DataObject) -> None:
    """Only Damaged is raised. A manifest that is still accepted has all its tensors."""
    fields: Any = fields_of(folder)
    places = list(_places(fields))
    *path, last = data.draw(st.sampled_from(places))
    inside = fields
    for key in path:
        inside = inside[key]
    scalar = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    inside[last] = data.draw(st.recursive(scalar, lambda x: st.lists(x) | st.dictionaries(st.text(), x), max_leaves=5))
    try:
        checkpoint = parse(sealed(json.dumps(fields).removeprefix("{").encode()), folder)
    except Damaged:
        return
    for stored in checkpoint.tensors.values():
        assert sum(stop - start for _, start, stop in stored.slices) == stored.numel


def _places(value: Any, *path: Any) -> Any:
    if path:
        yield path
    for key, inside in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    ):
        yield from _places(inside, *path, key)


@examples(100)
@given(data=st.data())
def test_any_flipped_bit_of_a_manifest_is_found(folder: Path, data: st.DataObject) -> None:
    text = bytearray((folder / NAME).read_bytes())
    text[data.draw(st.integers(0, len(text) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(Damaged):
        parse(bytes(text), folder)


# ---- files of ranks with wrong content and the right size and checksum


class Boom:
    def __reduce__(self) -> Any:
        return os.mkdir, ("boom",)


def described(header: Any, data: bytes = bytes(64)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: Any = "F32", shape: Any = (16,), offsets: Any = (0, 64)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


NO_TENSOR_FILES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "isn't a safetensors file"),
    "a pickle": (pickle.dumps({"w": Boom()}), "isn't a safetensors file"),
    "half a length": (b"\x02\0\0", "isn't a safetensors file"),
    "a header longer than the file": (described({}) + bytes(3), "bytes, but its header describes"),
    "a header longer than any": ((HEADER_BYTES + 1).to_bytes(8, "little") + b"{}", "isn't a safetensors file"),
    "a header of 2^64 bytes": (b"\xff" * 8 + b"{}", "isn't a safetensors file"),
    "a header cut short": (described(b'{"w"', b""), "isn't JSON"),
    "a header that is a list": (described(b"[]", b""), "the header of x"),
    "nested": (described(b"[" * 10**5), "isn't JSON"),
    "bytes of no tensor": (described({}), "has 74 bytes, but its header describes 10"),
    "bytes at the end": (described({"w": entry()}, bytes(65)), "but its header describes"),
    "fewer bytes than it says": (described({"w": entry()}, bytes(63)), "but its header describes"),
    "a hole": (described({"w": entry(shape=[15], offsets=[4, 64])}), "has an impossible position"),
    "on top of each other": (described({"w": entry(), "v": entry()}), "has an impossible position"),
    "of another size": (described({"w": entry(shape=[17])}), "has an impossible position"),
    "offsets backwards": (described({"w": entry(offsets=[64, 0])}), "has an impossible position"),
    "offsets that are negative": (described({"w": entry(offsets=[-64, 0])}), "the header of x"),
    "offsets of floats": (described({"w": entry(offsets=[0.0, 64])}), "the header of x"),
    "a huge shape": (described({"w": entry(shape=[1 << 62])}), "has an impossible position"),
    "more dimensions": (described({"w": entry(shape=[4, 4])}), "the header of x"),
    "an unknown dtype": (described({"w": entry("F31")}), "the header of x: 'w.dtype'"),
    "something more": (described({"w": entry() | {"more": 1}}), "the header of x"),
    "metadata": (described({"__metadata__": {"a": "b"}, "w": entry()}), "the header of x"),
}


@pytest.mark.parametrize("content", NO_TENSOR_FILES)
def test_files_without_tensors_are_rejected(tmp_path: Path, content: str) -> None:
    data, reason = NO_TENSOR_FILES[content]
    (tmp_path / "x").write_bytes(data)
    with open(tmp_path / "x", "rb") as file, pytest.raises(Damaged, match=reason.replace("(", r"\(")):
        entries(file, "x")


def test_a_pickle_with_the_right_checksum_is_not_unpickled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    content = pickle.dumps(Boom()) + bytes(200)
    (folder / R0).write_bytes(content)
    fields = fields_of(folder)
    fields["files"][R0] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    reseal(folder, json.dumps(fields))
    assert "rank-00000.safetensors isn't a safetensors file" in damage_of(folder)
    assert not Path("boom").exists()


def test_inconsistent_parts_are_rejected_before_the_commit(tmp_path: Path) -> None:
    parts = [{"bytes": 500, "sha256": "", "slices": {"w": ["F32", [20], 12 * rank, 20]}} for rank in range(RANKS)]
    with pytest.raises(Damaged, match="elements 12 to 20 after those up to 20"):
        compose(header_of(), parts, {})
    parts[0]["slices"] = {"w": ["F64", [20], 0, 12]}
    with pytest.raises(Damaged, match=r"w is F32 \[20\] on rank 1, but F64 \[20\] on a lower rank"):
        compose(header_of(), parts, {})
