"""A run's identity: a hash of its science. The same science on other hardware, or logged elsewhere, is the same run."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from isobatch.conf.recipe import PACKAGE, SHIPPED_TASKS
from isobatch.conf.schema import RunConfig
from isobatch.scaling.units import Duration

HOUSEKEEPING = (
    "action", "output", "device", "debug", "engine", "compile", "recompute", "cluster", "task.local", "data.local",
    "data.workers", "data.fingerprint", "evaluate", "check", "checkpoint", "on_nonfinite", "noise", "log", "run",
    "plan", "tune", "report", "stop", "search", "given", "chosen",
)  # fmt: skip
OFF = {"precision": "fp32", "numerics": "fast", "control.name": "none"}  # defaults that are off without being null
# Taken whole: whoever takes them knows what null means.
ABOUT_TUNED = re.compile(r"task\.tuned\.[^.]+\.samples")  # tells about the tuning, and isn't part of the recipe
FREE = ("task.args", "task.local", "model.args", "data.args", "data.val_args", "data.local", "optimizer.args")


def science(config: RunConfig) -> dict[str, Any]:
    """Return the run's science: dotted key → value, without the keys that are off.

    A key that is null, false or empty is left out, so that a new key which is off changes no old identity. Where the
    global batch was given, ``batch.per_gpu`` and ``batch.accumulation`` are hardware; otherwise it follows from them.
    With ``numerics=bitwise`` the micro-batches are science, too, and so is ``batch.per_gpu``.
    """
    return science_of(config.model_dump(mode="json", by_alias=True))


def science_of(plain: dict[str, Any]) -> dict[str, Any]:
    """Return the science of a config as plain values, such as those that ``config.yaml`` holds."""
    leaves = _leaves("", plain)
    dealt = {"batch.accumulation"} if leaves.get("numerics") == "bitwise" else {"batch.per_gpu", "batch.accumulation"}
    sizes = leaves.get("batch.per_gpu"), leaves.get("batch.accumulation")
    left_out = dealt if _asked_for(plain.get("given", ()), *sizes) else {"batch.global_size"}
    target = leaves.get("task._target_")
    if target in SHIPPED_TASKS:  # hashed as it was called first, so that no old run is another one now
        leaves["task._target_"] = target.removeprefix(PACKAGE)
    ours = {key: value for key, value in leaves.items() if key not in left_out and not housekeeping(key)}
    return {key: value for key, value in ours.items() if not _off(value) and OFF.get(key) != value}


def values(config: RunConfig) -> dict[str, Any]:
    """Return every key of ``config``, dotted, with its value; the mappings in FREE are values."""
    return _leaves("", config.model_dump(mode="json", by_alias=True))


def housekeeping(key: str) -> bool:
    """Return whether a key, or a section that it is in, is left out of the identity."""
    return f"{key}.".startswith(tuple(f"{name}." for name in HOUSEKEEPING)) or bool(ABOUT_TUNED.fullmatch(key))


def global_size_was_given(config: RunConfig) -> bool:
    """Return whether the global batch was asked for, rather than the product of per-GPU batch and accumulation."""
    return _asked_for(config.given, config.batch.per_gpu, config.batch.accumulation)


def _asked_for(given: Collection[str], per_gpu: int | str | None, accumulation: int | None) -> bool:
    return "batch.global_size" in given or per_gpu is None or accumulation is None


def identity(config: RunConfig, duration: Duration | None = None) -> str:
    """Return the run's identity, 12 hexadecimal digits; with ``duration``, that of the run at that length."""
    return digest(science(config if duration is None else config.model_copy(update={"duration": duration})))


def run_directory(config: RunConfig) -> Path:
    """Return ``run.dir``, else ``runs/<name>-<identity>``; with ``run.new`` the first free one beside it."""
    named = Path("runs") / f"{config.run.name or config.task.name}-{identity(config)}"
    directory = Path(os.path.expanduser(config.run.directory)) if config.run.directory else named
    return first_free(directory) if config.run.new else directory


def first_free(directory: Path) -> Path:
    """Return ``directory``, or the first of ``directory-2``, ``directory-3``, … that doesn't exist."""
    number, free = 1, directory
    while os.path.lexists(free):
        number += 1
        free = directory.with_name(f"{directory.name}-{number}")
    return free


def digest(content: dict[str, Any]) -> str:
    """Return a hash of ``content``, 12 hexadecimal digits."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _off(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def _leaves(prefix: str, value: Any) -> dict[str, Any]:
    if isinstance(value, dict) and prefix not in FREE:
        return {
            key: leaf
            for name, inner in value.items()
            for key, leaf in _leaves(f"{prefix}.{name}" if prefix else name, inner).items()
        }
    return {prefix: value}
