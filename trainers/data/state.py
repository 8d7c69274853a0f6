"""All that a run is between two steps."""

from __future__ import annotations

from dataclasses import dataclass

from isobatch.scaling.noise import Smoothed
from isobatch.scaling.plan import Plan, Step
from isobatch.trainers.ranks.failure import Reached


@dataclass(slots=True)
class TrainState:
    """The plan in force, and how far it has come.

    Attributes:
        samples: samples seen: the whole position in the data, on any hardware.
        steps: optimizer steps completed.
        skipped: how many of them changed no weights, as loss or gradient wasn't finite.
        evaluation_owed: an evaluation is due at this position and wasn't done yet.
        noise: what is known of the gradient noise scale; None: it isn't measured.
    """

    plan: Plan
    samples: int = 0
    steps: int = 0
    skipped: int = 0
    evaluation_owed: bool = False
    noise: Smoothed | None = None

    def advance(self, step: Step, *, skipped: bool) -> None:
        """Move past ``step``, which changed no weights where it was ``skipped``."""
        self.samples, self.steps = step.stop, step.index + 1
        self.skipped += skipped

    def epochs(self, samples: int) -> float:
        """``samples`` as passes over the data."""
        assert self.plan.train_samples
        return samples / self.plan.train_samples

    @property
    def reached(self) -> Reached:
        """Return how far the run has come, and the samples of the largest pass there."""
        per_gpu = self.plan.stage_at(self.samples).cut.micro_batches[0][0]
        return Reached(self.steps, self.samples, per_gpu, self.plan.granule, fixed=self.plan.numerics == "bitwise")
