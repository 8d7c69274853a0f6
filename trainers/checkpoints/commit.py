"""Give a checkpoint its name once every rank's file is there, and remove older ones. Torch-free.

A checkpoint is written to ``checkpoints/.step-00000300.tmp/``, the manifest last: with it the checkpoint is whole.
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
from isobatch.trainers.tensors.manifest import FORMAT, NAME, Damaged, Header, parse, sealed
from isobatch.trainers.tensors.names import checkpoints, file_of, folder_of, step_of

BEST = "best"  # the link to the checkpoint of the best evaluation
PASSED_OVER = "passed-over"  # the folder of checkpoints that weren't good when the run resumed


def aside_of(run: RunDir, step: int) -> Path:
    """Return the folder to which the checkpoint of ``step`` is written before it has its name."""
    return run.checkpoints / f".{folder_of(run, step).name}.tmp"


def compose(header: Header, parts: Iterable[Mapping[str, Any]], values: Mapping[str, Any]) -> bytes:
    """Return the manifest of what the ranks wrote.

    Args:
        parts: what ``write_part`` returned on each rank, by rank.
        values: JSON by name.

    Raises:
        Damaged: the parts together aren't every tensor once, so nobody could read the checkpoint.
    """
    files: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    for rank, part in enumerate(parts):
        files[file_of(rank)] = {"bytes": part["bytes"], "sha256": part["sha256"]}
        for name, (dtype, shape, start, stop) in part["slices"].items():
            stored = tensors.setdefault(name, {"dtype": dtype, "shape": shape, "slices": []})
            if (there := (stored["dtype"], stored["shape"])) != (dtype, shape):
                raise Damaged(f"{name} is {dtype} {shape} on rank {rank}, and {there[0]} {there[1]} before")
            if start < stop:
                stored["slices"].append((file_of(rank), start, stop))
    for stored in tensors.values():
        stored["slices"].sort(key=lambda piece: piece[1])
    about = asdict(header) | {"plan": json.loads(to_json(header.plan))}
    if header.evaluation is not None:  # JSON has no NaN and no infinity
        finite = {key: value for key, value in header.evaluation.items() if value is not None and math.isfinite(value)}
        about["evaluation"] = dict.fromkeys(header.evaluation) | finite
    content = {"format": FORMAT, **about, "files": files, "tensors": tensors, "values": values}
    text = sealed(json.dumps(content).removeprefix("{").encode() + b"\n")
    parse(text, Path())
    return text


def commit(run: RunDir, step: int, manifest: bytes, *, best: bool) -> list[str]:
    """Give the checkpoint of ``step``, all of whose files are on the disk, its manifest and its name.

    Killed at any moment, either it or what had its name before is there, or ``clear_leftovers`` restores one of them.

    Args:
        best: its evaluation is the best so far.

    Returns:
        Warnings about what failed after the checkpoint had its name. It is committed nevertheless.
    """
    aside, target = aside_of(run, step), folder_of(run, step)
    metrics = run.path / "metrics.jsonl"
    if metrics.exists():
        sync(metrics)  # so that its lines up to this step are on the disk before
    write_atomic(aside / NAME, manifest)
    sync(aside)
    before = _put_away(target) if os.path.lexists(target) else None
    try:
        aside.rename(target)
    except OSError:
        if before:
            before.rename(target)
        raise
    warnings = [*tried(sync, run.checkpoints), *tried(sync, run.path)]
    if before and before.is_symlink():
        warnings.append(f"{target} was a link and is a folder now; what the link led to stays: {os.readlink(before)}")
    if before:
        warnings += tried(_delete, before)
    if best:
        warnings += tried(link_best, run, target)
    return warnings


def tried(act: Callable[..., None], *args: Any) -> list[str]:
    """Call ``act``; return why it failed, if it did."""
    try:
        act(*args)
        return []
    except OSError as error:
        return [said(error)]


def said(error: Exception) -> str:
    """Return an error as one line: what went wrong, and with which file."""
    what = f"{getattr(error, 'strerror', None) or error} ({type(error).__name__})"
    path = getattr(error, "filename", None)
    return f"{what}: {path}" if path else what


def link_best(run: RunDir, path: Path) -> None:
    """Link ``checkpoints/best`` to the checkpoint at ``path``."""
    link = run.checkpoints / f".{BEST}.tmp"
    link.unlink(missing_ok=True)
    link.symlink_to(path.name)
    link.replace(run.checkpoints / BEST)


def pass_over(run: RunDir, step: int) -> list[Path]:
    """Move the checkpoints beyond ``step``, from which the run resumes, to ``checkpoints/passed-over/``; return where.

    They are kept for whoever can fix them. But the run comes by their steps again, and ``metrics.jsonl`` is then of
    the second time: so it never resumes from one of them, and none of them is the best.
    """
    folder, moved = run.checkpoints / PASSED_OVER, []
    for path in checkpoints(run):
        if step_of(path) > step:
            folder.mkdir(exist_ok=True)
            moved.append(to := first_free(folder / path.name))
            if path.is_symlink():  # a relative one keeps pointing to the same folder
                to.symlink_to(os.path.realpath(path))
                path.unlink()
            else:
                path.rename(to)
    best = run.checkpoints / BEST
    if moved and not best.exists():
        best.unlink(missing_ok=True)  # it was one of them
    return moved


def drop_older(run: RunDir, step: int, keep: int) -> list[str]:
    """Remove the oldest checkpoints before ``step``, so that ``keep`` remain together with that of ``step``.

    The best one stays. So do links, which the user made: they take no room here, and don't count. Return warnings
    about those that couldn't be removed.
    """
    link = run.checkpoints / BEST
    best = os.readlink(link) if link.is_symlink() else None
    older = [path for path in checkpoints(run) if step_of(path) < step and not path.is_symlink()]
    removable = [path for path in older[max(0, keep - 1) :] if path.name != best]
    return [warning for path in removable for warning in tried(lambda path: _delete(_put_away(path)), path)]


def clear_leftovers(run: RunDir) -> None:
    """Finish or remove what earlier attempts left half done. On rank 0, before checkpoints are looked for."""
    for path in run.checkpoints.glob(".*"):
        if named := re.fullmatch(r"\.(step-[0-9]{8,})\.tmp", path.name):
            target = run.checkpoints / named[1]
            if (path / NAME).exists() and not os.path.lexists(target):  # it only lacked its name
                path.rename(target)
                continue
        if named or path.name.startswith((".old-step-", f".{BEST}.tmp")):
            with suppress(OSError):  # left for the next start
                _delete(path)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_away(path: Path) -> Path:
    """Rename a checkpoint, so that a half-deleted one is never taken for a checkpoint; return its new path."""
    away = path.with_name(f".old-{path.name}")
    _delete(away)
    return path.rename(away)


def _delete(path: Path) -> None:
    """Remove a file, a link (never what it leads to), or as much of a folder as can be; raise OSError for the rest."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    failed: list[OSError] = []
    shutil.rmtree(path, onerror=lambda act, file, error: failed.append(error[1]))  # type: ignore[arg-type]
    if failed and path.exists():
        raise failed[0]
