"""Sections of the config that say what is trained: task, model, batch, learning rate, data.

Every default, and the meaning of every key, is in the YAML files beside this file.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, PlainValidator, model_validator

from isobatch.conf.types import (
    Free,
    LengthOrShare,
    Name,
    OneOf,
    Section,
    Target,
    Usual,
    refuse_repeated,
)
from isobatch.scaling.batch_schedule import BatchSchedule
from isobatch.scaling.errors import UserError
from isobatch.scaling.families import FAMILIES
from isobatch.scaling.limits import LARGEST, Memory, NotNegative, Number, Positive, Share, Size
from isobatch.scaling.rules import LAWS
from isobatch.scaling.schedule import DECAYS

PACKAGE = "isobatch."
SHIPPED_TASKS = tuple(
    f"{PACKAGE}trainers.tasks.{name}" for name in ("digits.Digits", "images.Images", "mnist1d.Mnist1D", "text.Text")
)
WORKERS = 1024  # processes that load data, of each rank


class Tuned(Usual):
    """The recipe of a tuning. A missing field comes from the optimizer's YAML.

    Attributes:
        samples: the samples that each run of the tuning trained on, from which ``tune.parts=[law]`` carries the batch.
    """

    samples: Size | None = None
    betas: tuple[Memory, ...] | None = None
    eps: Positive | None = None
    weight_decay: NotNegative | None = None


def _by_its_present_name(target: object) -> object:
    """Accept a shipped task under the name that it had before all of Isobatch was importable as one package."""
    present = f"{PACKAGE}{target}"
    return present if present in SHIPPED_TASKS else target


class Task(Section):
    name: Name
    target: Annotated[Target, BeforeValidator(_by_its_present_name)] = Field(alias="_target_")
    args: Free
    local: Free
    train_samples: Size | None
    units_per_sample: Size | None
    family: Annotated[str, OneOf(tuple(FAMILIES))] | None
    tuned: dict[str, Tuned]

    @model_validator(mode="after")
    def _an_argument_is_given_once(self) -> Task:
        refuse_repeated("task", "args", self.args, self.local)
        return self


class Model(Section):
    target: Target | None = Field(alias="_target_")
    args: Free

    @model_validator(mode="after")
    def _args_are_someones(self) -> Model:
        if self.args and self.target is None:
            problem, fix = "model.args needs model._target_", "the task's own model takes task.args"
            raise UserError(problem, fix, "model.args")
        return self


class Batch(Section):
    global_size: Size | Literal["all"]
    per_gpu: Size | Literal["auto"] | None
    accumulation: Size | None
    unit: Literal["samples", "tokens"]
    schedule: (
        Annotated[BatchSchedule, PlainValidator(BatchSchedule.parse), PlainSerializer(str, return_type=str)] | None
    )
    even: bool

    @property
    def given_per_gpu(self) -> int | None:
        """Return ``per_gpu`` if it is a number: None if it isn't given, or is measured at the start."""
        return None if self.per_gpu == "auto" else self.per_gpu

    @model_validator(mode="after")
    def _a_measured_size_decides_accumulation(self) -> Batch:
        if self.per_gpu == "auto" and self.accumulation is not None:
            problem = f"batch.per_gpu=auto decides the accumulation, but batch.accumulation={self.accumulation}"
            fix = "leave out batch.accumulation, or give batch.per_gpu=null"
            raise UserError(problem, fix, "batch.accumulation", self.accumulation)
        return self

    @model_validator(mode="after")
    def _a_schedule_leaves_accumulation_open(self) -> Batch:
        if self.schedule is not None and self.accumulation is not None:
            problem = f"batch.accumulation={self.accumulation} can't hold while batch.schedule={self.schedule} moves"
            raise UserError(problem, "leave it out; batch.per_gpu bounds every stage", "batch.accumulation")
        return self


class BatchNorm(Section):
    mode: Literal["ghost", "sync"] | None
    ghost_size: Annotated[int, Field(ge=2, le=LARGEST)] | None

    @model_validator(mode="after")
    def _ghosts_have_a_size(self) -> BatchNorm:
        if self.mode == "ghost" and self.ghost_size is None:
            problem = "batchnorm.mode=ghost needs batchnorm.ghost_size, in samples"
            raise UserError(problem, "give batchnorm.ghost_size=32, for example", "batchnorm.ghost_size")
        if self.mode != "ghost" and self.ghost_size is not None:
            problem = f"batchnorm.ghost_size={self.ghost_size} is only used by batchnorm.mode=ghost"
            raise UserError(problem, "leave it out, or give that mode", "batchnorm.ghost_size")
        return self


class LearningRate(Section):
    base: Positive | None
    base_batch: Size | None
    rule: Annotated[str, OneOf(("auto", *LAWS))]
    power: Number | None
    noise_scale: Positive | None
    scale_weight_decay: bool
    peak: Positive | None
    warmup: LengthOrShare
    warmup_from: NotNegative | None
    decay: Annotated[str, OneOf(tuple(DECAYS))]
    final: Share
    exponent: Positive
    milestones: tuple[LengthOrShare, ...]
    gamma: Positive
    cooldown: LengthOrShare

    @model_validator(mode="after")
    def _parts_fit(self) -> LearningRate:
        powers = [name for name, law in LAWS.items() if law.powers]
        measured = [name for name, law in LAWS.items() if law.measured]
        for key, value, users in (("lr.power", self.power, powers), ("lr.noise_scale", self.noise_scale, measured)):
            if value is not None and self.rule not in users:
                problem = f"{key}={value:g} is only used by lr.rule={' or '.join(users)}, not {self.rule}"
                raise UserError(problem, "leave it out, or name the rule", key)
        if self.rule in powers and not LAWS[self.rule].usual_power and self.power is None:
            problem = f"lr.rule={self.rule} needs lr.power, its exponent"
            raise UserError(problem, "1 is lr.rule=linear, 0.5 is lr.rule=sqrt", "lr.power")
        if self.rule in measured and self.noise_scale is None:
            problem = f"lr.rule={self.rule} needs lr.noise_scale, in samples"
            raise UserError(problem, "noise.every=10st measures it, as noise/scale", "lr.noise_scale")
        if self.decay == "step" and not self.milestones:
            raise UserError("lr.decay=step needs lr.milestones", "give lr.milestones=[50%,75%]", "lr.milestones")
        return self


class Data(Section):
    target: Target | None = Field(alias="_target_")
    args: Free
    val_args: Free | None
    local: Free
    workers: Annotated[int, Field(ge=0, le=WORKERS)]
    fingerprint: bool

    @model_validator(mode="after")
    def _args_are_someones(self) -> Data:
        if self.target is None and (self.args or self.val_args is not None or self.local):
            problem = "data.args, data.val_args and data.local need data._target_"
            raise UserError(problem, "the task's own data takes task.args and task.local", "data._target_")
        return self

    @model_validator(mode="after")
    def _an_argument_is_given_once(self) -> Data:
        refuse_repeated("data", "args", self.args, self.local)
        refuse_repeated("data", "val_args", self.val_args, self.local)
        return self
