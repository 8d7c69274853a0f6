"""All that a run is between two steps."""

from __future__ import annotations

from dataclasses import dataclass

from scaling.plan import Plan


@dataclass(slots=True)
class TrainState:
    """The plan in force, and how far it has come.

    Attributes:
        samples: samples seen: the whole position in the data, on any hardware.
        steps: optimizer steps completed.
    """

    plan: Plan
    samples: int = 0
    steps: int = 0

    def epochs(self, samples: int) -> float:
        """``samples`` as passes over the data."""
        assert self.plan.train_samples
        return samples / self.plan.train_samples
