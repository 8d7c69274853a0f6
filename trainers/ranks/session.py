"""Describe one start of the command, and check that all ranks were started alike. Torch-free."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from isobatch.scaling.errors import UserError

if TYPE_CHECKING:
    from isobatch.conf.schema import RunConfig
    from isobatch.trainers.ranks.signals import Stop
    from isobatch.trainers.ranks.watch import Watch
    from isobatch.trainers.ranks.world import World


@dataclass(frozen=True, slots=True)
class Start:
    """Describe one start of the command, the same on all ranks.

    Attributes:
        attempt: id of this start.
        commit: commit of Isobatch; ``repository``: commit and state of the user's repository.
        run_dir: the run directory; empty if nothing is trained.
        extends: a finished run is extended to a longer duration.
        job: the scheduler's job id; empty without a scheduler. ``job_restart``: how often the job was restarted.
        hosts: names of all machines, if a scheduler provides them; ``host``: the name of this machine.
        kill_wait_s: seconds from the scheduler's notice to its kill.
        launches: attempt ids of all machines, if the command was started on each of them.
        per_gpu_limit: upper bound on the samples in a pass, set after memory ran out.
    """

    attempt: str
    command: str = ""
    commit: str = ""
    repository: dict[str, Any] | None = None
    run_dir: str = ""
    extends: bool = False
    job: str = ""
    job_restart: int = 0
    hosts: tuple[str, ...] = ()
    host: str = ""
    kill_wait_s: float | None = None
    launches: tuple[str, ...] = ()
    per_gpu_limit: int | None = None

    @property
    def code(self) -> dict[str, Any]:
        return {"commit": self.commit, "repository": self.repository}


@dataclass(frozen=True, slots=True)
class Session:
    """Hold the config, the start, the ranks and the watchers of one worker."""

    config: RunConfig
    start: Start
    world: World
    stop: Stop
    watch: Watch


def raise_on_all(world: World, error: UserError | None) -> None:
    """Raise the first rank's ``error`` on all ranks, with its problem, fix, key and value; None: this rank has none."""
    for text in world.gather(json.dumps(error.args if error else None, default=str)):
        if fields := json.loads(text):
            raise UserError(*fields) from error


def refuse_unless_same(world: World, name: str, number: int) -> None:
    """Raise UserError on all ranks if ``number`` differs between them."""
    found = world.gather(str(number))
    if len(set(found)) > 1:
        numbers = ", ".join(f"{number} on rank {rank}" for rank, number in enumerate(found))
        raise UserError(f"{name} differs between ranks: {numbers}", "open the whole dataset on every rank")


def refuse_other_source(files: dict[str, str], world: World) -> None:
    """Raise UserError on all ranks if an imported source file (path → hash) differs from rank 0's copy."""
    rank_0 = json.loads(world.agree(json.dumps(files)))
    changed = ", ".join(sorted(path for path in files.keys() & rank_0.keys() if files[path] != rank_0[path]))
    error = UserError(f"{changed} on rank {world.rank} differs from rank 0", "use the same code on every machine")
    raise_on_all(world, error if changed else None)


def refuse_other_commands(config: RunConfig, world: World) -> None:
    """Raise UserError on all ranks if a rank was started with another configuration than rank 0.

    ``task.local`` and ``data.local`` may differ, since paths and caches belong to a machine.
    """
    left_out = {"cluster": True, "run": True, "given": True, "task": {"local"}, "data": {"local"}}
    plain = config.model_dump(mode="json", by_alias=True, exclude=left_out)  # type: ignore[arg-type]
    sections = {name: section if isinstance(section, dict) else {"": section} for name, section in plain.items()}
    own = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
    rank_0 = json.loads(world.agree(json.dumps(own)))
    changed = [key for key in sorted(own | rank_0) if own.get(key) != rank_0.get(key)]
    text = ", ".join(f"{key.rstrip('.')}={own.get(key)} (rank 0: {rank_0.get(key)})" for key in changed)
    error = UserError(f"rank {world.rank} was started with {text}", "run the same command on every machine")
    raise_on_all(world, error if changed else None)


def stop_signal(stop: Stop, world: World) -> str:
    """Return the signal that asked any rank to stop, the same on all ranks; empty if there was none."""
    return next(filter(None, world.gather(stop.wanted or "")), "")
