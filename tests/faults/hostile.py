"""Damage a checkpoint in many ways, each with a pattern of the expected error."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from isobatch.trainers.tensors.manifest import sealed

PART = "rank-00001.safetensors"
BALLAST = "model/ballast"  # a tensor with a slice in each of the two files

Damage = Callable[[Path], None]
DAMAGES: dict[str, tuple[Damage, str]] = {}  # by name: the damage, and a pattern of the expected error


def damage(name: str, expected: str) -> Callable[[Damage], Damage]:
    def add(function: Damage) -> Damage:
        DAMAGES[name] = function, expected
        return function

    return add


def edit(checkpoint: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest, and update its checksum."""
    file = checkpoint / "manifest.json"
    content = json.loads(file.read_text())
    del content["sha256"]
    change(content)
    file.write_bytes(sealed(json.dumps(content).encode()[1:]))


def forge(checkpoint: Path, content: bytes) -> None:
    """Replace the content of a rank's file, and update its size and checksum in the manifest."""
    (checkpoint / PART).write_bytes(content)
    about = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit(checkpoint, lambda manifest: manifest["files"].update({PART: about}))


@damage("one bit of a tensor is flipped", r"has other bytes than were written \(sha256\)")
def flipped(checkpoint: Path) -> None:
    content = bytearray((checkpoint / PART).read_bytes())
    content[-1] ^= 1
    (checkpoint / PART).write_bytes(content)


@damage("a rank's file is cut short", r"has \d+ bytes, not the \d+ that were written")
def truncated(checkpoint: Path) -> None:
    os.truncate(checkpoint / PART, 1000)


@damage("a rank's file is missing", "rank-00001.safetensors is missing")
def missing(checkpoint: Path) -> None:
    (checkpoint / PART).unlink()


@damage("half-written: no manifest", "manifest.json is missing")
def unfinished(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


@damage("half-written: the manifest is cut short", "manifest.json isn't JSON")
def half_a_manifest(checkpoint: Path) -> None:
    os.truncate(checkpoint / "manifest.json", 500)


@damage("a value of the manifest is changed", r"manifest.json has other bytes than were written \(sha256\)")
def changed(checkpoint: Path) -> None:
    file = checkpoint / "manifest.json"
    file.write_text(file.read_text().replace('"samples": 1440', '"samples": 1441'))


@damage("a manifest nested 100,000 deep", "manifest.json isn't JSON")
def deep(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_text('{"format": 1, "values": ' + "[" * 100_000)


@damage("the manifest names a file ../rank-00001.safetensors, which exists", "its files aren't rank-00000")
def outside(checkpoint: Path) -> None:
    (checkpoint / PART).rename(checkpoint.parent / PART)
    edit(checkpoint, lambda manifest: manifest["files"].update({f"../{PART}": manifest["files"].pop(PART)}))


@damage("a slice points to ../rank-00001.safetensors", "which isn't one of its files")
def slice_outside(checkpoint: Path) -> None:
    edit(checkpoint, lambda manifest: manifest["tensors"][BALLAST]["slices"][1].__setitem__(0, f"../{PART}"))


@damage("a rank's file is a link to a file elsewhere", "rank-00001.safetensors isn't a file")
def linked(checkpoint: Path) -> None:
    (checkpoint / PART).rename(checkpoint.parent / PART)
    (checkpoint / PART).symlink_to(f"../{PART}")


@damage("ranges of a tensor overlap", "has elements .* after those up to")
def overlapping(checkpoint: Path) -> None:
    edit(checkpoint, lambda manifest: manifest["tensors"][BALLAST]["slices"][1].__setitem__(1, 7))


@damage("a range of a tensor is missing", "but slices of .* elements")
def gap(checkpoint: Path) -> None:
    edit(checkpoint, lambda manifest: manifest["tensors"][BALLAST]["slices"].pop())


@damage("a tensor has another shape of the same size", "is float32 .*, but float32 .* in the model")
def misshapen(checkpoint: Path) -> None:
    edit(checkpoint, lambda manifest: manifest["tensors"]["model/0.weight"]["shape"].reverse())


@damage("a tensor of 2^62 elements", "but slices of .* elements")
def huge(checkpoint: Path) -> None:
    edit(checkpoint, lambda manifest: manifest["tensors"][BALLAST].update(shape=[2**62]))


class Payload:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


@damage("a pickle named as safetensors, with the right checksum", "rank-00001.safetensors isn't a safetensors file")
def pickled(checkpoint: Path) -> None:
    size = (checkpoint / PART).stat().st_size
    forge(checkpoint, pickle.dumps(Payload(checkpoint.parents[2] / "unpickled")).ljust(size, b"\0"))


@damage(
    "a header that points beyond its file, with the right checksum", "has an impossible position|its header describes"
)
def lying(checkpoint: Path) -> None:
    content = (checkpoint / PART).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    offsets = max(entry["data_offsets"] for entry in header.values())
    text = json.dumps(header).replace(json.dumps(offsets), json.dumps([offsets[0], offsets[1] + (1 << 40)]))
    forge(checkpoint, len(text).to_bytes(8, "little") + text.encode() + content[8 + length :])


@damage("it belongs to another run", "it belongs to another run")
def foreign(checkpoint: Path) -> None:
    edit(checkpoint, lambda manifest: manifest.update(identity="0123456789ab"))


@damage("a number in the optimizer's groups is text", "optim/groups has lr='x' in group 0")
def text_for_lr(checkpoint: Path) -> None:
    edit(checkpoint, lambda manifest: manifest["values"]["optim/groups"][0].update(lr="x"))


@damage("the plan in the manifest names an engine that doesn't exist", "not a plan")
def no_such_engine(checkpoint: Path) -> None:
    edit(checkpoint, lambda manifest: manifest["plan"]["engine"].update(stage=-1))
