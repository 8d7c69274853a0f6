"""Find the checkpoints of a run that a measurement can start from."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from isobatch.conf.compose import SAYS_WHAT_TO_TRAIN
from isobatch.conf.existing import run_of
from isobatch.conf.overrides import key_of
from isobatch.conf.rundir.directory import RunDir
from isobatch.scaling.errors import UserError
from isobatch.scaling.plan import Plan
from isobatch.scaling.planning.resolve import continued
from isobatch.trainers.tensors.manifest import NAME, Checkpoint, Damaged, read, verify
from isobatch.trainers.tensors.names import checkpoints, followed
from isobatch.trainers.tuning.bench import Bench

MOST = 3  # checkpoints of one run that a part starts from
TRAIN_FIRST = "train with checkpoint.keep_every=10%, then give init_from=RUN_DIRECTORY or one of its checkpoints"


def run_of_config(bench: Bench) -> Path | None:
    """Return the run of ``init_from`` if the command took its config from there, as it names no task of its own."""
    weights = bench.config.init_from
    named = any(key_of(word) in SAYS_WHAT_TO_TRAIN for word in shlex.split(bench.session.start.command))
    return None if named or not weights else run_of(Path(weights).expanduser())


def starts(bench: Bench) -> list[Checkpoint]:
    """Return the checkpoints of ``init_from``, or of the run directory, oldest first, the same on all ranks.

    Their files aren't verified, which takes long.

    Raises:
        UserError: the header of one of them is damaged.
    """
    config, world = bench.config, bench.session.world
    source = Path(config.init_from).expanduser() if config.init_from else bench.run
    names = [str(path) for path in _named(source)] if world.rank == 0 else []
    paths = [Path(name) for name in json.loads(world.agree(json.dumps(names)))]
    return [_of_all_ranks(bench, path, partial(read, path)) for path in paths]


def verified(bench: Bench, found: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Verify checkpoints, of which each rank reads a share of the files, and return them.

    Raises:
        UserError: on all ranks; one of them is damaged.
    """
    world = bench.session.world

    def work(start: Checkpoint) -> Checkpoint:
        verify(start, sorted(start.files)[world.rank :: world.size], bench.session.watch.beat)
        return start

    return [_of_all_ranks(bench, start.path, partial(work, start)) for start in found]


def spread(found: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Return at most ``MOST`` of the checkpoints, spread over the run: of the kept ones, if there are any."""
    kept = [start for start in found if start.header.kept] or list(found)
    count = min(MOST, len(kept))
    return [kept[(2 * i + 1) * len(kept) // (2 * count)] for i in range(count)]


class Unfit(NamedTuple):
    """Why a checkpoint is none to start from, and what helps."""

    reason: str
    fix: str


def unfit(bench: Bench, start: Checkpoint) -> Unfit | None:
    """Return why a checkpoint isn't of the run that is tuned, or is its start; None if nothing is wrong."""
    plan, opened = start.header.plan, bench.opened.plan
    own = f"give init_from a checkpoint of this run, or the overrides of that one (see {start.path.parent.parent})"
    if plan.task != opened.task:
        return Unfit(f"it is of task {plan.task}, and this run has {opened.task}", own)
    if plan.train_samples != opened.train_samples:
        return Unfit(f"its data had {plan.train_samples} samples, and has {opened.train_samples}", own)
    if plan.optimizer.name != opened.optimizer.name:
        trained = f"it was trained with optimizer={plan.optimizer.name}, not {opened.optimizer.name}"
        return Unfit(trained, f"give optimizer={plan.optimizer.name}, or a run trained with {opened.optimizer.name}")
    if not start.header.samples:
        return Unfit("it is the start of the run", "give a later checkpoint")
    return None


def plan_here(bench: Bench, start: Checkpoint) -> Plan:
    """Return a checkpoint's plan on this hardware, with the per-GPU batch of the run and its batches so far."""
    fresh = bench.opened.plan
    on_it = replace(fresh, per_gpu=fresh.cut.per_gpu, accumulation=None) if fresh.numerics == "fast" else fresh
    return continued(on_it, start.header.plan, extends=False).settled


def _named(source: Path) -> list[Path]:
    """Return the paths of the checkpoints at ``source``, a checkpoint or a run directory, oldest first."""
    return [followed(source)] if (source / NAME).exists() else checkpoints(RunDir(source))[::-1]


def _of_all_ranks(bench: Bench, path: Path, work: Callable[[], Checkpoint]) -> Checkpoint:
    """Return the checkpoint at ``path`` that ``work`` returns. Raises UserError on all ranks if one finds damage."""
    reason, found = "", None
    try:
        found = work()
    except (Damaged, OSError) as error:
        reason = str(error)
    if reasons := [text for text in bench.session.world.gather(reason) if text]:
        raise UserError(f"{path} is damaged: {reasons[0]}", "give another checkpoint as init_from", "init_from")
    assert found is not None
    return found
