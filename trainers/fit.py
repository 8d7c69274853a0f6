"""The training loop. It knows nothing of ranks, engines or batch sizes: the plan says what each step is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from trainers.engines import Engine
from trainers.keyed import Stream
from trainers.loader import Loader
from trainers.metrics import Metrics
from trainers.rundir import Fatal, Refused
from trainers.state import TrainState
from trainers.stop import Stop
from trainers.tally import News, Note, Pulse

UNITS_OFF = 0.05  # share by which the units of the first step may miss what the task's YAML states

Evaluate = Callable[[], dict[str, float]]


def fit(
    state: TrainState,
    engine: Engine,
    loader: Loader,
    stream: Stream,
    pulse: Pulse,
    metrics: Metrics,
    stop: Stop,
    *,
    clip_norm: float | None,
    log_every: int,
    evaluate: Evaluate | None,
    evaluate_every: int | None,
) -> bool:
    """Train from ``state`` to the end of its plan.

    Args:
        log_every, evaluate_every: in samples. In any case the first and the last step are logged, and the end is
            evaluated.

    Returns:
        True at the end of the plan; False where some rank was asked to stop before, on all ranks after the same step.

    Raises:
        Fatal: the loss or the gradient isn't finite.
        Refused: the task's loss isn't (sum, units), or a whole step had no units.
    """
    step, stopping = state.plan.step_at(state.samples), False
    while step and not stopping:
        for micro in loader(step):
            stream.start(micro.start, micro.stop)
            with engine.micro(last=micro.last):
                loss, units = engine.loss(micro.batch)
                stream.stop()
                note = Note(loss, units, micro.expected_units, stop=micro.last and stop.wanted is not None)
                engine.backward(loss / step.expected_units, note)
        total = engine.total(step.expected_units)
        update = engine.update(total.scale(step.expected_units), clip_norm, step.recipe)

        state.samples, state.steps = step.stop, step.index + 1
        following = state.plan.step_at(state.samples)
        stopping = heed(pulse.read(step, total, update.grad_norm), metrics, state, log_every)
        due = following is None or (crossed(evaluate_every, step.start, step.stop) and not stopping)
        if stopping or due:
            heed(pulse.last(), metrics, state, log_every)
        if evaluate and due:
            evaluate_now(evaluate, metrics)
        step = following
    return step is None


def heed(news: News | None, metrics: Metrics, state: TrainState, log_every: int) -> bool:
    """Refuse what can't be trained on, log what is due; whether some rank was asked to stop."""
    if news is None:
        return False
    step = news.step
    where = f"step {step.index + 1} (samples {step.start} to {step.stop - 1} of the run)"
    if news.units <= 0:
        raise Refused(f"{where} has {news.units:g} units: the losses of its global batch returned no more than that")
    if not (math.isfinite(news.loss) and math.isfinite(news.grad_norm)):
        raise Fatal(f"{where} isn't finite: loss {news.loss}, gradient norm {news.grad_norm}")
    stated, found = state.plan.units_per_sample, news.units / (step.stop - step.start)
    if step.index == 0 and stated and abs(found / stated - 1) > UNITS_OFF:
        metrics.warn(f"task.units_per_sample={stated}, but the first step has {found:g} units a sample")
    if step.index == 0 or crossed(log_every, step.start, step.stop) or step.index + 1 == state.plan.steps:
        metrics.step(news)
    return news.stop


def crossed(every: int | None, before: int, after: int) -> bool:
    """Whether a multiple of ``every`` lies in (before, after]; None has no multiples."""
    return every is not None and after // every > before // every


def evaluate_now(evaluate: Evaluate, metrics: Metrics) -> None:
    """Evaluate, and note its result and the time that it took from training."""
    began = time.perf_counter()
    values = evaluate()
    metrics.evaluation(values, time.perf_counter() - began)
