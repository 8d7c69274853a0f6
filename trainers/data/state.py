"""The state of a run between two steps."""

from __future__ import annotations

from dataclasses import dataclass, field

from isobatch.scaling.noise import Smoothed
from isobatch.scaling.plan import Plan, Step
from isobatch.scaling.tally import Tally
from isobatch.scaling.tuning.controllers import Memory
from isobatch.trainers.ranks.failure import Reached


@dataclass(slots=True)
class TrainState:
    """The plan in force, and the run's position in it.

    Attributes:
        samples: samples seen; the whole data position, independent of the hardware.
        steps: optimizer steps completed.
        skipped: number of completed steps that changed no weights, because loss or gradient wasn't finite.
        evaluation_owed: an evaluation is due at this position and isn't done yet.
        noise: the smoothed gradient noise; None if it isn't measured.
        control: what the controller of the batch remembers; None without one.
        tally: the sums that are logged, of the steps whose results have arrived.
    """

    plan: Plan
    samples: int = 0
    steps: int = 0
    skipped: int = 0
    evaluation_owed: bool = False
    noise: Smoothed | None = None
    control: Memory | None = None
    tally: Tally = field(default_factory=Tally)

    def advance(self, step: Step, *, skipped: bool) -> None:
        """Move past ``step``; ``skipped``: it changed no weights."""
        self.samples, self.steps = step.stop, step.index + 1
        self.skipped += skipped

    def epochs(self, samples: int) -> float:
        """Convert ``samples`` to epochs."""
        assert self.plan.train_samples
        return samples / self.plan.train_samples

    @property
    def reached(self) -> Reached:
        """Return the run's position, and the number of samples of the largest pass there."""
        per_gpu = self.plan.stage_at(self.samples).cut.micro_batches[0][0]
        return Reached(self.steps, self.samples, per_gpu, self.plan.granule, fixed=self.plan.numerics == "bitwise")
