"""Check and log each step of a run: end the run if it can't train on, and log the steps that are due."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from isobatch.scaling.errors import UserError
from isobatch.scaling.noise import Estimate, Norm
from isobatch.scaling.plan import Step, crossed
from isobatch.trainers.data.state import TrainState
from isobatch.trainers.engines.step_report import Requests, Total, Update
from isobatch.trainers.loop.control import BatchControl
from isobatch.trainers.loop.hardware import Hardware
from isobatch.trainers.loop.metrics import Metrics
from isobatch.trainers.loop.readback import DelayedReadback, StepResult
from isobatch.trainers.ranks.failure import RunFailed
from isobatch.trainers.ranks.signals import Stop

if TYPE_CHECKING:
    from isobatch.conf.schema import RunConfig

UNITS_OFF = 0.05  # relative difference allowed between the units of the first step and the task's YAML
SKIPS_IN_A_ROW = 20  # steps that weren't finite, after which the run fails


class Monitor:
    """Check and log each step of a run; ask for a ``stop`` after a failed save if the config says so.

    Attributes:
        after_a_step: called once, when this attempt has taken a step.
    """

    def __init__(
        self,
        config: RunConfig,
        state: TrainState,
        metrics: Metrics,
        readback: DelayedReadback,
        hardware: Hardware,
        stop: Stop,
        control: BatchControl,
    ) -> None:
        # in fp16 the engine skips steps, and fails if the loss scale can't be lowered
        self._skip_nonfinite = config.on_nonfinite == "skip" or config.precision == "fp16"
        self._state, self.metrics, self._readback, self._hardware, self.stop = state, metrics, readback, hardware, stop
        self._control = control
        self.must_save = config.checkpoint.on_error == "stop"
        self._skips = 0  # in a row
        self._norm: Norm | None = None  # of the gradient noise, as reported
        self._overflowed = False  # an estimate of the gradient noise, as reported
        self._unlogged: StepResult | None = None  # the last step, unless it was logged
        self._since = time.perf_counter()
        self.after_a_step: Callable[[], None] | None = None

    @property
    def time_s(self) -> float:
        """Return the seconds of training until now, over all attempts."""
        return self._state.tally.time_s + time.perf_counter() - self._since

    def exclude(self, seconds: float) -> None:
        """Don't count the last ``seconds`` as time of training."""
        self._since += seconds

    def record(self, step: Step, total: Total, update: Update, *, flush: bool) -> Requests:
        """Handle the step results that have arrived from the device.

        Args:
            flush: wait for the result of this step. It is also waited for if any rank asks for anything.

        Returns:
            What any rank asks for.

        Raises:
            RunFailed: the loss or the gradient isn't finite, or many steps in a row were skipped.
            UserError: a whole step had no units.
        """
        self._skips = self._skips + 1 if update.skipped else 0
        results = [self._readback.read(step, total, update)]
        if flush or any(result and any(result.requests) for result in results):
            results.append(self._readback.flush())
        arrived = [result for result in results if result]
        if arrived and self.after_a_step:
            self.after_a_step()
            self.after_a_step = None
        for result in arrived:
            self.handle_step_result(result)
        if self._skips == SKIPS_IN_A_ROW or (step.index + 1 == self._state.plan.steps == self._state.skipped):
            finite = f"none of the last {self._skips} steps was finite"
            raise RunFailed(f"{finite}, so all of them were skipped; lower the learning rate, or give clip_norm=1")
        return (
            Requests(*map(any, zip(*(result.requests for result in arrived), strict=True))) if arrived else Requests()
        )

    def handle_step_result(self, result: StepResult) -> None:
        """Raise if the step can't be trained on; update the noise scale; log the step if it is due."""
        step, state = result.step, self._state
        name = f"step {step.index + 1} (samples {step.start} to {step.stop - 1} of the run)"
        if result.units <= 0:
            problem = f"{name} has {result.units:g} units in its global batch"
            raise UserError(problem, "return a positive number of units from task.loss")
        if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
            found = f"{name} isn't finite: loss {result.loss}, gradient norm {result.grad_norm}"
            if not self._skip_nonfinite:
                self.metrics.failed(result)
                fixes = "lower the learning rate, give clip_norm=1, or check the loss and its inputs"
                raise RunFailed(f"{found}; {fixes} (on_nonfinite=skip skips such steps)")
            fields = {"step": step.index + 1, "samples": step.stop, "skipped": state.skipped}
            self.metrics.event("skip", f"{found}; skipped", **fields)
        self._count(result)
        estimated = result.estimate is not None and self._estimated(result.estimate, result.norm)
        stated, units = state.plan.units_per_sample, result.units / (step.stop - step.start)
        if step.index == 0 and stated and abs(units / stated - 1) > UNITS_OFF:
            self.metrics.warn(f"task.units_per_sample={stated}, but the first step has {units:g} units per sample")
        measured = estimated or not (state.plan.control and state.plan.control.by_noise)
        controlled = self._control.measured(step) if measured and self._control.due(step) else {}
        due = step.index in (0, (state.plan.steps or 0) - 1) or crossed(state.plan.intervals.log, step.start, step.stop)
        if due or controlled:
            self.metrics.step(result, self._hardware.values(state.tally) | controlled)
            state.tally, self._unlogged = state.tally.logged(), None
        else:
            self._unlogged = result

    def _estimated(self, estimate: Estimate, norm: Norm) -> bool:
        """Add an estimate to the averages, and report once in which norm halves are measured; False if it overflows."""
        state = self._state
        if state.noise is None:
            return False
        if state.plan.train_samples:
            estimate = estimate.of_data(state.plan.train_samples)
        try:
            state.noise = state.noise.updated(estimate, norm.name)
        except ValueError:
            if not self._overflowed:
                self._overflowed = True
                at = f"at sample {state.samples:,}, and later ones like it"
                self.metrics.warn(f"the squares of the gradients overflow, so the gradient noise isn't measured {at}")
            return False
        if state.plan.noise[1] and norm != self._norm:
            self._norm = norm
            self.metrics.note(
                "noise", f"the gradient noise is measured from two halves of a step, {norm.text}", norm=norm.name
            )
        return True

    def log_early_end(self) -> None:
        """Log the last step of a run that ends early, if it wasn't due.

        The interval isn't reset, so if the run continues later, this line is dropped, and those that follow are the
        lines of a run that never ended.
        """
        if self._unlogged:
            self.metrics.step(self._unlogged, self._hardware.values(self._state.tally))

    def _count(self, result: StepResult) -> None:
        """Add a step to the tally."""
        step, now = result.step, time.perf_counter()
        finite = math.isfinite(result.loss) and math.isfinite(result.grad_norm)
        loss = result.loss * result.units if finite else math.nan
        seconds, waited_s = max(0.0, now - self._since), result.waited_s / step.cut.world
        self._since = now
        tally = self._state.tally
        self._state.tally = tally.after(step.stop - step.start, result.units, loss, result.measures, seconds, waited_s)

    def report_unsaved(self, failure: str) -> None:
        """Warn that a checkpoint couldn't be saved, and ask for a stop if the config says so."""
        text = f"a checkpoint couldn't be saved: {failure}"
        self.metrics.warn(text)
        if self.must_save:
            self.stop.wanted = self.stop.wanted or f"checkpoint.on_error=stop, and {text}"
