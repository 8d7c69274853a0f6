"""Write the trained weights to ``final/``, and read the weights that ``init_from`` names."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from isobatch.conf.rundir.directory import RunDir
from isobatch.conf.terminal import say
from isobatch.scaling.errors import UserError
from isobatch.trainers.checkpoints.commit import sync
from isobatch.trainers.model.build import tied
from isobatch.trainers.ranks.failure import RunFailed
from isobatch.trainers.ranks.session import raise_on_all
from isobatch.trainers.ranks.world import World
from isobatch.trainers.tensors.manifest import NAME, Checkpoint, Damaged, read, verify
from isobatch.trainers.tensors.names import checkpoints, followed
from isobatch.trainers.tensors.slices import DTYPES, EVAL, Layout, Reader, write_whole

if TYPE_CHECKING:
    from isobatch.trainers.engines.engine import Engine

WEIGHTS, AVERAGED = "model.safetensors", "ema.safetensors"
ASIDE = ".tmp"  # the folder in ``final/`` in which files are written before they are renamed
SHOWN = 5  # most names shown for each kind of mismatch


def save_final(run: RunDir, engine: Engine, writes: bool) -> None:
    """Write the model's weights and buffers, and their average if there is one, to ``final/``; all or nothing.

    All ranks must call this. They gather one tensor at a time, and one rank ``writes``. Raises RunFailed if it can't.
    """
    layout = engine.layout()
    names = [name.removeprefix("model/") for name in layout if name.startswith("model/")]
    names.sort(key=lambda name: -layout[f"model/{name}"][0].itemsize)
    files = {WEIGHTS: [f"model/{name}" for name in names]}
    if engine.average:
        files[AVERAGED] = [f"ema/{name}" if f"ema/{name}" in layout else f"model/{name}" for name in names]
    tensors = (engine.whole(source) for sources in files.values() for source in sources)
    try:
        if writes:
            _save_final(run, list(files), {name: layout[f"model/{name}"] for name in names}, tensors)
    except OSError as error:
        problem = f"the trained weights can't be written to {run.final} ({error})"
        raise RunFailed(f"{problem}; fix that and run the same command again") from error
    finally:
        for _ in tensors:  # gathering is collective, so every rank must iterate to the end
            pass


def _save_final(run: RunDir, files: list[str], layout: Layout, tensors: Iterator[Tensor]) -> None:
    """Write all files to a temporary folder, then rename each. ``final/`` itself may be a folder, a link or a mount."""
    for left in (run.path / ".final.tmp", run.path / ".final.old"):  # from earlier versions
        left.unlink() if left.is_symlink() else shutil.rmtree(left, ignore_errors=True)
    folder = Path(os.path.realpath(run.final))
    if made := not folder.is_dir():
        folder.mkdir()
    aside = folder / ASIDE
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        for file in files:
            write_whole(aside / file, layout, islice(tensors, len(layout)))
        sync(aside)
        for file in files:
            if (run.final / file).is_symlink():
                say(f"warning: {run.final / file} was a link to {os.readlink(run.final / file)} and is a file now")
            (aside / file).replace(run.final / file)
        for stale in {WEIGHTS, AVERAGED}.difference(files):
            (run.final / stale).unlink(missing_ok=True)
        sync(run.final)
        sync(run.path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if made:
            with suppress(OSError):  # not empty
                folder.rmdir()


def initialise(model: nn.Module, source: str, world: World) -> str:
    """Set the weights and buffers of ``model`` from ``source``, on all ranks. Return the path that was read.

    Only rank 0 reads. All names and shapes must match the model's. One name is enough for tensors that share memory.
    Values are converted between floating-point dtypes only.

    Args:
        source: the value of ``init_from``: a run directory (its ``final/`` if it is finished, else its newest good
            checkpoint), a checkpoint, or a safetensors file.

    Raises:
        UserError: there are no weights, they are damaged, or they don't fit the model; raised on all ranks.
    """

    def load() -> str:
        found = find(source)
        _fill(model, _open(found), f"init_from={source}")
        return str(found)

    return _by_rank_0(model, world, load)


def load_average(model: nn.Module, found: str, world: World) -> bool:
    """Set ``model`` to the average saved with the weights that ``initialise`` found. Return whether there was one."""

    def load() -> str:
        averaged = _open_average(Path(found))
        if averaged:
            _fill(model, averaged, f"the average of init_from={found}")
        return found if averaged else ""

    return bool(_by_rank_0(model, world, load))


def find(source: str) -> Path:
    """Return the safetensors file or verified checkpoint for ``source``. Raises UserError if there is no good one."""
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".safetensors":
        return path
    run = RunDir(path)
    if (file := path / WEIGHTS).is_file():
        return file
    if (file := run.final / WEIGHTS).is_file():
        outcome = run.outcome()
        if not outcome or outcome.state == "finished" or not checkpoints(run):  # else a checkpoint is newer
            return file
    # source may be the link checkpoints/best
    candidates = [followed(path)] if (path / NAME).exists() else checkpoints(run)
    damaged = []
    for folder in candidates:
        try:
            checkpoint = read(folder)
            verify(checkpoint, checkpoint.files)
            return folder
        except Damaged as error:
            damaged.append(f"{folder.name}: {error}")
    if damaged:
        raise UserError(f"init_from={source} has no good weights: {listed(damaged, '; ')}", "", "init_from", source)
    problem = "isn't a .safetensors file" if path.is_file() else "has no weights" if path.exists() else "doesn't exist"
    fix = "give a run directory, a checkpoint, or a .safetensors file"
    raise UserError(f"init_from={source} {problem}", fix, "init_from", source)


class _Weights(NamedTuple):
    """Tensors in files: the dtype (None if torch doesn't have it) and shape of each, and a function that reads one."""

    kinds: dict[str, tuple[torch.dtype | None, tuple[int, ...]]]
    read: Callable[[str], Tensor]


def _open(path: Path) -> _Weights:
    """Open a path that ``find`` returned."""
    return _of_checkpoint(read(path), "model/", f"{EVAL}/") if path.is_dir() else _of_file(path)


def _open_average(path: Path) -> _Weights | None:
    """Open the average and the buffers that belong to a path that ``find`` returned; None without an average."""
    if path.is_dir():
        checkpoint = read(path)
        averaged = any(name.startswith("ema/") for name in checkpoint.tensors)
        return _of_checkpoint(checkpoint, "model/", "ema/") if averaged else None
    beside = path.with_name(AVERAGED)
    return _of_file(beside) if path.name == WEIGHTS and beside.is_file() else None


def _of_file(path: Path) -> _Weights:
    try:
        file = safe_open(path, framework="pt")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except (OSError, SafetensorError) as error:
        problem = f"init_from={path} can't be read as safetensors: {error}"
        raise UserError(problem, "", "init_from", str(path)) from None
    kinds = {name: (DTYPES.get(piece.get_dtype()), tuple(piece.get_shape())) for name, piece in slices.items()}
    return _Weights(kinds, file.get_tensor)


def _of_checkpoint(checkpoint: Checkpoint, *prefixes: str) -> _Weights:
    """Return the tensors whose names start with one of ``prefixes``. A later prefix overrides an earlier one."""
    reader, stored = Reader(checkpoint), checkpoint.tensors
    names = {name.removeprefix(prefix): name for prefix in prefixes for name in stored if name.startswith(prefix)}
    kinds = {name: (DTYPES.get(stored[full].dtype), stored[full].shape) for name, full in names.items()}
    return _Weights(kinds, lambda name: reader.whole(names[name]))


def _fill(model: nn.Module, weights: _Weights, source: str) -> None:
    """Set the model's tensors to ``weights``. Raises UserError with a list of the tensors that don't fit."""
    groups, kinds = tied(model), weights.kinds
    tensors = {name: tensor for group in groups for name, tensor in group.items()}
    both = [name for name in tensors if name in kinds]
    shaped = [name for name in both if kinds[name][1] != tensors[name].shape]
    other = [name for name in both if name not in shaped and not _convertible(kinds[name][0], tensors[name].dtype)]
    misfits = {
        "lacks": ["/".join(group) for group in groups if not group.keys() & kinds.keys()],
        "has unexpected tensors:": [name for name in kinds if name not in tensors],
        "has other shapes:": [f"{name} {list(kinds[name][1])}, not {list(tensors[name].shape)}" for name in shaped],
        "has other dtypes:": [f"{name} {kinds[name][0]}, not {tensors[name].dtype}" for name in other],
    }
    if not any(misfits.values()):
        untied = ["/".join(group) for group in groups if not _set(group, weights)]
        misfits = {"has different values for shared tensors:": untied}
    if problem := "; ".join(f"it {has} {listed(names)}" for has, names in misfits.items() if names):
        fix = "init_from loads only weights: give the same task, task.args and model as when they were saved"
        raise UserError(f"{source} doesn't fit the model: {problem}", fix, "init_from")


def _set(group: dict[str, Tensor], weights: _Weights) -> bool:
    """Set tensors that share their memory. Return False if ``weights`` has different values for them."""
    first, *others = [name for name in group if name in weights.kinds]
    group[first].copy_(weights.read(first))
    return all(torch.equal(group[name], weights.read(name).to(group[name])) for name in others)


def _convertible(source: torch.dtype | None, target: torch.dtype) -> bool:
    return source == target or (source is not None and source.is_floating_point and target.is_floating_point)


def _by_rank_0(model: nn.Module, world: World, load: Callable[[], str]) -> str:
    """Call ``load`` on rank 0 and copy its model's weights to the other ranks. Return the result of ``load``."""
    error, done = None, ""
    if world.rank == 0:
        try:
            done = load()
        except (UserError, Damaged, OSError) as caught:
            error = caught if isinstance(caught, UserError) else UserError(str(caught))
    raise_on_all(world, error)
    done = world.agree(done)
    if done and world.size > 1:
        for group in tied(model):
            world.share(next(iter(group.values())))
    return done


def listed(names: list[str], separator: str = ", ") -> str:
    """Join the first names, and append how many more there are."""
    more = f"{separator}and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return separator.join(names[:SHOWN]) + more
