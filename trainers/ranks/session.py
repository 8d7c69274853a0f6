"""What one start of the command knows, and what each of its workers has. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
        """Return ``commit`` of Isobatch and ``repository`` of the user, as they were when the command was given."""
        return {"commit": self.commit, "repository": self.repository}


@dataclass(frozen=True, slots=True)
class Session:
    """Hold what each part of a worker's body needs."""

    config: RunConfig
    start: Start
    world: World
    stop: Stop
    watch: Watch
