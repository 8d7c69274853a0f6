"""Resume a run from its newest good checkpoint, on any hardware."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from isobatch.conf.existing import lengthened
from isobatch.conf.identity import identity
from isobatch.conf.rundir.directory import RunDir
from isobatch.conf.rundir.reading import events
from isobatch.scaling.errors import UserError
from isobatch.scaling.noise import Smoothed
from isobatch.scaling.plan import Plan
from isobatch.scaling.planning.resolve import continued
from isobatch.scaling.tally import Interval, Tally
from isobatch.scaling.tuning.controllers import first_memory
from isobatch.trainers.checkpoints.commit import clear_leftovers, link_best
from isobatch.trainers.checkpoints.weights import listed
from isobatch.trainers.data.state import TrainState
from isobatch.trainers.engines.engine import Engine
from isobatch.trainers.optim.groups import Groups, are_groups
from isobatch.trainers.optim.state_io import GROUPS, MORE, misfit
from isobatch.trainers.ranks.world import World
from isobatch.trainers.tensors.manifest import Checkpoint, Damaged, Header, Stored, read, verify
from isobatch.trainers.tensors.names import checkpoints
from isobatch.trainers.tensors.slices import DTYPES, EVAL, Layout, Reader

if TYPE_CHECKING:
    from isobatch.conf.schema import RunConfig

ANOTHER_RUN = "start another run with run.new=true (init_from=… starts it from these weights)"


def resume(
    run: RunDir,
    config: RunConfig,
    world: World,
    engine: Engine,
    fresh: Plan,
    fingerprint: str | None,
    warn: Callable[[str], None],
    beat: Callable[[], None],
) -> tuple[TrainState, Checkpoint | None]:
    """Restore the newest good checkpoint into the engine. Without any checkpoint, return the state of step 0.

    Args:
        fresh: the plan of the current command on the current hardware.
        fingerprint: fingerprint of the data; None to skip the comparison.
        warn: called with a warning for each checkpoint that is skipped.
        beat: called for every few MB that are read.

    Raises:
        UserError: there are checkpoints, but no good one; or the data has changed.
    """
    found = newest_good(run, config, world, engine, warn, beat)
    if found is None:
        return first_state(fresh), None
    header = found.header
    _refuse_other_data(found, fresh, fingerprint)
    plan = continued(fresh, header.plan, extends=header.identity != identity(config))
    try:
        engine.restore(Reader(found, beat))
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # not damaged, since its checksums match
        if isinstance(error, UserError):
            raise
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{found.path} doesn't fit the optimizer ({text:.200})", "was the task changed?") from error
    start = first_state(plan)
    start.samples, start.steps, start.skipped = header.samples, header.step, header.skipped
    start.evaluation_owed = header.evaluation_owed
    start.noise = start.noise and (header.noise or start.noise)
    if start.control and header.control:
        start.control = header.control
    start.tally = header.tally or start.tally
    return start, found


def first_state(plan: Plan) -> TrainState:
    """Return the state of a run at step 0."""
    measured = plan.noise[0] is not None
    state = TrainState(plan, noise=Smoothed() if measured else None)
    if plan.control:
        state.control, state.tally = first_memory(plan.cut.global_size), Tally(controlled=Interval())
    return state


def header_of(
    config: RunConfig, fingerprint: str | None, state: TrainState, evaluation: Mapping[str, float | None] | None
) -> Header:
    """Return the header of a checkpoint of ``state``. ``evaluation`` holds the values of an evaluation at this step."""
    return Header(
        identity=state.plan.identity, duration=str(config.duration), world_size=state.plan.world, step=state.steps,
        samples=state.samples, skipped=state.skipped, evaluation_owed=state.evaluation_owed, fingerprint=fingerprint,
        evaluation=None if evaluation is None else dict(evaluation), plan=state.plan, noise=state.noise,
        control=state.control, tally=state.tally, kept=state.plan.keeps(state.samples),
    )  # fmt: skip


def newest_good(
    run: RunDir, config: RunConfig, world: World, engine: Engine, warn: Callable[[str], None], beat: Callable[[], None]
) -> Checkpoint | None:
    """Return the newest good checkpoint, the same on all ranks. Raises UserError if none of them is good."""
    if world.rank == 0:
        clear_leftovers(run)
    names, saved = json.loads(world.agree(json.dumps(([path.name for path in checkpoints(run)], last_saved(run)))))
    if saved and not names:
        problem = f"{run.checkpoints} has no checkpoint, but step {saved} was saved there"
        raise UserError(problem, "restore it, or start another run with run.new=true")
    groups = engine.values()[GROUPS] if names else []
    skipped = []
    for name in names:
        reason, checkpoint = "", None
        try:
            checkpoint = read(run.checkpoints / name)
            refuse_misfit(checkpoint, config, engine, groups)
            verify(checkpoint, sorted(checkpoint.files)[world.rank :: world.size], beat)
        except (Damaged, OSError) as error:
            reason = str(error)
        if not (reasons := [text for text in world.gather(reason) if text]):
            return checkpoint
        skipped.append(f"{name}: {reasons[0]}")
        warn(f"checkpoint {name} is skipped: {reasons[0]}")
    if skipped:
        problem = f"no checkpoint in {run.checkpoints} is good ({listed(skipped, '; ')}); all of them were kept"
        fix = "repair one, restore the model that they were saved from, or start another run with run.new=true"
        raise UserError(problem, fix)
    return None


def stored_groups(run: RunDir, world: World) -> Groups:
    """Return the optimizer's groups from the newest readable checkpoint, the same on all ranks."""
    found: Any = None
    for path in checkpoints(run) if world.rank == 0 else []:
        with suppress(Damaged, OSError):
            found = read(path).values.get(GROUPS)
            break
    agreed = json.loads(world.agree(json.dumps(found)))
    return agreed if are_groups(agreed) else ()


def last_saved(run: RunDir) -> int:
    """Return the last step that must have a checkpoint, since the run stopped, finished or resumed there; 0 if none."""
    saved = [event for event in events(run.path) if event.get("event") in ("stopped", "finished", "going_on")]
    return next((event["step"] for event in reversed(saved) if "step" in event), 0)


def find_best(run: RunDir, best: str | None, world: World) -> float | None:
    """Return the best value so far that a checkpoint has for ``checkpoint.best``, the same on all ranks.

    Also link ``checkpoints/best`` to that checkpoint, since the previous best may have been passed over.
    """
    if best is None:
        return None
    name, _, direction = best.rpartition(":")
    known: list[tuple[float, Path]] = []
    for path in checkpoints(run) if world.rank == 0 else []:
        with suppress(Damaged, OSError):
            if (value := (read(path).header.evaluation or {}).get(name)) is not None:
                known.append((value, path))
    found = (max(known) if direction == "max" else min(known)) if known else None
    if found:
        link_best(run, found[1])
    agreed: float | None = json.loads(world.agree(json.dumps(found and found[0])))
    return agreed


def refuse_misfit(
    checkpoint: Checkpoint, config: RunConfig, engine: Engine, groups: Sequence[Mapping[str, Any]]
) -> None:
    """Raise Damaged if a checkpoint belongs to another run, or doesn't fit the model or the optimizer's ``groups``."""
    header, current = checkpoint.header, identity(config)
    if header.identity != current and not lengthened(config, header.identity, header.duration):
        raise Damaged(f"it belongs to another run ({header.identity}, duration={header.duration}, not {current})")
    if header.plan.seed != config.seed:
        raise Damaged(f"its plan has seed={header.plan.seed}, but the run has {config.seed}")
    refuse_other_tensors(checkpoint, engine, groups, own=config.optimizer.name == "custom")


def refuse_other_tensors(
    checkpoint: Checkpoint, engine: Engine, groups: Sequence[Mapping[str, Any]], *, own: bool
) -> None:
    """Raise Damaged if a checkpoint's tensors don't fit the model or the optimizer's ``groups``.

    Args:
        own: the optimizer is the user's own, so the shapes of its state aren't known.
    """
    layout, stored = engine.layout(), checkpoint.tensors
    for name, (dtype, shape) in layout.items():
        if name not in stored:
            raise Damaged(f"it lacks {name}, which the model has")
        saved_kind = DTYPES[stored[name].dtype], stored[name].shape
        if saved_kind != (dtype, shape):
            raise Damaged(f"{name} is {_kind(*saved_kind)}, but {_kind(dtype, shape)} in the model")
    left = {name for name in stored.keys() - layout.keys() if not _is_version(name, stored, layout)}
    for name in (*left, *(checkpoint.values.keys() - {GROUPS, MORE})):
        kind, _, rest = name.partition("/")
        parameter = layout.get(f"model/{rest.rpartition('/')[0]}")
        if kind != "optim" or parameter is None:
            raise Damaged(f"{name!r:.100} isn't part of the model or its optimizer")
        if not own and name in stored and not _broadcasts(stored[name].shape, parameter[1]):
            raise Damaged(f"{name} has shape {list(stored[name].shape)}, but its parameter has {list(parameter[1])}")
    if problem := misfit(checkpoint.values, groups, own=own):
        raise Damaged(problem)


def _is_version(name: str, stored: Mapping[str, Stored], layout: Layout) -> bool:
    """Return whether a tensor is another version of one of the model's parameters.

    That is the average of a frozen parameter, as in older checkpoints, or the weights of an optimizer's ``eval()``.
    """
    kind, _, parameter = name.partition("/")
    averaged = kind == "ema" and any(other.startswith("ema/") for other in layout)
    own = layout.get(f"model/{parameter}")
    return own is not None and (averaged or kind == EVAL) and stored[name].shape == own[1]


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Return whether ``shape`` is () or broadcasts to ``to`` dimension by dimension, such as Adafactor's state."""
    return shape == () or (len(shape) == len(to) and all(a in (1, b) for a, b in zip(shape, to, strict=True)))


def _kind(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def _refuse_other_data(found: Checkpoint, fresh: Plan, fingerprint: str | None) -> None:
    before, saved = found.header, f"when {found.path.name} was saved"
    if before.plan.train_samples != fresh.train_samples:
        old = f"{before.plan.train_samples} {saved}, which changes their order"
        problem = f"the training data has {fresh.train_samples} samples, but had {old}"
        raise UserError(problem, f"restore the old data, or {ANOTHER_RUN}")
    if fingerprint and before.fingerprint and fingerprint != before.fingerprint:
        old = f"{before.fingerprint} {saved}"
        problem = f"the training data has changed: its fingerprint is {fingerprint}, but was {old}"
        fix = f"restore the old data, {ANOTHER_RUN}, or resume anyway with data.fingerprint=false"
        raise UserError(problem, fix, "data.fingerprint", True)
