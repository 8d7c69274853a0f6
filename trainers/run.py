"""One run, as every worker of it sees it: from the config to the trained weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from isobatch.conf.rundir.directory import Fatal, Outcome, RunDir, State, write_atomic
from isobatch.conf.saved import dump
from isobatch.conf.terminal import say
from isobatch.scaling.errors import UserError
from isobatch.scaling.geometry import counted
from isobatch.scaling.noise import unmeasurable
from isobatch.scaling.plan import Plan
from isobatch.scaling.planning.advice import lr_jump
from isobatch.scaling.planning.evaluations import evaluation_batch
from isobatch.scaling.planning.resolve import resolve
from isobatch.scaling.report.plan_json import to_json
from isobatch.scaling.report.table import table
from isobatch.trainers.checkpoints.best import Best
from isobatch.trainers.checkpoints.commit import pass_over
from isobatch.trainers.checkpoints.resume import find_best, header_of, resume, stored_groups
from isobatch.trainers.checkpoints.saver import Policy, Reports, Saver
from isobatch.trainers.checkpoints.weights import initialise, listed, save_final
from isobatch.trainers.data.loader import Loader
from isobatch.trainers.data.state import TrainState
from isobatch.trainers.data.validation import open_validation
from isobatch.trainers.engines.engine import make_engine, refuse_environment
from isobatch.trainers.engines.step_report import Pulse
from isobatch.trainers.launch.source import Source, changes
from isobatch.trainers.loop.claim import code_of, enter, refuse_other_source, refuse_unless_same
from isobatch.trainers.loop.evaluate import Evaluator, with_average
from isobatch.trainers.loop.fit import fit
from isobatch.trainers.loop.metrics import Metrics, tell
from isobatch.trainers.model.batchnorm import Counting
from isobatch.trainers.model.build import dependent_on_cut, make_model, prepare
from isobatch.trainers.model.modes import Modes
from isobatch.trainers.model.randomness import Stream, seed_generators
from isobatch.trainers.ranks.kept import KEPT
from isobatch.trainers.ranks.notes import restarts
from isobatch.trainers.ranks.signals import SIGNALS, Stop
from isobatch.trainers.ranks.watch import Watch
from isobatch.trainers.ranks.world import World
from isobatch.trainers.tasks.prepare import prepare_data, without_hurry
from isobatch.trainers.tasks.task import make_task, open_data
from isobatch.trainers.tensors.manifest import Checkpoint, Header, checkpoints
from isobatch.trainers.trial.contract import Looked, look_and_try

if TYPE_CHECKING:
    from isobatch.conf.schema import RunConfig


def train(
    config: RunConfig,
    facts: dict[str, str],
    world: World,
    stop: Stop,
    entered: Callable[[RunDir], None],
    watch: Watch,
) -> Outcome:
    """The body of every worker, the same on all ranks: train as ``config`` says, and leave the run directory.

    Args:
        facts: ``command``, ``commit``, ``attempt`` (id of this start) and ``run_dir``, the same on all ranks; perhaps
            ``extends`` (a finished run goes on to a longer duration), ``per_gpu_limit`` (the most samples at once since
            memory ran out); of a scheduler's job: ``job``, ``job_restart``, ``hosts``, and ``kill_wait_s`` (seconds
            from its notice to its kill).
        entered: called with the run directory once it is this launch's; before that nothing is written to it.

    Returns:
        ``finished`` or ``stopped``, the same on all ranks.

    Raises:
        UserError: what the user gave can't work.
        Exception: a crash; with the attributes ``step`` and ``samples``, how far the run had come, and ``per_gpu``,
            the samples of the largest micro-batch, ``granule``, of which it is a multiple, and ``fixed``, whether it is
            part of what the run is, where it was training already.
    """
    if config.action == "evaluate":
        from isobatch.trainers.loop.evaluate_weights import evaluate_weights

        return evaluate_weights(config, facts, world, stop)
    run, before = enter(config, facts, world)
    entered(run)
    if before and before.state == "finished" and "extends" not in facts:
        return before
    try:
        return _train(config, facts, world, stop, watch, run, before)
    except Exception as error:
        if before and not hasattr(error, "step"):
            error.step, error.samples = before.step, before.samples  # type: ignore[attr-defined]
        raise


def _train(
    config: RunConfig,
    facts: dict[str, str],
    world: World,
    stop: Stop,
    watch: Watch,
    run: RunDir,
    before: Outcome | None,
) -> Outcome:
    ours = run if world.rank == 0 else None  # what rank 0 writes and says, it does for all
    watch.beat(*((before.step, before.samples) if before else (0, 0)))  # from now on a rank that hangs is noticed
    seed_generators(config.seed)
    source = Source(config)
    task = make_task(config)
    source.look()
    with watch.excused():  # until all ranks have it
        world.wait_patiently()
        if signal := prepare_data(task, world, stop, config.cluster.timeout_s):
            return stopped_early(run, signal, before, facts, world)
        data = open_data(task, config)
        refuse_unless_same(world, "the number of samples that train_data() has", len(data))
    watch.beat()
    limit = int(facts["per_gpu_limit"]) if "per_gpu_limit" in facts else None
    plan = plan_of(config, world.size, len(data), limit)
    refuse_environment(config, plan)
    stream = Stream(
        config.seed,
        world.device,
        tell=lambda reason: _depends_on_cut(ours, config, reason),
        tell_of_evaluation=lambda reason: tell(
            ours, "depends_on_cut", evaluation_depends_on_cut(reason), reason=reason
        ),
    )
    model = make_model(config, task)
    source.look()
    refuse_other_source(source.files, world)
    with watch.excused():  # val_data() may take its time
        validation = open_validation(task, world, config.seed, config.evaluate.samples)
    per_gpu = evaluation_batch(config, plan, limit)
    looked = look_and_try(config, task, data, validation, model, plan, per_gpu, world, watch)
    model = prepare(model, config, stream, world.size)
    modes = Modes(model)
    watch.beat()
    begins = not world.agree("a checkpoint" if checkpoints(run) else "")
    with watch.excused():
        weights_from = initialise(model, config.init_from, world) if config.init_from and begins else None
    stored = () if begins else stored_groups(run, world)
    engine = make_engine(config, task, model, plan.peak, world, stored, partial(tell, ours, "groups_kept"))
    watch.parting = engine.parting
    watch.beat()
    state, found = resume(
        run, config, world, engine, plan, looked.fingerprint, partial(tell, ours, "skipped"), watch.beat
    )
    if world.agree("its last evaluation" if before and before.state == "finished" else ""):
        state.evaluation_owed = False  # it came after the last checkpoint
    if found is None and config.evaluate.first:
        state.evaluation_owed = True

    def beat() -> None:
        watch.beat(state.steps, state.samples)

    loader = Loader(data, task, state, world, config.data.workers, stream.tell, stand_ins=engine.lockstep)
    without_hurry(task, world, watch.excused)
    evaluate = None
    if validation:
        evaluate = Evaluator(task, model, validation, world, stream, per_gpu, config.precision, engine, stop, beat)
    every, best = config.checkpoint.every, config.checkpoint.best
    for key, asks in ((f"checkpoint.best={best}", best), ("evaluate.first=true", config.evaluate.first)):
        if asks and evaluate is None:
            raise UserError(f"{key} needs validation data, and task {config.task.name} has no val_data()")
    if ours:  # from here on it isn't the attempt before any more
        write_atomic(run.path / "config.yaml", dump(config))
        write_atomic(run.path / "plan.json", to_json(state.plan) + "\n")
        if config.task.train_samples is None:
            say(table(state.plan))
        for path in pass_over(run, state.steps):
            tell(run, "passed_over", f"what was checkpoint {path.name} is kept in {path.parent}", checkpoint=path.name)
        changed = changes(run, config, code_of(facts), source.files)
        if found and changed:
            tell(run, "changed", f"changed since the run was last trained: {changed}", **changed.fields)
        run.event("source", files=source.files | changed.files)
        say_where(run, state, found, before, weights_from)
        say_frozen(run, modes)
        say(f"training on {counted(world.size, 'rank')} ({world.device.type}) · {run.path}")

    def described(*reached: Any) -> Header:
        if ours and (late := source.look()):  # a checkpoint is of all that was imported when it was saved
            with suppress(OSError):
                ours.event("source", files=late)
        return header_of(config, looked.fingerprint, *reached)

    metrics = Metrics(ours, state, live=not config.debug)
    keeper = Saver(
        run,
        world,
        engine,
        described,
        Policy(every.value * 60 if every and every.unit == "min" else None, config.checkpoint.keep),
        Best(best, find_best(run, best, world)),
        Reports(beat, took=lambda seconds: warn_of_slow_save(seconds, facts, metrics), warn=metrics.warn),
        found.header if found else None,
    )
    if found and (jump := lr_jump(found.header.plan, state.plan, state.samples)):
        metrics.warn(jump)

    if config.noise.every and (why := unmeasurable(state.plan)):
        metrics.warn(why)
    if config.batchnorm.mode and not any(isinstance(module, Counting) for module in model.modules()):
        metrics.warn(f"batchnorm.mode={config.batchnorm.mode}, but the model trains no BatchNorm layer: leave it out")

    def complain(failure: str) -> None:
        metrics.warn(f"a checkpoint couldn't be saved: {failure}")
        if config.checkpoint.on_error == "stop":
            stop.wanted = stop.wanted or f"checkpoint.on_error=stop, and a checkpoint couldn't be saved: {failure}"

    KEPT.extend((engine, loader, metrics, keeper))
    modes.train()
    for reason in dependent_on_cut(model):
        stream.tell(reason)
    say_looked(ours, looked, stream)
    intervals = state.plan.intervals
    try:
        done = fit(
            state,
            engine,
            loader,
            stream,
            Pulse(world.device),
            metrics,
            keeper,
            stop,
            watch,
            clip_norm=config.clip_norm,
            skip_nonfinite=config.on_nonfinite == "skip" or config.precision == "fp16",  # its engine says when to end
            log_every=intervals.log or 1,
            evaluate=with_average(evaluate, engine.average, engine.eval_weights),
            evaluate_every=intervals.evaluate,
            evaluate_last=config.evaluate.last,
            save_every=intervals.save,
            noise_every=intervals.noise,
            must_save=config.checkpoint.on_error == "stop",
            complain=complain,
        )
    except Exception as error:
        error.step, error.samples = state.steps, state.samples  # type: ignore[attr-defined]
        if not hasattr(error, "per_gpu"):  # else an evaluation has said how many samples it had at once
            error.per_gpu = state.plan.stage_at(state.samples).cut.micro_batches[0][0]  # type: ignore[attr-defined]
            error.granule = state.plan.granule  # type: ignore[attr-defined]
            error.fixed = state.plan.numerics == "bitwise"  # type: ignore[attr-defined]
        raise
    finally:
        watch.unguard()
        loader.close()
        metrics.close()
        keeper.close()
    cause = "" if done else stop_cause(stop, world)
    if cause and cause not in {number.name for number in SIGNALS}:
        raise Fatal(cause)
    if done:
        with watch.excused(), engine.eval_weights():
            save_final(run, engine, writes=ours is not None)
    return ended(run, "finished" if done else "stopped", cause, (state.steps, state.samples), facts, world)


def ended(run: RunDir, how: State, cause: str, at: tuple[int, int], facts: dict[str, str], world: World) -> Outcome:
    """Return the outcome of a run that ended after ``at``, steps and samples; rank 0 writes it down."""
    outcome = Outcome(how, cause, *at, facts["attempt"], restarts())
    if world.rank == 0:
        run.event(outcome.state, cause=cause, step=outcome.step, samples=outcome.samples)
        run.write_outcome(outcome)
    return outcome


def stopped_early(run: RunDir, signal: str, before: Outcome | None, facts: dict[str, str], world: World) -> Outcome:
    """Return the outcome of an attempt that was stopped before it trained: the run is where it was."""
    at = (before.step, before.samples) if before and checkpoints(run) else (0, 0)
    return ended(run, "stopped", signal, at, facts, world)


def warn_of_slow_save(seconds: float, facts: dict[str, str], metrics: Metrics) -> None:
    """Say once that a stop may take longer than a scheduler grants to a job that it ends without notice.

    It is a step, a save that may be under way, one more, and the job's own end.
    """
    limit = facts.get("kill_wait_s")
    if limit and seconds > float(limit) / 2:
        del facts["kill_wait_s"]
        metrics.warn(
            f"a save took {seconds:.1f} s, and {limit} s after a job is told to stop it is killed (Slurm's KillWait): "
            "a step, a save under way and one more may not fit. Where a stop comes without notice, as by a preemption, "
            "steps since the last checkpoint are then done again: checkpoint.every says how many those can be"
        )


def plan_of(config: RunConfig, world: int, train_samples: int | None, per_gpu_limit: int | None = None) -> Plan:
    """Return the run's plan on ``world`` ranks.

    Args:
        per_gpu_limit: the most samples at once, where memory asks for fewer than the config. It may be of an
            evaluation, and then below what a micro-batch can be.
    """
    plan = resolve(config, world, train_samples)
    most = max(per_gpu_limit, plan.granule) if per_gpu_limit else None
    if most and config.numerics != "bitwise" and most < max(stage.cut.per_gpu for stage in plan.stages):
        return plan.dealt(world, most)
    return plan


def say_where(
    run: RunDir, state: TrainState, found: Checkpoint | None, before: Outcome | None, source: str | None
) -> None:
    """Say where the training starts: at a checkpoint, anew, or with other weights; and keep it in the events."""
    if found:
        run.event("going_on", checkpoint=found.path.name, step=state.steps, samples=state.samples)
        say(f"goes on from step {state.steps} of {state.plan.steps} (checkpoints/{found.path.name})")
    elif before and before.state != "refused":
        say("begins anew: the last attempt ended before its first checkpoint")
    if source:
        run.event("initialised", source=source)
        say(f"weights from {source}")


def say_frozen(run: RunDir, modes: Modes) -> None:
    """Say which submodules stay in eval mode, and keep it in the events."""
    if modes.frozen:
        names = list(modes.frozen)
        run.event("frozen", eval_mode=names)
        say(f"stays in eval mode, as model() returned it: {listed(names)}")


def count_samples(config: RunConfig) -> int:
    """Prepare and open the task's training data and count it, for a plan that wants to know."""
    task = make_task(config)
    prepare_data(task, World.alone(), Stop(), config.cluster.timeout_s)
    return len(open_data(task, config))


def stop_cause(stop: Stop, world: World) -> str:
    """The signal that some rank got."""
    return next(name for name in world.gather(stop.wanted or "") if name)


def say_looked(run: RunDir | None, looked: Looked, stream: Stream) -> None:
    """Say what was found before step 1."""
    for reason in looked.depends_on_hardware:
        _tell_depends(run, reason)
    for reason in looked.depends_on_cut:
        stream.tell(reason)
    for reason in looked.evaluation_depends:
        stream.tell_of_evaluation(reason)
    for reason in looked.skipped:
        tell(run, "trial_skipped", f"before step 1 the task could only be tried in part: {reason}", reason=reason)


def evaluation_depends_on_cut(reason: str) -> str:
    """Return what is said of evaluations whose draws don't follow the row."""
    return f"the values of evaluations aren't the same on other hardware or another evaluate.per_gpu: {reason}"


def _depends_on_cut(run: RunDir | None, config: RunConfig, reason: str) -> None:
    if config.numerics != "bitwise":  # where no hardware changes the cut
        _tell_depends(run, reason)


def _tell_depends(run: RunDir | None, reason: str) -> None:
    text = f"this run isn't the same on other hardware or another batch.per_gpu: {reason}"
    tell(run, "depends_on_cut", text, reason=reason)
