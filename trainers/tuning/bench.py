"""Make models and engines to measure with, one at a time, beside a run whose own state they don't touch.

Everything that a measurement changes is thrown away with its trial: weights, buffers, optimizer and data position are
those of the trial. Generators and the state of the task's object are restored.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from isobatch.conf.controllers import NoControl
from isobatch.conf.identity import digest, run_directory
from isobatch.scaling.errors import UserError
from isobatch.scaling.plan import Plan, Step
from isobatch.scaling.planning.lengths import Lengths
from isobatch.scaling.planning.resolve import resolve
from isobatch.scaling.units import Duration
from isobatch.trainers.checkpoints.resume import refuse_other_tensors
from isobatch.trainers.checkpoints.weights import initialise
from isobatch.trainers.data.loader import Loader
from isobatch.trainers.data.state import TrainState
from isobatch.trainers.data.validation import Validation
from isobatch.trainers.engines.engine import Engine
from isobatch.trainers.engines.make import make_engine
from isobatch.trainers.engines.state import Average
from isobatch.trainers.engines.step_report import Requests, Total, Update
from isobatch.trainers.launch.source import Source
from isobatch.trainers.loop.evaluate import Evaluator
from isobatch.trainers.loop.fit import Stepper
from isobatch.trainers.loop.opening import Opened
from isobatch.trainers.model.build import prepare
from isobatch.trainers.model.modes import Modes
from isobatch.trainers.model.randomness import Stream, generators_kept, seed_generators
from isobatch.trainers.optim.state_io import GROUPS
from isobatch.trainers.ranks.session import Session
from isobatch.trainers.tasks.task import make_model
from isobatch.trainers.tensors.manifest import Checkpoint, Damaged
from isobatch.trainers.tensors.slices import Reader
from isobatch.trainers.trial.untouched import Copies
from isobatch.trainers.tuning.progress import Progress

if TYPE_CHECKING:
    from isobatch.conf.schema import RunConfig


# Nothing of the run's schedule, and an LR so low that nothing diverges, whatever the batch.
NEUTRAL = {
    "rule": "none", "power": None, "noise_scale": None, "scale_weight_decay": False, "peak": 1e-9, "warmup_from": None,
    "warmup": Duration(0, "sa"), "decay": "constant",
}  # fmt: skip
LONG = Duration(10**12, "sa")  # more samples than a measurement takes, at any batch


class Interrupted(Exception):
    """A rank was asked to stop; raised on all ranks at the same step."""


@dataclass
class Trial:
    """A model in training that is thrown away.

    Attributes:
        state: its position; ``stepper``: takes its steps.
        evaluator: evaluates it; None without validation data.
    """

    bench: Bench
    model: nn.Module
    engine: Engine
    state: TrainState
    stepper: Stepper
    evaluator: Evaluator | None

    def step(self, *, lr: float | None = None) -> tuple[Step, Total, Update] | None:
        """Take the next step of the plan; return None at its end.

        Args:
            lr: in place of the plan's.

        Raises:
            Interrupted: a rank was asked to stop.
        """
        step = self.state.plan.step_at(self.state.samples)
        if step is None:
            return None
        if lr is not None:
            step = replace(step, recipe=replace(step.recipe, lr=lr))
        total, update = self.stepper.take(step, self._requests)
        self.state.advance(step, skipped=update.skipped)
        self.bench.session.watch.beat()
        if float(total.requests.stop):
            raise Interrupted
        return step, total, update

    def _requests(self) -> Requests:
        return Requests(stop=self.bench.session.stop.wanted is not None)

    def follow(self, plan: Plan) -> None:
        """Continue with the steps of another plan, from its first sample, with the same weights."""
        self.stepper.loader.close()
        self.state = TrainState(plan)
        self.stepper = replace(self.stepper, loader=self.bench.loader(self.engine, self.state))

    def evaluate(self, average: Average) -> dict[str, float]:
        """Return the values of an evaluation of averaged weights, as ``val/<name>``. Raises Interrupted."""
        assert self.evaluator is not None
        values = self.evaluator.of_weights([("val", average.swapped())])
        if values is None:
            raise Interrupted
        return values


@dataclass
class Bench:
    """Make trials of a task on all ranks.

    Attributes:
        config: the run's config.
        opened: the task, its data, and the run's plan.
        validation: the validation data; None if the task has none.
        progress: shows intermediate results on rank 0.
        run: the directory of the run that is tuned.
        stream: keys the random numbers of a forward.
    """

    session: Session
    opened: Opened
    validation: Validation | None
    progress: Progress
    config: RunConfig = field(init=False)
    run: Path = field(init=False)
    stream: Stream = field(init=False)

    def __post_init__(self) -> None:
        self.config = self.session.config
        given = self.session.start.run_dir  # of action=tune the folder of its results, in the run directory
        self.run = Path(given) if given else run_directory(self.config)
        if given and self.config.action == "tune":
            self.run = self.run.parent
        self.stream = Stream(self.config.seed, self.session.world.device, _silent)

    @cached_property
    def code(self) -> str:
        """Return a hash of the task's source files. It is looked up once, since that asks git."""
        source = Source(self.config)
        source.look()
        return digest(source.files)

    def plan(self, global_size: int, per_gpu: int | None = None) -> Plan:
        """Return a plan with another batch, and with steps enough for any measurement; its LR hardly changes weights.

        Args:
            global_size, per_gpu: samples.
        """
        unit = self.opened.plan.units_per_sample if self.config.batch.unit == "tokens" else 1
        sizes = {"global_size": global_size * (unit or 1), "per_gpu": per_gpu and per_gpu * (unit or 1)}
        batch = self.config.batch.model_copy(update={**sizes, "accumulation": None, "schedule": None, "even": False})
        given = tuple({*self.config.given, "batch.global_size"} - {"batch.accumulation", "batch.schedule"})
        config, off = self.config, {"every": None}
        changed = {
            "batch": batch,
            "lr": config.lr.model_copy(update=NEUTRAL),
            "duration": LONG,
            "evaluate": config.evaluate.model_copy(update=off),
            "checkpoint": config.checkpoint.model_copy(update={**off, "keep_every": None, "best": None}),
            "noise": config.noise.model_copy(update=off),
            "control": NoControl(name="none"),
            "ema": None,
            "given": given,
        }
        config = config.model_copy(update=changed)
        return resolve(config, self.session.world.size, len(self.opened.data))

    @contextmanager
    def trial(self, plan: Plan, checkpoint: Checkpoint | None = None) -> Iterator[Trial]:
        """Yield a new model in training; it and all that its steps change is gone afterwards.

        Args:
            plan: defines its steps.
            checkpoint: the state to start from; None: step 0, with the weights of ``init_from``, if given.
        """
        config, world, task = self.config, self.session.world, self.opened.task
        self.session.watch.beat()
        with generators_kept(world.device), Copies(task.own, nn.Module(), world.device).held():
            seed_generators(config.seed)
            model = prepare(make_model(config, task), config, self.stream, world.size)
            modes = Modes(model)
            if checkpoint is None and config.init_from:
                initialise(model, config.init_from, world)
            groups = () if checkpoint is None else checkpoint.values.get(GROUPS, ())
            engine = make_engine(config, task, model, plan.peak, world, groups)
            state = TrainState(plan)
            if checkpoint is not None:
                refuse_other_model(checkpoint, engine, config.optimizer.name)
                engine.restore(Reader(checkpoint, self.session.watch.beat))
                state.samples, state.steps = checkpoint.header.samples, checkpoint.header.step
            modes.train()
            stepper = Stepper(engine, self.loader(engine, state), self.stream, self.session.watch, config.clip_norm)
            trial = Trial(self, model, engine, state, stepper, self._evaluator(model, engine))
            try:
                yield trial
            finally:
                trial.stepper.loader.close()
                del engine, model, modes, stepper, trial
                gc.collect()
                if world.device.type != "cpu":
                    torch.accelerator.empty_cache()

    def loader(self, engine: Engine, state: TrainState) -> Loader:
        """Return a loader of this rank's micro-batches."""
        data, workers = self.opened.data, self.config.data.workers
        task, world = self.opened.task, self.session.world
        return Loader(data, task, state, world, workers, self.stream.tell, stand_ins=engine.lockstep)

    def _evaluator(self, model: nn.Module, engine: Engine) -> Evaluator | None:
        if self.validation is None:
            return None
        session, config = self.session, self.config
        return Evaluator(
            self.opened.task, model, self.validation, session.world, self.stream, self.opened.evaluation_batch,
            config.precision, engine, session.stop, session.watch, session.watch.excused,
        )  # fmt: skip

    def samples(self) -> int | None:
        """Return ``tune.samples`` in samples; None if it isn't given."""
        wanted, plan = self.config.tune.samples, self.opened.plan
        if wanted is None:
            return None
        lengths = Lengths(plan.segments, plan.train_samples, plan.units_per_sample, plan.samples)
        return lengths.samples("tune.samples=", wanted)

    def say(self, text: str, share: float | None = None) -> None:
        """Show an intermediate result; ``share``: of the part that is done."""
        self.progress.say(text, share)

    def refuse_stop(self) -> None:
        """Raise Interrupted on all ranks if any rank was asked to stop; all ranks call it."""
        if self.session.world.any(self.session.stop.wanted is not None):
            raise Interrupted

    def most(self, number: float) -> float:
        """Return the largest of the ranks' numbers."""
        return max(map(float, self.session.world.gather(repr(float(number)))))

    def least(self, number: float) -> float:
        """Return the smallest of the ranks' numbers."""
        return min(map(float, self.session.world.gather(repr(float(number)))))

    def agree(self, found: Any) -> Any:
        """Return rank 0's JSON value on all ranks."""
        return json.loads(self.session.world.agree(json.dumps(found)))


def _silent(reason: str) -> None:
    """Say nothing: what depends on the cut is said when the run trains."""


def refuse_other_model(checkpoint: Checkpoint, engine: Engine, optimizer: str) -> None:
    """Raise UserError if a checkpoint doesn't fit the model or its optimizer."""
    try:
        refuse_other_tensors(checkpoint, engine, engine.values()[GROUPS], own=optimizer == "custom")
    except Damaged as error:
        fix = "give a checkpoint of the same task, model and optimizer"
        raise UserError(f"{checkpoint.path} can't be restored: {error}", fix, "init_from") from None
