"""The training loop. It doesn't depend on ranks, engines or batch sizes: the plan defines each step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from isobatch.conf.rundir.files import finite
from isobatch.scaling.plan import Step, crossed
from isobatch.trainers.checkpoints.saver import Saver
from isobatch.trainers.data.loader import Loader
from isobatch.trainers.data.state import TrainState
from isobatch.trainers.engines.engine import Engine
from isobatch.trainers.engines.step_report import Note, Requests, Total, Update
from isobatch.trainers.loop.early_stop import EarlyStop
from isobatch.trainers.loop.evaluate import Evaluator
from isobatch.trainers.loop.monitor import Monitor
from isobatch.trainers.model.randomness import Stream
from isobatch.trainers.ranks.failure import RunFailed
from isobatch.trainers.ranks.watch import Watch


@dataclass(frozen=True, slots=True)
class Stepper:
    """Take optimizer steps of a run.

    Attributes:
        clip_norm: the largest norm of the gradient; None doesn't clip.
    """

    engine: Engine
    loader: Loader
    stream: Stream
    watch: Watch
    clip_norm: float | None

    def take(self, step: Step, requests: Callable[[], Requests]) -> tuple[Total, Update]:
        """Run all passes of ``step``, then update the weights; measure the gradient noise if the step says so.

        Args:
            requests: returns what this rank asks for; called as late as the note allows.

        Raises:
            UserError: the task's loss isn't (sum, units).
        """
        engine, each = self.engine, step.measured and not step.halves
        for micro in self.loader(step):
            self.watch.beat()
            self.stream.start(micro.start, micro.stop)
            with engine.micro(micro.cut, last=micro.last):
                loss, units, measures = engine.loss(micro.batch, micro.samples)
                self.stream.stop()
                asked = requests() if micro.ends else Requests()
                note = Note(loss, units, micro.expected_units, measures, micro.waited_s, asked)
                engine.backward(loss / step.expected_units, note, micro.samples if each else None)
            if micro.last and not micro.ends:
                engine.set_aside()
        total = engine.total(step.expected_units)
        return total, engine.update(total.scale(step.expected_units), self.clip_norm, step.recipe)


def fit(
    state: TrainState,
    stepper: Stepper,
    monitor: Monitor,
    saver: Saver,
    evaluation: Evaluator | None,
    early: EarlyStop,
) -> bool:
    """Train from ``state`` to the end of its plan, or to its early end, and save a last checkpoint.

    Returns:
        True at the end; False, on all ranks after the same step, if any rank was asked to stop.

    Raises:
        RunFailed: the loss or the gradient isn't finite, or the last checkpoint can't be saved.
        UserError: the task's loss isn't (sum, units), or a whole step had no units.
    """

    def requests() -> Requests:
        return Requests(monitor.stop.wanted is not None, saver.due(), early.late(monitor.time_s))

    every = state.plan.intervals
    step = state.plan.step_at(state.samples)
    state.evaluation_owed = state.evaluation_owed and evaluation is not None and (step is not None or evaluation.last)
    stopping = state.evaluation_owed and not evaluate_now(evaluation, state, monitor, saver, early)
    step = None if early.decide() else step
    saved = False  # at the end of the run, before its last evaluation
    while step and not stopping:
        total, update = stepper.take(step, requests)
        state.advance(step, skipped=update.skipped)
        stepper.watch.beat(state.steps, state.samples)

        following = (plan := state.plan).step_at(state.samples)
        saving = crossed(every.save, step.start, step.stop) or plan.keeps(step.stop)
        evaluating = evaluates(evaluation, every.evaluate, step, last=following is None)
        flush = saving or evaluating or following is None
        asked = monitor.record(step, total, update, flush=flush)
        following = following if state.plan is plan else state.plan.step_at(state.samples)  # the batch was moved
        stopping = bool(asked.stop)
        if asked.finish and following:
            early.time_is_up()
            following, evaluating = None, evaluating or evaluates(evaluation, every.evaluate, step, last=True)
        if evaluating:
            state.evaluation_owed = True
            if saved := following is None:
                saver.save(state)  # before the last evaluation, so that no training is lost if it fails
                saver.wait()
            stopping = stopping or not evaluate_now(evaluation, state, monitor, saver, early)
            following = None if early.decide() else following
        if (saving or asked.save) and following and not stopping:
            saver.save(state)
        if failure := saver.failure():
            monitor.report_unsaved(failure)
        step = following
    done = step is None and not state.evaluation_owed
    if not (done and saved):
        saver.save(state)
    settle(state, monitor, saver, done)
    return done


def evaluates(evaluation: Evaluator | None, every: int | None, step: Step, *, last: bool) -> bool:
    """Return whether the run is evaluated after ``step``, which may be its last."""
    return evaluation is not None and (evaluation.last if last else crossed(every, step.start, step.stop))


def evaluate_now(
    evaluation: Evaluator | None, state: TrainState, monitor: Monitor, saver: Saver, early: EarlyStop
) -> bool:
    """Evaluate, log the values, and save the best; return False if a rank was asked to stop before it was complete."""
    assert evaluation
    began = time.perf_counter()
    values = evaluation.of_run()
    if values is None:
        return False
    took_s = time.perf_counter() - began
    monitor.exclude(took_s)
    state.evaluation_owed = False
    monitor.metrics.evaluation(values, took_s)
    for missing in (saver.best.missing(values), *early.evaluated(finite(values))):
        if missing:
            monitor.metrics.warn(missing)
    if saver.best.improves(values):
        saver.save(state, values)
    return True


def settle(state: TrainState, monitor: Monitor, saver: Saver, done: bool) -> None:
    """Log the last step, and wait for the last checkpoint. Raise RunFailed if it can't be saved but is required."""
    if done:
        monitor.log_early_end()
    if done and (never := saver.best.never()):
        monitor.metrics.warn(never)
    if failure := saver.wait():
        if monitor.must_save or not done:
            end = "end" if done else "stop"
            raise RunFailed(f"step {state.steps}, at which to {end}, can't be saved: {failure}")
        monitor.report_unsaved(failure)
