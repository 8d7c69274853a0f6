"""Take one optimizer step, pass by pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from isobatch.scaling.plan import Step
from isobatch.trainers.data.loader import Loader
from isobatch.trainers.engines.engine import Engine, Update
from isobatch.trainers.engines.step_report import Note, Total
from isobatch.trainers.loop.monitor import Wishes
from isobatch.trainers.model.randomness import Stream
from isobatch.trainers.ranks.watch import Watch


@dataclass(frozen=True, slots=True)
class Stepper:
    """Take optimizer steps of a run.

    Attributes:
        clip_norm: of the gradient; None: it isn't clipped.
    """

    engine: Engine
    loader: Loader
    stream: Stream
    watch: Watch
    clip_norm: float | None

    def take(self, step: Step, wishes: Callable[[], Wishes], *, measure: bool) -> tuple[Total, Update]:
        """Run all passes of ``step``, then update the weights.

        Args:
            wishes: of this rank, asked as late as they can still ride along with the gradients.
            measure: measure the gradient noise.

        Raises:
            UserError: the task's loss isn't (sum, units).
        """
        engine = self.engine
        for micro in self.loader(step):
            self.watch.beat()
            self.stream.start(micro.start, micro.stop)
            with engine.micro(step.cut, last=micro.last):
                loss, units = engine.loss(micro.batch, micro.samples)
                self.stream.stop()
                wanted = wishes() if micro.last else Wishes()
                note = Note(loss, units, micro.expected_units, wanted.stop, wanted.save)
                engine.backward(loss / step.expected_units, note, micro.samples if measure else None)
        total = engine.total(step.expected_units)
        return total, engine.update(total.scale(step.expected_units), self.clip_norm, step.recipe)
