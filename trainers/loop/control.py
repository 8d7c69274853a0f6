"""Move the global batch of a run while it trains, by the controller of its plan."""

from __future__ import annotations

import json
import math
import zlib
from contextlib import suppress

from isobatch.conf.rundir.directory import RunDir
from isobatch.conf.rundir.files import write_atomic
from isobatch.scaling.control import Control, growth_at, multiplied
from isobatch.scaling.learned import belief
from isobatch.scaling.limits import LARGEST
from isobatch.scaling.plan import Step, crossed
from isobatch.scaling.planning.advice import after_control
from isobatch.scaling.report.plan_json import to_json
from isobatch.scaling.tally import Interval
from isobatch.scaling.tuning import controllers
from isobatch.scaling.tuning.controllers import Measurement, Memory
from isobatch.trainers.data.state import TrainState
from isobatch.trainers.loop.hardware import device_name
from isobatch.trainers.loop.metrics import Metrics
from isobatch.trainers.ranks.world import World


class BatchControl:
    """Decide about the batch after each measured step; rank 0 decides for all ranks.

    Without a controller in the plan it does nothing.
    """

    def __init__(self, state: TrainState, world: World, metrics: Metrics, run: RunDir | None) -> None:
        self._state, self._world, self._metrics, self._run = state, world, metrics, run
        self._warm = False  # the first interval of an attempt isn't timed

    def due(self, step: Step) -> bool:
        """Return whether the controller measures ``step``."""
        control = self._state.plan.control
        return control is not None and crossed(control.every, step.start, step.stop)

    def measured(self, step: Step) -> dict[str, float | None]:
        """Take a measurement, decide, and return the values for the step's line; all ranks call it after a due step.

        The state's averages and tally have to include the step.
        """
        state, control = self._state, self._state.plan.control
        assert control
        assert state.control
        start = step.stop + control.every
        seen, before = self._measurement(step, start), state.control
        assert state.plan.samples
        rest = state.plan.samples - state.plan.boundary(start)
        state.control = controllers.observed(control, before, seen, rest)
        state.tally, self._warm = state.tally.measured(), True
        scale = seen.noise_scale
        if scale is not None:
            scale = min(max(scale, 1 / LARGEST), float(LARGEST))
        decision = [state.control.size, scale] if state.control.size != before.size else None
        if agreed := json.loads(self._world.agree(json.dumps(decision))):  # other ranks' clocks may differ
            state.plan = state.plan.decide(start, *agreed)
            self._report(control, seen, before, state.control, start)
        return controllers.values(seen, state.control, rest)

    def finished(self) -> None:
        """Report, at the end of the run, whether a schedule can do as well."""
        if advice := after_control(self._state.plan):
            self._metrics.note("advice", advice)

    def _measurement(self, step: Step, start: int) -> Measurement:
        """Return the numbers of a measured step whose decision would take effect at ``start``."""
        plan, noise, since = self._state.plan, self._state.noise, self._state.tally.controlled or Interval()
        known = noise is not None and noise.count > 0 and plan.control is not None and plan.control.by_noise
        steps, rest = divmod(since.samples, step.cut.global_size)
        stage, began = plan.stage_at(step.start), step.stop - since.samples
        # the first steps of a stage wait for what is fetched or compiled anew
        timed = self._warm and rest == 0 and began > stage.start and since.seconds > 0
        loss = since.mean_loss
        return Measurement(
            samples=step.stop,
            global_size=step.cut.global_size,
            growth=growth_at(plan.segments, start),
            grad_sq=noise.grad_sq if noise and known else None,
            trace=noise.trace if noise and known else None,
            loss=loss if math.isfinite(loss) else None,
            step_s=since.seconds / steps if timed else None,
            hardware=self._hardware() if plan.control and plan.control.by_clock else None,
        )

    def _hardware(self) -> int:
        """Return a number for the hardware that steps are timed on, as dealt."""
        plan, device = self._state.plan, device_name(self._world.device)
        return zlib.crc32(f"{device} {plan.world} {plan.per_gpu} {plan.engine.name}".encode())

    def _report(self, control: Control, seen: Measurement, before: Memory, memory: Memory, start: int) -> None:
        """Record a decision as an event, and the plan with it."""
        plan, scale, size = self._state.plan, seen.noise_scale, memory.size
        whole = [multiplied(plan.segments, start, one, plan.granule) for one in (before.size, size)]
        was, now = (plan.size(min(one, control.limit or one)) for one in whole)
        critical = belief(memory.intervals, control.prior).critical if control.prior else None
        because = ["a trial", f"critical batch {plan.size(round(critical))}"] if critical else []
        if scale is not None:
            hidden = "noise hides the gradient"
            because.append(f"gradient noise scale {plan.size(round(scale))}" if scale < LARGEST else hidden)
        half = controllers.half_speed_in(control, memory)
        because += [f"half speed at {plan.size(round(half))}"] if half else []
        moves = f"moves from {was} to {now}"
        if was == now:
            moves = f"stays at its limit of {now}, and the LR follows a batch of {plan.size(size)},"
        begins = plan.stage_at(plan.boundary(start)).start
        text = f"control={control.name}: the global batch {moves} at sample {begins:,} ({', '.join(because)})"
        numbers = {
            "grad_sq": seen.grad_sq, "trace": seen.trace, "noise_scale": None if scale == math.inf else scale,
            "critical_batch": critical, "loss": seen.loss, "step_s": seen.step_s, "growth": seen.growth,
        }  # fmt: skip
        fields = {"controller": control.name, "before": before.size, "size": size, "start_sample": start}
        self._metrics.note("batch", text, **fields, measured_at=seen.samples, **numbers)
        if self._run:
            with suppress(OSError):  # it is written again at the next decision and at the next start
                write_atomic(self._run.path / "plan.json", to_json(plan) + "\n")
