"""What one start of the command knows, what each of its workers has, and what ranks agree on. Torch-free."""

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
        commit: of Isobatch; ``repository``: commit and state of the user's.
        run_dir: empty where nothing is trained.
        extends: a finished run continues to a longer duration.
        job: of a scheduler, empty outside of one; ``job_restart``: how often that was restarted.
        hosts: names of all machines, where a scheduler knows them; ``host``: this one's.
        kill_wait_s: seconds from the scheduler's notice to its kill.
        launches: the attempts of all machines, each of which was given the command.
        per_gpu_limit: the most samples in a pass since memory ran out.
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
    """Hold what each part of a worker's body needs."""

    config: RunConfig
    start: Start
    world: World
    stop: Stop
    watch: Watch


def refuse_unless_same(world: World, what: str, number: int) -> None:
    """Raise UserError, on all ranks, where ``number`` isn't the same on all of them."""
    found = world.gather(str(number))
    if len(set(found)) > 1:
        numbers = ", ".join(f"{number} on rank {rank}" for rank, number in enumerate(found))
        raise UserError(f"{what} differs between ranks: {numbers}", "every rank has to open the whole data")


def refuse_other_source(files: dict[str, str], world: World) -> None:
    """Raise UserError, on all ranks, where one imported a source file (path → hash) that isn't what rank 0 has."""
    theirs = json.loads(world.agree(json.dumps(files)))
    other = ", ".join(sorted(path for path in files.keys() & theirs.keys() if files[path] != theirs[path]))
    for rank, text in enumerate(world.gather(other)):
        if text:
            raise UserError(f"{text} on rank {rank} isn't what rank 0 has", "use the same code on every machine")


def refuse_other_commands(config: RunConfig, world: World) -> None:
    """Raise UserError, on all ranks, where one was started for another run than rank 0 was.

    ``task.local`` and ``data.local`` may differ: paths and caches are a machine's own.
    """
    left_out = {"cluster": True, "run": True, "given": True, "task": {"local"}, "data": {"local"}}
    plain = config.model_dump(mode="json", by_alias=True, exclude=left_out)  # type: ignore[arg-type]
    sections = {name: section if isinstance(section, dict) else {"": section} for name, section in plain.items()}
    mine = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
    theirs = json.loads(world.agree(json.dumps(mine)))
    other = [key for key in sorted(mine | theirs) if mine.get(key) != theirs.get(key)]
    named = ", ".join(f"{key.rstrip('.')}={mine.get(key)} (rank 0: {theirs.get(key)})" for key in other)
    for rank, text in enumerate(world.gather(named)):
        if text:
            raise UserError(f"rank {rank} was started with {text}", "give the same command on every machine")


def stop_wish(stop: Stop, world: World) -> str:
    """Return the signal by which some rank was asked to stop, the same on all ranks; empty where none was."""
    return next(filter(None, world.gather(stop.wanted or "")), "")
