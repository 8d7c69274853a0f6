"""One run, as every worker of it sees it: open the data, build the model, restore the state, train, finish."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from isobatch.conf.rundir.directory import RunDir
from isobatch.conf.rundir.files import write_atomic
from isobatch.conf.rundir.outcome import Outcome, State
from isobatch.conf.saved import dump
from isobatch.conf.terminal import say
from isobatch.scaling.errors import UserError
from isobatch.scaling.geometry import counted
from isobatch.scaling.noise import unmeasurable
from isobatch.scaling.planning.advice import lr_jump
from isobatch.scaling.report.plan_json import to_json
from isobatch.scaling.report.plan_table import table
from isobatch.trainers.checkpoints.best import Best
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
from isobatch.trainers.loop.announce import (
    RUN_DEPENDS,
    announce_frozen,
    announce_position,
    make_stream,
    report_dependence,
)
from isobatch.trainers.loop.claim import claim
from isobatch.trainers.loop.evaluate import Evaluation, Evaluator
from isobatch.trainers.loop.fit import Stepper, fit
from isobatch.trainers.loop.metrics import Metrics, tell
from isobatch.trainers.loop.monitor import Monitor
from isobatch.trainers.loop.opening import Opened, open_task
from isobatch.trainers.loop.readback import DelayedReadback
from isobatch.trainers.model.batchnorm import Counting
from isobatch.trainers.model.build import dependent_on_cut, prepare
from isobatch.trainers.model.modes import Modes
from isobatch.trainers.model.randomness import Stream, seed_generators
from isobatch.trainers.ranks.failure import Reached, RunFailed, restarts
from isobatch.trainers.ranks.session import Session, refuse_other_source, stop_wish
from isobatch.trainers.ranks.signals import SIGNALS
from isobatch.trainers.tasks.task import make_model, make_task
from isobatch.trainers.tensors.manifest import Checkpoint, Header
from isobatch.trainers.tensors.names import checkpoints
from isobatch.trainers.trial.contract import Looked, Subject, look_and_try

if TYPE_CHECKING:
    from isobatch.conf.schema import RunConfig


@dataclass(frozen=True, slots=True)
class Attempt:
    """Hold what this start has of the run directory.

    Attributes:
        before: how the attempt before this one ended; None: there was none.
        source: the user's source files, as they were imported.
    """

    session: Session
    run: RunDir
    before: Outcome | None
    source: Source

    @property
    def ours(self) -> RunDir | None:
        """Return the run directory on rank 0, which writes and says what concerns all ranks; else None."""
        return self.run if self.session.world.rank == 0 else None


@dataclass(frozen=True, slots=True)
class Built:
    """Hold a model on the CPU, and what was found when its task was tried."""

    model: nn.Module
    modes: Modes
    stream: Stream
    validation: Validation | None
    looked: Looked


@dataclass(frozen=True, slots=True)
class Restored:
    """Hold the state of a run at the position where this start begins to train.

    Attributes:
        found: the checkpoint that it was restored from; None: there was none.
        weights_from: where ``init_from`` found the initial weights.
    """

    engine: Engine
    state: TrainState
    found: Checkpoint | None
    weights_from: str | None


def train(session: Session, enter: Callable[[RunDir], None]) -> Outcome:
    """Train as the config says, and leave the run directory: the body of every worker, the same on all ranks.

    Args:
        enter: called with the run directory once it is this launch's; before that nothing is written to it.

    Returns:
        ``finished`` or ``stopped``, the same on all ranks.

    Raises:
        UserError: what the user gave can't work.
    """
    run, before = claim(session)
    if before:
        session.watch.beat(before.step, before.samples)
    enter(run)
    if before and before.state == "finished" and not session.start.extends:
        return before
    attempt = Attempt(session, run, before, Source(session.config))
    opened = open_data(attempt)
    if opened is None:
        reached = session.watch.reached if checkpoints(run) else Reached()
        return end(attempt, "stopped", stop_wish(session.stop, session.world), reached)
    built = build(attempt, opened)
    restored = restore(attempt, opened, built)
    done = loop(attempt, opened, built, restored)
    return finish(attempt, restored, done)


def open_data(attempt: Attempt) -> Opened | None:
    """Make the task, open its training data, and plan; None, on all ranks, where some rank was asked to stop."""
    session, world = attempt.session, attempt.session.world
    session.watch.expect_beats()
    seed_generators(session.config.seed)
    task = make_task(session.config)
    attempt.source.look()
    with session.watch.excused():  # until all ranks have the data
        world.wait_patiently()
        opened = open_task(session, task)
    session.watch.beat()
    if opened:
        refuse_environment(session.config, opened.plan)
    return opened


def build(attempt: Attempt, opened: Opened) -> Built:
    """Make the model, open the validation data, and try the task on both."""
    session, config, world, task = attempt.session, attempt.session.config, attempt.session.world, opened.task
    stream = make_stream(session, attempt.ours)
    model = make_model(config, task)
    attempt.source.look()
    refuse_other_source(attempt.source.files, world)
    with session.watch.excused():  # val_data() may take its time
        validation = open_validation(task, world, config.seed, config.evaluate.samples)
    best, first = config.checkpoint.best, config.evaluate.first
    for key, asked, given in (("checkpoint.best", best, best), ("evaluate.first", first, "true")):
        if asked and validation is None:
            problem = f"{key}={given} needs validation data, and task {config.task.name} has no val_data()"
            raise UserError(problem, "leave it out, or define val_data()", key, asked)
    subject = Subject(task, model, opened.data, validation, opened.plan, opened.evaluation_batch)
    looked = look_and_try(subject, config, world, session.watch)
    model = prepare(model, config, stream, world.size)
    session.watch.beat()
    return Built(model, Modes(model), stream, validation, looked)


def restore(attempt: Attempt, opened: Opened, built: Built) -> Restored:
    """Make the engine, and restore the newest good checkpoint; without one, begin at step 0."""
    config, world, watch = attempt.session.config, attempt.session.world, attempt.session.watch
    run, before = attempt.run, attempt.before
    begins = not world.agree("a checkpoint" if checkpoints(run) else "")
    with watch.excused():
        weights_from = initialise(built.model, config.init_from, world) if config.init_from and begins else None
    groups = () if begins else stored_groups(run, world)
    report = partial(tell, attempt.ours)
    engine = make_engine(
        config, opened.task, built.model, opened.plan.peak, world, groups, partial(report, "groups_kept")
    )
    watch.parting = engine.parting
    watch.beat()
    state, found = resume(
        run, config, world, engine, opened.plan, built.looked.fingerprint, partial(report, "skipped"), watch.beat
    )
    if world.agree("its last evaluation" if before and before.state == "finished" else ""):
        state.evaluation_owed = False  # it came after the last checkpoint
    if found is None and config.evaluate.first:
        state.evaluation_owed = True
    return Restored(engine, state, found, weights_from)


def loop(attempt: Attempt, opened: Opened, built: Built, restored: Restored) -> bool:
    """Train to the end of the plan; False, on all ranks, where some rank was asked to stop before."""
    session, config, world = attempt.session, attempt.session.config, attempt.session.world
    engine, state, stream = restored.engine, restored.state, built.stream
    workers = config.data.workers
    loader = Loader(opened.data, opened.task, state, world, workers, stream.tell, stand_ins=engine.lockstep)
    evaluation = make_evaluation(session, opened, built, engine)
    if attempt.ours:
        record_start(attempt, built, restored)
    metrics = Metrics(attempt.ours, state, live=not config.debug)
    for text in warnings(config, built, restored):
        metrics.warn(text)
    saver = make_saver(attempt, built, restored, metrics)
    world.kept.extend((engine, loader, metrics, saver))
    built.modes.train()
    for reason in dependent_on_cut(built.model):
        stream.tell(reason)
    announce_trial(attempt.ours, built.looked, stream)
    stepper = Stepper(engine, loader, stream, session.watch, config.clip_norm)
    monitor = Monitor(config, state, metrics, DelayedReadback(world.device), session.stop)
    try:
        with session.watch.tracking(lambda: state.reached):
            return fit(state, stepper, monitor, saver, evaluation, session.stop, session.watch)
    finally:
        session.watch.unguard()
        loader.close()
        metrics.close()
        saver.close()


def make_evaluation(session: Session, opened: Opened, built: Built, engine: Engine) -> Evaluation | None:
    """Return what evaluates the model; None without validation data."""
    config, world, task = session.config, session.world, opened.task
    if built.validation is None:
        return None
    evaluator = Evaluator(
        task, built.model, built.validation, world, built.stream, opened.evaluation_batch, config.precision, engine,
        session.stop, session.watch, session.watch.excused,
    )  # fmt: skip
    return Evaluation(evaluator, engine, config.evaluate.last)


def make_saver(attempt: Attempt, built: Built, restored: Restored, metrics: Metrics) -> Saver:
    """Return what saves the checkpoints of this start."""
    session, config = attempt.session, attempt.session.config.checkpoint
    every_s = config.every.value * 60 if config.every and config.every.unit == "min" else None
    return Saver(
        attempt.run,
        session.world,
        restored.engine,
        partial(describe_checkpoint, attempt, built.looked.fingerprint),
        Policy(every_s, config.keep),
        Best(config.best, find_best(attempt.run, config.best, session.world)),
        Reports(session.watch.beat, partial(metrics.warn_of_slow_save, session.start.kill_wait_s), metrics.warn),
        restored.found.header if restored.found else None,
    )


def describe_checkpoint(
    attempt: Attempt, fingerprint: str | None, state: TrainState, evaluation: Mapping[str, float | None] | None
) -> Header:
    """Return the header of a checkpoint, which is of all source that was imported when it was saved; on rank 0."""
    if late := attempt.source.look():
        with suppress(OSError):
            attempt.run.event("source", files=late)
    return header_of(attempt.session.config, fingerprint, state, evaluation)


def record_start(attempt: Attempt, built: Built, restored: Restored) -> None:
    """Write config and plan of this start over those of the attempt before, and say where it begins; on rank 0."""
    session, run, state = attempt.session, attempt.run, restored.state
    write_atomic(run.path / "config.yaml", dump(session.config))
    write_atomic(run.path / "plan.json", to_json(state.plan) + "\n")
    if session.config.task.train_samples is None:
        say(table(state.plan, full=session.config.output == "full"))
    for path in pass_over(run, state.steps):
        tell(run, "passed_over", f"what was checkpoint {path.name} is kept in {path.parent}", checkpoint=path.name)
    changed = changes(run, session.config, session.start.code, attempt.source.files)
    if restored.found and changed:
        tell(run, "changed", f"changed since the run was last trained: {changed}", **changed.fields)
    run.event("source", files=attempt.source.files | changed.files)
    announce_position(run, state, restored.found, attempt.before, restored.weights_from)
    announce_frozen(run, built.modes)
    say(f"training on {counted(session.world.size, 'rank')} ({session.world.device.type}) · {run.path}")


def warnings(config: RunConfig, built: Built, restored: Restored) -> Iterator[str]:
    """Yield what the user should know before step 1."""
    plan = restored.state.plan
    if restored.found and (jump := lr_jump(restored.found.header.plan, plan, restored.state.samples)):
        yield jump
    if config.noise.every and (why := unmeasurable(plan)):
        yield why
    if config.batchnorm.mode and not any(isinstance(module, Counting) for module in built.model.modules()):
        yield f"batchnorm.mode={config.batchnorm.mode}, but the model trains no BatchNorm layer: leave it out"


def announce_trial(run: RunDir | None, looked: Looked, stream: Stream) -> None:
    """Say what the trial of the task found."""
    for reason in looked.depends_on_hardware:
        report_dependence(run, RUN_DEPENDS, reason)
    for reason in looked.depends_on_cut:
        stream.tell(reason)
    for reason in looked.evaluation_depends:
        stream.tell_of_evaluation(reason)
    for reason in looked.skipped:
        tell(run, "trial_skipped", f"before step 1 the task could only be tried in part: {reason}", reason=reason)


def finish(attempt: Attempt, restored: Restored, done: bool) -> Outcome:
    """Export the weights where the run is done, and write how it ended."""
    session = attempt.session
    cause = "" if done else stop_wish(session.stop, session.world)
    if cause and cause not in {number.name for number in SIGNALS}:
        raise RunFailed(cause)
    if done:
        with session.watch.excused(), restored.engine.eval_weights():
            save_final(attempt.run, restored.engine, writes=attempt.ours is not None)
    return end(attempt, "finished" if done else "stopped", cause, restored.state.reached)


def end(attempt: Attempt, state: State, cause: str, reached: Reached) -> Outcome:
    """Return the outcome of a run that ended after ``reached``; rank 0 writes it."""
    outcome = Outcome(state, cause, reached.step, reached.samples, attempt.session.start.attempt, restarts())
    if attempt.ours:
        attempt.run.event(state, cause=cause, step=outcome.step, samples=outcome.samples)
        attempt.run.write_outcome(outcome)
    return outcome
