"""The whole config and its checks. Every default, and the meaning of every key, is in the YAML files beside this file.

Models are frozen: ``5%`` stays a Duration until the plan knows the run.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from isobatch.conf.controllers import AnyControl
from isobatch.conf.engines import AnyEngine
from isobatch.conf.groups import Cluster, Optimizer
from isobatch.conf.recipe import Batch, BatchNorm, Data, LearningRate, Model, Task
from isobatch.conf.trackers import Log
from isobatch.conf.types import (
    Dtype,
    HalfLife,
    Interval,
    IntervalOrMinutes,
    Length,
    Matching,
    Minutes,
    Modules,
    Name,
    Path,
    Section,
    Text,
)
from isobatch.scaling.errors import UserError
from isobatch.scaling.limits import NotNegative, Positive, Seed, Size
from isobatch.scaling.stopping import AT, VALUE

BestOf = Annotated[
    str,
    Matching(rf"{VALUE}:(max|min)", "a value of evaluations and which is best: val/accuracy:max", (":max", ":min")),
]

Reached = Annotated[
    str, Matching(AT, "a value of evaluations and its target, such as val/accuracy>=0.97", (">=0.9", "<=0.1"))
]


class Checkpoint(Section):
    every: IntervalOrMinutes | None
    keep: Size
    keep_every: Interval | None
    best: BestOf | None
    on_error: Literal["continue", "stop"]


class Evaluate(Section):
    every: Interval | None
    first: bool
    last: bool
    per_gpu: Size | None
    samples: Size | None


class Noise(Section):
    every: Interval | None
    parts: Literal[2] | None


class Stop(Section):
    when: BestOf | None
    patience: Size
    min_delta: NotNegative
    at: Reached | None
    after: Minutes | None


class Search(Section):
    parallel: Size


class Check(Section):
    contract: bool


class Report(Section):
    dir: Path | None
    metric: Text | None
    target: Text | None
    where: Text | None
    sort: Text | None
    points: Text | None


class Run(Section):
    dir: Path | tuple[Path, ...] | None
    config: Path | None
    name: Name | None
    new: bool

    @property
    def directory(self) -> str | None:
        """Return the one directory that was given; None if there is none, or several."""
        return self.dir if isinstance(self.dir, str) else None

    @property
    def directories(self) -> tuple[str, ...]:
        """Return all directories that were given."""
        return () if self.dir is None else (self.dir,) if isinstance(self.dir, str) else self.dir


class PlanOptions(Section):
    open_data: bool
    memory: bool


Part = Literal["memory", "speed", "noise", "branch", "law", "lr", "sharpness"]


class Tune(Section):
    parts: Annotated[tuple[Part, ...], Field(min_length=1)]
    margin: Annotated[float, Field(ge=0, lt=1)]
    max_step_ms: Positive | None
    samples: Interval | None


class RunConfig(Section):
    """Hold the whole config of a run.

    Attributes:
        given: keys given on the command line or in an experiment, dotted; a group's choice by the group's name.
        chosen: groups whose choice ``auto`` made, and why it is this one.
    """

    action: Literal["train", "plan", "evaluate", "tune", "runs", "report", "requeue"]
    output: Literal["text", "full", "json"]
    duration: Length
    seed: Seed
    device: Literal["auto", "cpu", "cuda"]
    debug: bool
    init_from: Path | None
    clip_norm: Positive | None
    ema: HalfLife | None
    on_nonfinite: Literal["stop", "skip"]
    precision: Literal["fp32"] | Dtype
    numerics: Literal["fast", "bitwise"]
    compile: bool
    recompute: Modules
    batch: Batch
    batchnorm: BatchNorm
    lr: LearningRate
    model: Model
    data: Data
    evaluate: Evaluate
    checkpoint: Checkpoint
    noise: Noise
    log: Log
    stop: Stop
    search: Search
    check: Check
    run: Run
    plan: PlanOptions
    tune: Tune
    report: Report
    task: Task
    optimizer: Annotated[Optimizer, Field(discriminator="name")]
    engine: AnyEngine
    control: Annotated[AnyControl, Field(discriminator="name")]
    cluster: Annotated[Cluster, Field(discriminator="name")]
    given: tuple[str, ...]
    chosen: dict[str, str]

    @model_validator(mode="after")
    def _values_of_an_average_have_one(self) -> RunConfig:
        for key, value in self._of_evaluations().items():
            if self.ema is None and str(value).startswith("ema/"):
                problem = f"{key}={value} needs an average of the weights, and there is none"
                raise UserError(problem, "give ema=1ep, for example", key)
        return self

    def _of_evaluations(self) -> dict[str, str | None]:
        """Return the keys that name a value of an evaluation."""
        return {"checkpoint.best": self.checkpoint.best, "stop.when": self.stop.when, "stop.at": self.stop.at}

    @model_validator(mode="after")
    def _early_ends_are_possible(self) -> RunConfig:
        for key, value in (("stop.when", self.stop.when), ("stop.at", self.stop.at)):
            if value and self.evaluate.every is None:
                problem = f"{key}={value} needs evaluations during the run, and evaluate.every is null"
                raise UserError(problem, "give evaluate.every=1ep, for example", key)
        return self

    @model_validator(mode="after")
    def _evaluations_have_data(self) -> RunConfig:
        asked = {**self._of_evaluations(), "evaluate.first": self.evaluate.first}
        key = next((key for key, wanted in asked.items() if wanted), "")
        if key and self.data.target is not None and self.data.val_args is None:
            problem = f"{key} needs validation data, and data._target_={self.data.target} has none without val_args"
            raise UserError(problem, f"give data.val_args={{split: test}}, for example, or leave {key} out", key)
        return self

    @model_validator(mode="after")
    def _bitwise_cuts_are_given(self) -> RunConfig:
        if self.numerics == "bitwise" and self.batch.per_gpu == "auto":
            problem = "with numerics=bitwise, batch.per_gpu is part of the run's identity, and auto isn't a number"
            fix = "give a number; action=tune tune.parts=[memory] shows the largest that fits"
            raise UserError(problem, fix, "batch.per_gpu", "auto")
        return self

    @model_validator(mode="after")
    def _an_array_has_its_own_limit(self) -> RunConfig:
        if self.search.parallel > 1 and self.cluster.name == "slurm":
            problem = (
                f"search.parallel={self.search.parallel} is for runs on this machine, and cluster=slurm submits them"
            )
            fix = f"give cluster.max_parallel={self.search.parallel}"
            raise UserError(problem, fix, "search.parallel", self.search.parallel)
        return self

    @model_validator(mode="after")
    def _action_has_what_it_needs(self) -> RunConfig:
        if self.output == "json" and self.action in ("train", "requeue"):
            printing = "action=plan, evaluate, tune, runs and report print"
            problem = f"output=json is how {printing}, and action is {self.action}"
            raise UserError(problem, "leave out one of them", "output")
        if isinstance(self.run.dir, tuple) and self.action not in ("runs", "report"):
            problem = f"run.dir is a list of {len(self.run.dir)}, and action={self.action} works in one directory"
            raise UserError(problem, "name one of them; action=report compares several", "run.dir")
        if self.action == "evaluate" and self.init_from is None:
            fix = "give a run directory, a checkpoint of one, or a .safetensors file"
            raise UserError("action=evaluate needs init_from", fix, "init_from")
        return self
