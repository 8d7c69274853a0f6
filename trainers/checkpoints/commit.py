"""Commit a checkpoint once every rank's file is written, and remove older ones. Torch-free.

A checkpoint is written to ``checkpoints/.step-00000300.tmp/``, its manifest last. Then the folder is renamed.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from isobatch.conf.identity import first_free
from isobatch.conf.rundir.directory import RunDir
from isobatch.conf.rundir.files import write_atomic
from isobatch.scaling.report.plan_json import to_json
from isobatch.trainers.tensors.manifest import FORMAT, NAME, Damaged, Header, parse, read, sealed
from isobatch.trainers.tensors.names import checkpoints, file_of, folder_of, step_of

BEST = "best"  # the link to the checkpoint of the best evaluation
PASSED_OVER = "passed-over"  # the folder of checkpoints that were skipped when the run resumed


def aside_of(run: RunDir, step: int) -> Path:
    """Return the temporary folder to which the checkpoint of ``step`` is written before it is renamed."""
    return run.checkpoints / f".{folder_of(run, step).name}.tmp"


def compose(header: Header, parts: Iterable[Mapping[str, Any]], values: Mapping[str, Any]) -> bytes:
    """Return the manifest for the files that the ranks wrote.

    Args:
        parts: the return values of ``write_part``, by rank.
        values: JSON values by name.

    Raises:
        Damaged: the parts don't cover every tensor exactly once, so the checkpoint couldn't be read.
    """
    files: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    for rank, part in enumerate(parts):
        files[file_of(rank)] = {"bytes": part["bytes"], "sha256": part["sha256"]}
        for name, (dtype, shape, start, stop) in part["slices"].items():
            stored = tensors.setdefault(name, {"dtype": dtype, "shape": shape, "slices": []})
            if (first := (stored["dtype"], stored["shape"])) != (dtype, shape):
                raise Damaged(f"{name} is {dtype} {shape} on rank {rank}, but {first[0]} {first[1]} on a lower rank")
            if start < stop:
                stored["slices"].append((file_of(rank), start, stop))
    for stored in tensors.values():
        stored["slices"].sort(key=lambda piece: piece[1])
    fields = asdict(header) | {"plan": json.loads(to_json(header.plan))}
    if header.evaluation is not None:  # JSON has no NaN and no infinity
        finite = {key: value for key, value in header.evaluation.items() if value is not None and math.isfinite(value)}
        fields["evaluation"] = dict.fromkeys(header.evaluation) | finite
    content = {"format": FORMAT, **fields, "files": files, "tensors": tensors, "values": values}
    text = sealed(json.dumps(content).removeprefix("{").encode() + b"\n")
    parse(text, Path())
    return text


def commit(run: RunDir, step: int, manifest: bytes, *, best: bool) -> list[str]:
    """Write the manifest of the checkpoint of ``step``, whose other files are on the disk, and rename its folder.

    If this process is killed, the new or the previous checkpoint exists, or ``clear_leftovers`` restores one of them.

    Args:
        best: the evaluation at ``step`` is the best so far.

    Returns:
        Warnings about failures after the rename. The checkpoint is committed nevertheless.
    """
    aside, target = aside_of(run, step), folder_of(run, step)
    metrics = run.path / "metrics.jsonl"
    if metrics.exists():
        sync(metrics)  # its lines up to this step must reach the disk first
    write_atomic(aside / NAME, manifest)
    sync(aside)
    before = _put_away(target) if os.path.lexists(target) else None
    try:
        aside.rename(target)
    except OSError:
        if before:
            before.rename(target)
        raise
    warnings = [*warnings_from(sync, run.checkpoints), *warnings_from(sync, run.path)]
    if before and before.is_symlink():
        warnings.append(f"{target} was a link and is a folder now; the target of the link stays: {os.readlink(before)}")
    if before:
        warnings += warnings_from(_delete, before)
    if best:
        warnings += warnings_from(link_best, run, target)
    return warnings


def warnings_from(act: Callable[..., None], *args: Any) -> list[str]:
    """Call ``act``, and return its OSError as a warning."""
    try:
        act(*args)
        return []
    except OSError as error:
        return [describe_error(error)]


def describe_error(error: Exception) -> str:
    """Return an error in one line, with the path that it concerns."""
    text = f"{getattr(error, 'strerror', None) or error} ({type(error).__name__})"
    path = getattr(error, "filename", None)
    return f"{text}: {path}" if path else text


def link_best(run: RunDir, path: Path) -> None:
    """Link ``checkpoints/best`` to the checkpoint at ``path``."""
    link = run.checkpoints / f".{BEST}.tmp"
    link.unlink(missing_ok=True)
    link.symlink_to(path.name)
    link.replace(run.checkpoints / BEST)


def pass_over(run: RunDir, step: int) -> list[Path]:
    """Move checkpoints beyond ``step``, at which the run resumes, to ``checkpoints/passed-over/``. Return their paths.

    They are kept in case they can be repaired. The run repeats their steps, after which ``metrics.jsonl`` doesn't
    match them any more. So it never resumes from one of them, and none of them is the best.
    """
    folder, moved = run.checkpoints / PASSED_OVER, []
    for path in checkpoints(run):
        if step_of(path) > step:
            folder.mkdir(exist_ok=True)
            moved.append(to := first_free(folder / path.name))
            if path.is_symlink():  # a relative link would break in another folder
                to.symlink_to(os.path.realpath(path))
                path.unlink()
            else:
                path.rename(to)
    best = run.checkpoints / BEST
    if moved and not best.exists():
        best.unlink(missing_ok=True)  # it was one of them
    return moved


def is_kept(path: Path) -> bool:
    """Return whether ``checkpoint.keep_every`` keeps the checkpoint at ``path``; False if it is damaged."""
    with suppress(Damaged):
        return read(path).header.kept
    return False


def drop_older(run: RunDir, step: int, keep: int, stays: Callable[[Path], bool] = is_kept) -> list[str]:
    """Remove the oldest checkpoints, so that ``keep`` of them remain, including that of ``step``.

    The best checkpoint stays, and so do those of ``checkpoint.keep_every``. Links stay too and don't count, since the
    user made them and they take no space here.

    Args:
        stays: returns whether to keep an older checkpoint.

    Returns:
        Warnings about checkpoints that couldn't be removed.
    """
    link = run.checkpoints / BEST
    best = os.readlink(link) if link.is_symlink() else None
    older = [path for path in checkpoints(run) if step_of(path) < step and not path.is_symlink()]
    removable = [path for path in older[max(0, keep - 1) :] if path.name != best and not stays(path)]
    return [warning for path in removable for warning in warnings_from(lambda path: _delete(_put_away(path)), path)]


def clear_leftovers(run: RunDir) -> None:
    """Finish or remove half-written checkpoints of earlier starts. Called on rank 0 before it looks for checkpoints."""
    for path in run.checkpoints.glob(".*"):
        if named := re.fullmatch(r"\.(step-[0-9]{8,})\.tmp", path.name):
            target = run.checkpoints / named[1]
            if (path / NAME).exists() and not os.path.lexists(target):  # complete, but not renamed yet
                path.rename(target)
                continue
        if named or path.name.startswith((".old-step-", f".{BEST}.tmp")):
            with suppress(OSError):  # the next start tries again
                _delete(path)


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_away(path: Path) -> Path:
    """Rename a checkpoint before its deletion, so that a half-deleted one is never read. Return its new path."""
    away = path.with_name(f".old-{path.name}")
    _delete(away)
    return path.rename(away)


def _delete(path: Path) -> None:
    """Remove a file, a link (not its target), or as much of a folder as possible. Raises OSError for the rest."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    failed: list[OSError] = []
    shutil.rmtree(path, onerror=lambda act, file, error: failed.append(error[1]))  # type: ignore[arg-type]
    if failed and path.exists():
        raise failed[0]
