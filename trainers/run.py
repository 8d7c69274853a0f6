"""Run the training on one worker: open the data, build the model, restore the state, train, finish."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from torch import nn

from isobatch.conf.rundir.directory import RunDir
from isobatch.conf.rundir.files import write_atomic
from isobatch.conf.rundir.outcome import Outcome
from isobatch.conf.saved import dump
from isobatch.conf.terminal import say
from isobatch.scaling.geometry import counted
from isobatch.scaling.report.plan_json import to_json
from isobatch.scaling.report.plan_table import table
from isobatch.trainers.checkpoints.best import Best, Evaluation
from isobatch.trainers.checkpoints.commit import pass_over
from isobatch.trainers.checkpoints.resume import find_best, header_of, resume, stored_groups
from isobatch.trainers.checkpoints.saver import Policy, Reports, Saver
from isobatch.trainers.checkpoints.weights import initialise, save_final
from isobatch.trainers.data.loader import Loader
from isobatch.trainers.data.state import TrainState
from isobatch.trainers.data.validation import Validation, open_validation
from isobatch.trainers.engines.engine import Engine
from isobatch.trainers.engines.make import make_engine, refuse_environment
from isobatch.trainers.launch.changes import changes
from isobatch.trainers.launch.source import Source
from isobatch.trainers.loop.claim import claim, end
from isobatch.trainers.loop.control import BatchControl
from isobatch.trainers.loop.early_stop import EarlyStop
from isobatch.trainers.loop.evaluate import Evaluator
from isobatch.trainers.loop.fit import Stepper, fit
from isobatch.trainers.loop.hardware import Hardware, flops_per_unit, peak_flops
from isobatch.trainers.loop.metrics import Metrics, evaluations_until, tell
from isobatch.trainers.loop.monitor import Monitor
from isobatch.trainers.loop.opening import (
    Opened,
    announce_frozen,
    announce_position,
    make_stream,
    open_task,
    refuse_without_validation,
    warnings,
)
from isobatch.trainers.loop.readback import DelayedReadback
from isobatch.trainers.model.build import dependent_on_cut, prepare
from isobatch.trainers.model.modes import Modes
from isobatch.trainers.model.randomness import Stream, seed_generators
from isobatch.trainers.ranks.failure import Reached, RunFailed
from isobatch.trainers.ranks.session import Session, refuse_other_source, stop_signal
from isobatch.trainers.ranks.signals import SIGNALS
from isobatch.trainers.tasks.task import make_model, make_task
from isobatch.trainers.tensors.manifest import Checkpoint, Header
from isobatch.trainers.tensors.names import checkpoints
from isobatch.trainers.trackers.followers import Followers, refuse_bad_tracker
from isobatch.trainers.trial.contract import Looked, announce, announce_failed, look_and_try


@dataclass(frozen=True, slots=True)
class Attempt:
    """Hold the run directory and its session; ``before`` is the outcome of the previous attempt, if any."""

    session: Session
    run: RunDir
    before: Outcome | None
    source: Source
    followers: Followers

    @property
    def ours(self) -> RunDir | None:
        """Return the run directory on rank 0, which writes and reports for all ranks; else None."""
        return self.run if self.session.world.rank == 0 else None


@dataclass(frozen=True, slots=True)
class Ready:
    """Hold a model and its engine at the position where this attempt starts training.

    Attributes:
        looked: the results of trying the task.
        found: the checkpoint that the state was restored from, or None.
        weights_from: the source of the initial weights, by ``init_from``.
        flops_per_unit: see Hardware.
    """

    model: nn.Module
    modes: Modes
    stream: Stream
    validation: Validation | None
    looked: Looked
    engine: Engine
    state: TrainState
    found: Checkpoint | None
    weights_from: str | None
    flops_per_unit: float | None


def train(session: Session, enter: Callable[[RunDir], None]) -> Outcome:
    """Train as the config says, and return the same outcome on all ranks; every worker runs this function.

    Args:
        enter: called with the run directory once this launch has claimed it.

    Raises:
        UserError: the config, the task or the checkpoint can't be trained on.
    """
    run, before = claim(session)
    if before:
        session.watch.beat(before.step, before.samples)
    enter(run)
    if before and before.state == "finished" and not session.start.extends:
        return before
    followers = Followers(run if session.world.rank == 0 else None, session)
    attempt = Attempt(session, run, before, Source(session.config), followers)
    opened = open_data(attempt)
    if opened is None:
        return stopped_before_training(session, run)
    if opened.plan.measures:
        from isobatch.trainers.tuning.at_start import with_measured_size  # other starts don't wait for its imports

        opened = with_measured_size(session, opened, run)
    if opened is None:
        return stopped_before_training(session, run)
    ready = build(attempt, opened)
    early = EarlyStop(session.config, session.world)
    if attempt.ours and early.rules:
        early.evaluations = evaluations_until(run.path / "metrics.jsonl", ready.state)
    with followers:
        done = loop(attempt, opened, ready, early)
        outcome = finish(attempt, ready, done, early.cause)
        followers.finish(outcome, ready.state)
    return outcome


def stopped_before_training(session: Session, run: RunDir) -> Outcome:
    """Record that a rank was asked to stop before the model was made."""
    reached = session.watch.reached if checkpoints(run) else Reached()
    return end(session, run, "stopped", stop_signal(session.stop, session.world), reached)


def open_data(attempt: Attempt) -> Opened | None:
    """Make the task, open its training data, and plan; return None on all ranks if any rank was asked to stop."""
    session = attempt.session
    session.watch.expect_beats()
    refuse_bad_tracker(session)
    seed_generators(session.config.seed)
    task = make_task(session.config)
    attempt.source.look()
    with session.watch.excused():  # until all ranks have the data
        session.world.wait_patiently()
        opened = open_task(session, task)
    session.watch.beat()
    return opened


def build(attempt: Attempt, opened: Opened) -> Ready:
    """Make the model, try the task, make the engine; resume from the newest valid checkpoint, or start at step 0."""
    run, session, task = attempt.run, attempt.session, opened.task
    config, world, watch = session.config, session.world, session.watch
    refuse_environment(config, opened.plan)
    stream = make_stream(session, attempt.ours)
    model = make_model(config, task)
    attempt.source.look()
    refuse_other_source(attempt.source.files, world)
    with watch.excused():  # val_data() may be slow
        validation = open_validation(task, world, config.seed, config.evaluate.samples)
    if validation is None:
        refuse_without_validation(config)
    looked = look_and_try(opened, model, validation, config, world, watch)
    flops = flops_per_unit(task, model)
    model = prepare(model, config, stream, world.size)
    modes = Modes(model)
    watch.beat()

    begins = not world.agree("a checkpoint" if checkpoints(run) else "")
    with watch.excused():
        weights_from = initialise(model, config.init_from, world) if config.init_from and begins else None
    groups = () if begins else stored_groups(run, world)
    say_groups, say_skipped = (partial(tell, attempt.ours, event) for event in ("groups_kept", "skipped"))
    engine = make_engine(config, task, model, opened.plan.peak, world, groups, say_groups)
    watch.describe_mismatch = engine.describe_mismatch
    watch.beat()
    state, found = resume(run, config, world, engine, opened.plan, looked.fingerprint, say_skipped, watch.beat)
    if world.agree("its last evaluation" if attempt.before and attempt.before.state == "finished" else ""):
        state.evaluation_owed = False  # done after the last checkpoint
    if found is None and config.evaluate.first:
        state.evaluation_owed = True
    return Ready(model, modes, stream, validation, looked, engine, state, found, weights_from, flops)


def loop(attempt: Attempt, opened: Opened, ready: Ready, early: EarlyStop) -> bool:
    """Train to the end of the plan, or its early end; return False on all ranks if any rank was asked to stop."""
    session, config, world = attempt.session, attempt.session.config, attempt.session.world
    task, engine, state, stream, watch = opened.task, ready.engine, ready.state, ready.stream, session.watch
    loader = Loader(opened.data, task, state, world, config.data.workers, stream.tell, stand_ins=engine.lockstep)
    evaluation = None if ready.validation is None else Evaluator(
        task, ready.model, ready.validation, world, stream, opened.evaluation_batch, config.precision, engine,
        session.stop, watch, watch.excused, config.evaluate.last,
    )  # fmt: skip
    if attempt.ours:
        record_start(attempt, ready)
    metrics = Metrics(attempt.ours, state, live=not config.debug)
    attempt.followers.start()
    ready.modes.train()
    for text in warnings(config, ready.model, state, ready.found):
        metrics.warn(text)
    saver = make_saver(attempt, ready, metrics)
    world.kept.extend((engine, loader, metrics, saver))
    for reason in dependent_on_cut(ready.model):
        stream.tell(reason)
    announce(ready.looked, attempt.ours, stream)
    stepper = Stepper(engine, loader, stream, watch, config.clip_norm)
    hardware = Hardware(world.device, ready.flops_per_unit, peak_flops(config, world.device, world.size))
    control = BatchControl(state, world, metrics, attempt.ours)
    monitor = Monitor(config, state, metrics, DelayedReadback(world.device), hardware, session.stop, control)
    monitor.after_a_step = partial(announce_failed, ready.looked, attempt.ours)
    try:
        with watch.tracking(lambda: state.reached):
            done = fit(state, stepper, monitor, saver, evaluation, early)
            if done:
                control.finished()
            return done
    finally:
        watch.unguard()
        loader.close()
        metrics.close()
        saver.close()


def make_saver(attempt: Attempt, ready: Ready, metrics: Metrics) -> Saver:
    """Return the saver of this attempt's checkpoints."""
    session, config = attempt.session, attempt.session.config.checkpoint
    every_s = config.every.value * 60 if config.every and config.every.unit == "min" else None
    return Saver(
        attempt.run,
        session.world,
        ready.engine,
        partial(checkpoint_header, attempt, ready.looked.fingerprint),
        Policy(every_s, config.keep),
        Best(config.best, find_best(attempt.run, config.best, session.world)),
        Reports(session.watch.beat, partial(metrics.warn_of_slow_save, session.start.kill_wait_s), metrics.warn),
        ready.found.header if ready.found else None,
    )


def checkpoint_header(attempt: Attempt, fingerprint: str | None, state: TrainState, best: Evaluation | None) -> Header:
    """Return the header of a checkpoint, on rank 0, and record source files imported since the last one."""
    if late := attempt.source.look():
        with suppress(OSError):
            attempt.run.event("source", files=late)
    return header_of(attempt.session.config, fingerprint, state, best)


def record_start(attempt: Attempt, ready: Ready) -> None:
    """Replace the config and plan of the previous attempt, and report where training starts; on rank 0."""
    session, run, state = attempt.session, attempt.run, ready.state
    write_atomic(run.path / "config.yaml", dump(session.config))
    write_atomic(run.path / "plan.json", to_json(state.plan) + "\n")
    if session.config.task.train_samples is None:
        say(table(state.plan, full=session.config.output == "full"))
    for path in pass_over(run, state.steps):
        tell(run, "passed_over", f"unused checkpoint {path.name} moved to {path.parent}", checkpoint=path.name)
    changed = changes(run, session.config, session.start.code, attempt.source.files)
    if ready.found and changed:
        tell(run, "changed", f"changed since the run was last trained: {changed}", **changed.fields)
    run.event("source", files=attempt.source.files | changed.files)
    announce_position(run, state, ready.found, attempt.before, ready.weights_from)
    announce_frozen(run, ready.modes)
    say(f"training on {counted(session.world.size, 'rank')} ({session.world.device.type}) · {run.path}")


def finish(attempt: Attempt, ready: Ready, done: bool, ended_by: str) -> Outcome:
    """Export the weights if the run is done, and write the outcome.

    Args:
        ended_by: why the run ended early; empty at the end of its plan.
    """
    session = attempt.session
    cause = ended_by if done else stop_signal(session.stop, session.world)
    if not done and cause and cause not in {number.name for number in SIGNALS}:
        raise RunFailed(cause)
    if done:
        with session.watch.excused(), ready.engine.eval_weights():
            save_final(attempt.run, ready.engine, writes=attempt.ours is not None)
    return end(session, attempt.run, "finished" if done else "stopped", cause, ready.state.reached)
