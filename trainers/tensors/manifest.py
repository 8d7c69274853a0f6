"""Read and validate checkpoints. Torch-free.

A checkpoint is a folder ``checkpoints/step-00000300/`` with a ``manifest.json`` and one safetensors file per rank that
wrote it, which holds slices of flattened tensors. The manifest maps every tensor to its slices, so that any engine on
any number of ranks can find the range it needs.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, FiniteFloat, PlainValidator

from isobatch.scaling.noise import Smoothed
from isobatch.scaling.plan import Plan
from isobatch.scaling.report.plan_json import from_json
from isobatch.scaling.tally import Tally
from isobatch.scaling.tuning.controllers import Memory
from isobatch.trainers.tensors.names import file_of, followed
from isobatch.trainers.tensors.tensorfile import Damaged as Damaged
from isobatch.trainers.tensors.tensorfile import Dtype, Size, entries, parse_json, sha256, strict

FORMAT = 1
NAME = "manifest.json"
MANIFEST_BYTES = 256 << 20  # about five million slices


@strict
@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Describe the run that a checkpoint belongs to, and its position.

    Attributes:
        identity, duration: of the run, as configured.
        world_size: number of ranks that wrote the checkpoint.
        step, samples, skipped: the position, as in TrainState.
        evaluation_owed: an evaluation was due at this step, but wasn't done before the checkpoint was saved.
        fingerprint: fingerprint of the data; None if it couldn't be computed.
        evaluation: the values of the evaluation at this step, if it was the best so far. Non-finite values are None.
        plan: the plan in force at this step.
        noise: state of the gradient noise scale; None if it wasn't measured, and in old checkpoints.
        control: what the controller of the batch remembers; None without one, and in old checkpoints.
        tally: the logged sums; None in old checkpoints.
        kept: never remove this checkpoint, by ``checkpoint.keep_every``; False in old checkpoints.
    """

    identity: str
    duration: str
    world_size: Annotated[Size, Field(ge=1)]
    step: Size
    samples: Size
    skipped: Size
    evaluation_owed: bool
    fingerprint: str | None
    evaluation: dict[str, FiniteFloat | None] | None
    plan: Annotated[Plan, PlainValidator(lambda fields: from_json(json.dumps(fields)))]
    noise: Smoothed | None = None
    control: Memory | None = None
    tally: Tally | None = None
    kept: bool = False


@strict
@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor's dtype, shape and location.

    Attributes:
        dtype: its name in safetensors, a key of ITEMSIZE.
        slices: (file, start, stop) in elements of the flattened tensor, sorted by start, without gaps, at most one per
            file; empty if the tensor has no elements.
    """

    dtype: Dtype
    shape: Annotated[tuple[Size, ...], Field(max_length=64)]
    slices: tuple[tuple[str, Size, Size], ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@strict
@dataclass(frozen=True, slots=True)
class File:
    """The size and the sha256 of a rank's file."""

    bytes: Size
    sha256: str


@dataclass(frozen=True, slots=True)
class _Version:
    """The only field that every version of the manifest has."""

    format: Any = None


@strict
@dataclass(frozen=True, slots=True, kw_only=True)
class _Content(Header):
    """The content of ``manifest.json``. ``sha256`` is the hash of everything after it."""

    sha256: str
    format: int
    files: dict[str, File]
    tensors: dict[str, Stored]
    values: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint with a valid manifest. ``verify`` checks its files."""

    path: Path
    header: Header
    files: dict[str, File]
    tensors: dict[str, Stored]
    values: dict[str, Any]


def read(path: Path) -> Checkpoint:
    """Read the manifest of the checkpoint at ``path``, which may be a link, and check the sizes of its files.

    Raises:
        Damaged: the checkpoint can't be used.
    """
    path = followed(path)
    if path.is_symlink() and not path.exists():
        raise Damaged(f"it can't be read: it is a link to {os.readlink(path)}, which doesn't exist")
    try:
        if _file_size(path / NAME) > MANIFEST_BYTES:
            raise Damaged(f"{NAME} is larger than {MANIFEST_BYTES} bytes")
        checkpoint = parse((path / NAME).read_bytes(), path)
        if path.name != f"step-{checkpoint.header.step:08d}":
            raise Damaged(f"{NAME} belongs to step {checkpoint.header.step}")
        for name, file in checkpoint.files.items():
            if (size := _file_size(path / name)) != file.bytes:
                raise Damaged(f"{name} has {size} bytes, not the {file.bytes} that were written")
    except FileNotFoundError as error:
        raise Damaged(f"{Path(error.filename).name} is missing") from None
    except OSError as error:
        raise Damaged(f"it can't be read: {error}") from None
    return checkpoint


def _file_size(path: Path) -> int:
    """Return the size of a regular file. Raises Damaged for anything else, such as a pipe, which may never end."""
    if not stat.S_ISREG((found := path.lstat()).st_mode):
        raise Damaged(f"{path.name} isn't a file")
    return found.st_size


def parse(text: bytes, path: Path) -> Checkpoint:
    """Parse the manifest of the checkpoint at ``path``. Raises Damaged if ``compose`` can't have written it."""
    if (found := parse_json(_Version, text, NAME).format) != FORMAT:
        raise Damaged(f"{NAME} has format {found!r:.20}, but this version reads {FORMAT}")
    if text != sealed(text[len(sealed(b"")) :]):
        raise Damaged(f"{NAME} has other bytes than were written (sha256)")
    content: _Content = parse_json(_Content, text, NAME)
    _check_position(content)
    _check_tensors(content)
    header = Header(**{name: getattr(content, name) for name in Header.__dataclass_fields__})
    return Checkpoint(path, header, content.files, content.tensors, content.values)


def sealed(rest: bytes) -> bytes:
    """Prepend the sha256 of ``rest``, the manifest's JSON without its opening brace."""
    return b'{"sha256": "%b", %b' % (hashlib.sha256(rest).hexdigest().encode(), rest)


def _check_position(header: Header) -> None:
    """Raise Damaged unless a run with this plan reaches this position."""
    try:
        following = header.plan.step_at(header.samples)
    except (AssertionError, ArithmeticError, ValueError) as error:
        raise Damaged(f"samples={header.samples} doesn't fit its plan: {error}") from None
    plan = header.plan
    at = following.index if following else plan.steps
    end = (plan.samples or 0) + (plan.added or 0)
    if header.step != at or (following is None and header.samples != end) or header.skipped > header.step:
        raise Damaged(f"step={header.step}, samples={header.samples}, skipped={header.skipped} don't fit its plan")


def _check_tensors(content: _Content) -> None:
    """Raise Damaged unless the slices in the ranks' files cover every element of every tensor exactly once."""
    count = len(content.files)
    if count != content.world_size or sorted(content.files) != [file_of(rank) for rank in range(count)]:
        raise Damaged(f"its files aren't {file_of(0)} to {file_of(content.world_size - 1)}, one per rank")
    for name, stored in content.tensors.items():
        end = 0
        for file, start, stop in stored.slices:
            if file not in content.files:
                raise Damaged(f"{name!r:.100} has a slice in {file!r:.100}, which isn't one of its files")
            if start != end or stop <= start:
                raise Damaged(f"{name!r:.100} has elements {start} to {stop} after those up to {end}")
            end = stop
        if end != stored.numel:
            raise Damaged(f"{name!r:.100} has shape {list(stored.shape)!s:.100}, but slices of {end} elements")


def verify(checkpoint: Checkpoint, names: Iterable[str], beat: Callable[[], None] = lambda: None) -> None:
    """Read the files ``names`` completely and compare them with the manifest.

    Args:
        beat: called every few MB.

    Raises:
        Damaged: a file has another checksum or other tensors than the manifest says, or can't be read.
    """
    expected: dict[str, dict[str, tuple[str, int]]] = {name: {} for name in checkpoint.files}
    for tensor, stored in checkpoint.tensors.items():
        for name, start, stop in stored.slices:
            expected[name][tensor] = (stored.dtype, stop - start)
    for name in names:
        try:
            with open(checkpoint.path / name, "rb") as file:
                if sha256(file, beat) != checkpoint.files[name].sha256:
                    raise Damaged(f"{name} has other bytes than were written (sha256)")
                file.seek(0)
                found = {tensor: (entry.dtype, entry.count) for tensor, entry in entries(file, name).items()}
        except OSError as error:
            raise Damaged(f"{name} can't be read: {error}") from None
        if found != expected[name]:
            raise Damaged(f"{name} holds other tensors than {NAME} says")
