"""The training loop. It knows nothing of ranks, engines or batch sizes: the plan says what each step is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from isobatch.conf.rundir.directory import Fatal
from isobatch.scaling.errors import UserError
from isobatch.scaling.noise import estimate, filled
from isobatch.trainers.checkpoints.saver import Saver
from isobatch.trainers.data.loader import Loader
from isobatch.trainers.data.state import TrainState
from isobatch.trainers.engines.engine import Engine
from isobatch.trainers.engines.step_report import News, Note, Pulse
from isobatch.trainers.loop.evaluate import Evaluate
from isobatch.trainers.loop.metrics import Metrics
from isobatch.trainers.model.randomness import Stream
from isobatch.trainers.ranks.signals import Stop
from isobatch.trainers.ranks.watch import Watch

UNITS_OFF = 0.05  # share by which the units of the first step may miss what the task's YAML states
SKIPS_IN_A_ROW = 20  # steps that weren't finite, after which nothing is being trained any more


def fit(
    state: TrainState,
    engine: Engine,
    loader: Loader,
    stream: Stream,
    pulse: Pulse,
    metrics: Metrics,
    keeper: Saver,
    stop: Stop,
    watch: Watch,
    *,
    clip_norm: float | None,
    skip_nonfinite: bool,
    log_every: int,
    evaluate: Evaluate | None,
    evaluate_every: int | None,
    save_every: int | None,
    must_save: bool,
    complain: Callable[[str], None],
    noise_every: int | None = None,
    evaluate_last: bool = True,
) -> bool:
    """Train from ``state`` to the end of its plan, and leave a checkpoint of where it ended.

    Args:
        skip_nonfinite: a step whose loss or gradient isn't finite changes nothing, instead of ending the run.
        log_every, evaluate_every, save_every: in samples. In any case the first and the last step are logged; and a
            checkpoint is saved where the keeper says that it's time, or the run stops or ends.
        evaluate: gives None, on all ranks, where some rank was asked to stop meanwhile.
        must_save: the end counts as one only where it could be saved.
        complain: told of a checkpoint that couldn't be saved, on rank 0.
        noise_every: samples between two measurements of the gradient noise, in a step of at least two micro-batches.
        evaluate_last: evaluate at the end of the run; False: not there, even where ``evaluate_every`` says so.

    Returns:
        True at the end of the plan; False where some rank was asked to stop before, on all ranks after the same step.

    Raises:
        Fatal: the loss or the gradient isn't finite, or the checkpoint to stop or end with can't be saved.
        UserError: the task's loss isn't (sum, units), or a whole step had no units.
    """
    step, stopping, skips = state.plan.step_at(state.samples), False, 0
    state.evaluation_owed = state.evaluation_owed and evaluate is not None and (step is not None or evaluate_last)
    if evaluate and state.evaluation_owed:
        stopping = not evaluate_now(evaluate, state, metrics, keeper)
    while step and not stopping:
        measuring = crossed(noise_every, step.start, step.stop) and filled(step.cut) > 1
        for micro in loader(step):
            watch.beat(state.steps, state.samples)
            stream.start(micro.start, micro.stop)
            with engine.micro(step.cut, last=micro.last):
                loss, units = engine.loss(micro.batch, micro.samples)
                stream.stop()
                wishes = {"stop": stop.wanted is not None, "save": keeper.due()} if micro.last else {}
                note = Note(loss, units, micro.expected_units, **wishes)
                engine.backward(loss / step.expected_units, note, micro.samples if measuring else None)
        total = engine.total(step.expected_units)
        update = engine.update(total.scale(step.expected_units), clip_norm, step.recipe)

        state.samples, state.steps = step.stop, step.index + 1
        watch.beat(state.steps, state.samples)
        state.skipped, skips = state.skipped + update.skipped, skips + 1 if update.skipped else 0
        following = state.plan.step_at(state.samples)
        news = pulse.read(step, total, update.grad_norm, update.parts_sq)
        heed(news, metrics, state, log_every, skip_nonfinite)
        stopping = news is not None and news.stop
        saving = crossed(save_every, step.start, step.stop) or (news is not None and news.save)
        evaluating = evaluate is not None and (
            crossed(evaluate_every, step.start, step.stop) if following else evaluate_last
        )
        if stopping or saving or evaluating or following is None:
            last = pulse.last()
            heed(last, metrics, state, log_every, skip_nonfinite)
            if last:
                stopping, saving = stopping or last.stop, saving or last.save
        if skips == SKIPS_IN_A_ROW or (following is None and state.skipped == state.steps):
            raise Fatal(f"none of the last {skips} steps was finite: all of them were skipped, and nothing is trained")
        if evaluate and evaluating:
            state.evaluation_owed = True
            if following is None:
                keeper.save(state)  # and wait: an evaluation which fails then costs no training
                keeper.wait()
            stopping = stopping or not evaluate_now(evaluate, state, metrics, keeper)
        if saving and following and not stopping:
            keeper.save(state)
        if failure := keeper.failure():
            complain(failure)
        step = following
    done = step is None and not state.evaluation_owed
    if evaluate is None or not (done and evaluate_last):  # else it was saved before the last evaluation
        keeper.save(state)
    if done and (never := keeper.best.never()):
        metrics.warn(never)
    if failure := keeper.wait():
        if must_save or not done:
            raise Fatal(f"step {state.steps}, at which to {'end' if done else 'stop'}, can't be saved: {failure}")
        complain(failure)
    return done


def heed(news: News | None, metrics: Metrics, state: TrainState, log_every: int, skip_nonfinite: bool) -> None:
    """Refuse what can't be trained on, take in what was measured, log what is due."""
    if news is None:
        return
    step = news.step
    where = f"step {step.index + 1} (samples {step.start} to {step.stop - 1} of the run)"
    if news.units <= 0:
        raise UserError(f"{where} has {news.units:g} units: the losses of its global batch returned no more than that")
    if not (math.isfinite(news.loss) and math.isfinite(news.grad_norm)):
        found = f"{where} isn't finite: loss {news.loss}, gradient norm {news.grad_norm}"
        if not skip_nonfinite:
            raise Fatal(f"{found}; on_nonfinite=skip leaves such steps out")
        metrics.event("skip", f"{found}; skipped", step=step.index + 1, samples=step.stop, skipped=state.skipped)
    if state.noise and news.parts_sq is not None and math.isfinite(news.parts_sq):
        new = estimate(news.parts_sq, news.grad_norm**2, step.cut.global_size, filled(step.cut))
        state.noise = state.noise.updated(new)
    stated, found_units = state.plan.units_per_sample, news.units / (step.stop - step.start)
    if step.index == 0 and stated and abs(found_units / stated - 1) > UNITS_OFF:
        metrics.warn(f"task.units_per_sample={stated}, but the first step has {found_units:g} units a sample")
    if step.index == 0 or crossed(log_every, step.start, step.stop) or step.index + 1 == state.plan.steps:
        metrics.step(news)


def crossed(every: int | None, before: int, after: int) -> bool:
    """Whether a multiple of ``every`` lies in (before, after]; None has no multiples."""
    return every is not None and after // every > before // every


def evaluate_now(evaluate: Evaluate, state: TrainState, metrics: Metrics, keeper: Saver) -> bool:
    """Evaluate, note its result and the time that it took from training, and save the best.

    Returns:
        False where some rank was asked to stop before it was done; it is then still owed.
    """
    began = time.perf_counter()
    values = evaluate()
    if values is None:
        return False
    state.evaluation_owed = False
    metrics.evaluation(values, time.perf_counter() - began)
    if missing := keeper.best.missing(values):
        metrics.warn(missing)
    if keeper.best.improves(values):
        keeper.save(state, values)
    return True
