"""One run, as every worker of it sees it: from the config to the trained weights."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from conf.stored import dump
from scaling.geometry import counted
from scaling.plan import Plan
from scaling.record import to_json
from scaling.resolve import resolve
from scaling.table import table
from scaling.units import Duration
from trainers.engines import make_engine
from trainers.enter import enter, refuse_unless_same
from trainers.evaluate import make_evaluate
from trainers.fit import fit
from trainers.keyed import Stream, key_dropout
from trainers.loader import Loader
from trainers.locate import build
from trainers.metrics import Metrics, say
from trainers.notes import restarts
from trainers.optim import make_optimizer
from trainers.rundir import Outcome, Refused, RunDir, write_atomic
from trainers.state import TrainState
from trainers.stop import Stop
from trainers.tally import Pulse
from trainers.tasks import Task, make_task, open_data
from trainers.world import World

if TYPE_CHECKING:
    from conf.schema import RunConfig

# Held until the process ends: gloo's destructor hangs where objects of the training die before the process does.
_KEPT: list[Any] = []


def train(
    config: RunConfig, facts: dict[str, str], world: World, stop: Stop, entered: Callable[[RunDir], None]
) -> Outcome:
    """The body of every worker, the same on all ranks: train as ``config`` says, and leave the run directory.

    Args:
        facts: ``command``, ``commit``, ``attempt`` (id of this start) and ``run_dir``, the same on all ranks.
        entered: called with the run directory once it is this launch's; before that nothing is written to it.

    Returns:
        ``finished`` or ``stopped``, the same on all ranks.

    Raises:
        Refused: what the user gave can't work.
        Exception: a crash; with the attributes ``step`` and ``samples``, how far the run had come.
    """
    run, before = enter(config, facts, world)
    entered(run)
    if before and before.state == "finished":
        return before
    random.seed(config.seed)
    np.random.seed(config.seed % 2**32)
    torch.manual_seed(config.seed)
    task = make_task(config)
    data = open_data(task, config)
    refuse_unless_same(world, "the number of samples that train_data() has", len(data))
    plan = plan_of(config, world.size, len(data))
    stream = Stream(config.seed, world.device, tell=partial(_warn, run, world))
    model = key_dropout(make_model(config, task), stream).to(world.device)
    tuned = make_optimizer(config, task, model, plan.peak)
    engine = make_engine(config, task, model, tuned, world)
    state = TrainState(plan)
    loader = Loader(data, task, state, world, config.data.workers, stream.tell)
    evaluate = make_evaluate(task, model, world, plan.cut.per_gpu)
    if world.rank == 0:  # from here on it isn't the attempt before any more
        write_atomic(run.path / "config.yaml", dump(config))
        write_atomic(run.path / "plan.json", to_json(plan) + "\n")
        if config.task.train_samples is None:
            say(table(plan))
        if before and before.step:
            say(f"begins anew: the last attempt {before.state} after {counted(before.step, 'step')}")
        say(f"training on {counted(world.size, 'rank')} ({world.device.type}) · {run.path}")
    metrics = Metrics(run if world.rank == 0 else None, state, live=not config.debug)
    _KEPT.extend((engine, loader, metrics))
    for reason in dependent_on_cut(model):
        stream.tell(reason)
    model.train()
    try:
        done = fit(
            state,
            engine,
            loader,
            stream,
            Pulse(world.device),
            metrics,
            stop,
            clip_norm=config.clip_norm,
            log_every=in_samples(config.log.every, plan),
            evaluate=evaluate,
            evaluate_every=None if config.evaluate.every is None else in_samples(config.evaluate.every, plan),
        )
    except Exception as error:
        error.step, error.samples = state.steps, state.samples  # type: ignore[attr-defined]
        raise
    finally:
        loader.close()
        metrics.close()
    cause = "" if done else stop_cause(stop, world)
    outcome = Outcome(
        "finished" if done else "stopped", cause, state.steps, state.samples, facts["attempt"], restarts()
    )
    if world.rank == 0:
        if done:
            save_final(run, model)
        run.event(outcome.state, cause=cause, step=state.steps, samples=state.samples)
        run.write_outcome(outcome)
    return outcome


def plan_of(config: RunConfig, world: int, train_samples: int | None) -> Plan:
    """``resolve``, whose refusals are the user's to hear."""
    try:
        return resolve(config, world, train_samples)
    except ValueError as error:
        raise Refused(str(error)) from None


def count_samples(config: RunConfig) -> int:
    """Open the task's training data and count it, for a plan that wants to know."""
    return len(open_data(make_task(config), config))


def make_model(config: RunConfig, task: Task) -> nn.Module:
    """``model._target_`` called with ``model.args``, or the task's own model."""
    if config.model.target is None:
        model, what = task.model(), "task.model()"
    else:
        model, what = build("model", config.model.target, config.model.args), f"model._target_={config.model.target}"
    if not isinstance(model, nn.Module):
        raise Refused(f"{what} gives a {type(model).__name__}, not a torch.nn.Module")
    return model


def in_samples(every: Duration, plan: Plan) -> int:
    """An interval of the config in samples, at least 1."""
    samples = every.samples(
        global_size=plan.cut.global_size,
        train_samples=plan.train_samples,
        units_per_sample=plan.units_per_sample,
        run_samples=plan.samples,
    )
    return max(1, samples or 1)


def stop_cause(stop: Stop, world: World) -> str:
    """The signal that some rank got."""
    return next(name for name in world.gather(stop.wanted or "") if name)


def save_final(run: RunDir, model: nn.Module) -> None:
    """The model's weights and buffers as safetensors, all or nothing."""
    from safetensors.torch import save_model

    aside = run.path / ".final.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    weights = aside / "model.safetensors"
    save_model(model, str(weights))
    os.umask(umask := os.umask(0))
    weights.chmod(0o666 & ~umask)  # as any other file here; safetensors keeps it to its owner
    with open(weights, "rb") as written:
        os.fsync(written.fileno())
    shutil.rmtree(run.final, ignore_errors=True)
    aside.rename(run.final)


def dependent_on_cut(model: nn.Module) -> list[str]:
    """What in ``model`` makes its training depend on how a global batch is cut, as far as its modules tell."""
    norms = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    dropping = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention | nn.RNNBase) and module.dropout > 0
    ]
    reasons = [f"{counted(norms, 'BatchNorm layer')} with statistics of one micro-batch"] if norms else []
    return reasons + ([f"dropout inside of {', '.join(dropping)}, which isn't an nn.Dropout"] if dropping else [])


def _warn(run: RunDir, world: World, reason: str) -> None:
    if world.rank == 0:
        run.event("depends_on_cut", reason=reason)
        say(f"warning: this run isn't the same on other hardware or another batch.per_gpu: {reason}")
