"""End a run before its duration is over, by ``stop.when``, ``stop.at`` and ``stop.after``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from isobatch.scaling.stopping import rules_of
from isobatch.trainers.checkpoints.best import missing_value
from isobatch.trainers.ranks.world import World

if TYPE_CHECKING:
    from isobatch.conf.schema import RunConfig


class EarlyStop:
    """Decide, on all ranks alike, whether a run ends at an evaluation or at a time.

    Attributes:
        evaluations: the lines of ``metrics.jsonl`` so far that are evaluations; those of rank 0 count.
        cause: why the run ends early; empty while it doesn't.
        rules: the rules about evaluations.
    """

    def __init__(self, config: RunConfig, world: World) -> None:
        stop = config.stop
        self._world, self.evaluations = world, list[Mapping[str, Any]]()
        self._after_s = None if stop.after is None else stop.after.value * 60
        self._after, self._missing = stop.after, set[str]()
        self.cause = ""
        self.rules = rules_of(stop.when, stop.patience, stop.min_delta, stop.at)

    def late(self, time_s: float) -> bool:
        """Return, on rank 0, whether the training time is up."""
        return self._world.rank == 0 and self._after_s is not None and time_s >= self._after_s

    def time_is_up(self) -> None:
        """Record that the run ends because rank 0 said that the time is up."""
        self.cause = self.cause or f"stop.after={self._after}"

    def decide(self) -> bool:
        """Return, the same on all ranks, whether the run ends at its last evaluation; all ranks have to call this."""
        if self.rules:
            found = [cause for rule in self.rules if (cause := rule.cause(self.evaluations))]
            self.cause = self._world.agree(found[0] if found else "") or self.cause
        return bool(self.cause)

    def evaluated(self, values: Mapping[str, Any]) -> list[str]:
        """Add an evaluation. Return warnings about values that it lacks, each once."""
        self.evaluations.append(values)
        lacking = [rule for rule in self.rules if rule.name not in values and rule.key not in self._missing]
        self._missing.update(rule.key for rule in lacking)
        return [f"{rule.key}: {missing_value(rule.name, values)}" for rule in lacking]
