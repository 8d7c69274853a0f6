"""What a run's config may hold: types and checks. Every default is in the YAML files beside this one, none is here.

Attributes are named as the keys are; what each key means is said in the YAML. Models are frozen, and what was read is
never changed: ``5%`` stays a Duration until the plan knows the run.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, PlainValidator, model_validator

from isobatch.conf.groups import Engine
from isobatch.conf.types import Free, Modules, Section
from isobatch.scaling.batch_schedule import BatchSchedule
from isobatch.scaling.limits import LARGEST, Count, Memory, NotNegative, Number, Positive, Seed, Share, Size
from isobatch.scaling.rules import LAWS
from isobatch.scaling.units import EXAMPLES, Duration

PACKAGE = "isobatch."
SHIPPED_TASKS = tuple(
    f"{PACKAGE}trainers.tasks.{name}" for name in ("digits.Digits", "images.Images", "mnist1d.Mnist1D", "text.Text")
)
WORKERS = 1024  # processes that load data, of each rank
NAME_BYTES, PATH_BYTES = 255, 3800  # Linux allows 4,096, of which what Isobatch puts below needs some


def _with_minutes(value: object) -> Duration:
    try:
        duration = value if isinstance(value, Duration) else Duration.parse(value)
    except ValueError as error:
        units = ", 10min (minutes)" if EXAMPLES in str(error) else ""
        raise ValueError(f"{error}{units}") from None
    return _lasting(duration)


def _half_life(value: object) -> Duration:
    try:
        return _lasting(_duration(value))
    except ValueError as error:
        raise ValueError(f"{error}; ema is the half-life of the average, not its decay") from None


def _duration(value: object) -> Duration:
    duration = value if isinstance(value, Duration) else Duration.parse(value)
    if duration.unit == "min":
        raise ValueError(f"{duration}: only checkpoint.every may be in minutes; use ep, st, sa, tok or %")
    return duration


def _batch_schedule(value: object) -> BatchSchedule:
    return value if isinstance(value, BatchSchedule) else BatchSchedule.parse(value)


def _lasting(duration: Duration) -> Duration:
    if duration.value == 0:
        raise ValueError(f"{duration}: an interval has to be more than 0")
    return duration


def _matching(pattern: str, like: str) -> AfterValidator:
    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"{text!r:.200} has to be {like}")
        return text

    return AfterValidator(check)


def _ascending(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] > bounds[1]:
        raise ValueError(f"{list(bounds)} has to be [least, most]")
    return bounds


def _reachable(address: str) -> str:
    if not 1 <= int(address.rpartition(":")[2]) <= 65535:
        raise ValueError(f"{address}: ports are 1 to 65535")
    return address


def _nameable(path: str) -> str:
    """Reject a path that no file system can hold; ``~`` may still grow."""
    longest = max((len(part.encode()) for part in path.split("/")), default=0)
    if "\0" in path:
        raise ValueError(f"{path!r:.100}: a path can't hold NUL")
    if longest > NAME_BYTES or len(path.encode()) > PATH_BYTES:
        raise ValueError(
            f"{path[:60]}…: a path has at most {PATH_BYTES} bytes, and each name in it at most {NAME_BYTES}; this one "
            f"has {len(path.encode()):,}, and a name of {longest:,}"
        )
    return path


Length = Annotated[Duration, PlainValidator(_duration), PlainSerializer(str, return_type=str)]
Interval = Annotated[Length, AfterValidator(_lasting)]
Seconds = Annotated[float, Field(gt=0, le=1e9)]  # what clocks can count
Bounds = Annotated[tuple[NotNegative, NotNegative], AfterValidator(_ascending)]
Name = Annotated[str, _matching(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]{0,99}", "a folder's name: letters, digits, . _ + = -")]
Target = Annotated[str, _matching(r"[^\W\d]\w*(\.[^\W\d]\w*)+", "a class or function with its module: my_package.Name")]
Variable = Annotated[str, _matching(r"[A-Za-z_][A-Za-z0-9_]*", "the name of an environment variable")]
HostAndPort = Annotated[
    str, _matching(r"[\w.:\[\]-]*[\w\]]:\d{1,5}", "host:port, as node-1:29500"), AfterValidator(_reachable)
]
Word = Annotated[str, _matching(r"\S+", "a word without spaces")]
Text = Annotated[str, _matching(r"[^\0]+", "text that isn't empty")]
Path = Annotated[str, Field(min_length=1), AfterValidator(_nameable)]
Flag = Annotated[
    str, _matching(r"--\w[^\0\n]*|-\w[^\0\n]*", "an option of sbatch, as --exclusive or --gres=gpu:a100:4")
]


class Usual(Section):
    """A learning rate with the global batch, in samples, that it goes with."""

    lr: Positive
    batch: Size


class Tuned(Usual):
    """The recipe of a tuning; of what it doesn't say, the optimizer's YAML holds."""

    betas: tuple[Memory, ...] | None = None
    eps: Positive | None = None
    weight_decay: NotNegative | None = None


def _refuse_repeated(section: str, args: str, given: Free | None, local: Free) -> None:
    """Raise ValueError where a keyword argument is given both as science and as local; null isn't given."""
    if repeated := [name for name in local if (given or {}).get(name) is not None]:
        names = ", ".join(f"{section}.local.{name}" for name in repeated)
        science = ", ".join(f"{section}.{args}.{name}" for name in repeated)
        raise ValueError(f"{names} repeats {science}: leave out one of the two")


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
    family: str | None
    tuned: dict[str, Tuned]

    @model_validator(mode="after")
    def _an_argument_is_given_once(self) -> Task:
        _refuse_repeated("task", "args", self.args, self.local)
        return self


class Model(Section):
    target: Target | None = Field(alias="_target_")
    args: Free

    @model_validator(mode="after")
    def _args_are_someones(self) -> Model:
        if self.args and self.target is None:
            raise ValueError("model.args needs model._target_; the task's own model takes task.args")
        return self


class Batch(Section):
    global_size: Size | Literal["all"]
    per_gpu: Size | None
    accumulation: Size | None
    unit: Literal["samples", "tokens"]
    schedule: Annotated[BatchSchedule, PlainValidator(_batch_schedule), PlainSerializer(str, return_type=str)] | None
    even: bool

    @model_validator(mode="after")
    def _a_schedule_leaves_accumulation_open(self) -> Batch:
        if self.schedule is not None and self.accumulation is not None:
            raise ValueError(
                f"batch.schedule={self.schedule} changes the global batch, and batch.accumulation={self.accumulation} "
                "with it: leave batch.accumulation out; batch.per_gpu bounds every stage"
            )
        return self


class BatchNorm(Section):
    mode: Literal["ghost", "sync"] | None
    ghost_size: Annotated[int, Field(ge=2, le=LARGEST)] | None

    @model_validator(mode="after")
    def _ghosts_have_a_size(self) -> BatchNorm:
        if self.mode == "ghost" and self.ghost_size is None:
            raise ValueError("batchnorm.mode=ghost needs batchnorm.ghost_size, samples: batchnorm.ghost_size=32")
        if self.mode != "ghost" and self.ghost_size is not None:
            raise ValueError(f"batchnorm.ghost_size={self.ghost_size} is only used by batchnorm.mode=ghost")
        return self


class LearningRate(Section):
    base: Positive | None
    base_batch: Size | None
    rule: Literal["auto", "linear", "sqrt", "legw", "power", "sde", "half-life", "noise", "surge", "none"]
    power: Number | None
    noise_scale: Positive | None
    scale_weight_decay: bool
    peak: Positive | None
    warmup: Length
    warmup_from: NotNegative | None
    decay: Literal["cosine", "linear", "polynomial", "step", "constant", "wsd"]
    final: Share
    exponent: Positive
    milestones: tuple[Length, ...]
    gamma: Positive
    cooldown: Length

    @model_validator(mode="after")
    def _parts_fit(self) -> LearningRate:
        law = LAWS.get(self.rule)
        if self.rule == "power" and self.power is None:
            raise ValueError("lr.rule=power needs lr.power, its exponent: 1 is rule=linear, 0.5 is rule=sqrt")
        if self.power is not None and not (law and law.powers):
            users = " and ".join(name for name, law in LAWS.items() if law.powers)
            raise ValueError(f"lr.power={self.power} is only used by lr.rule={users}; lr.rule is {self.rule}")
        if law and law.measured and self.noise_scale is None:
            raise ValueError(
                f"lr.rule={self.rule} needs lr.noise_scale, in samples: noise.every=10st measures it, as noise/scale"
            )
        if self.noise_scale is not None and not (law and law.measured):
            raise ValueError(
                f"lr.noise_scale={self.noise_scale} is only used by lr.rule=noise and surge, not {self.rule}"
            )
        if self.decay == "step" and not self.milestones:
            raise ValueError("lr.decay=step needs lr.milestones: lr.milestones=[50%,75%]")
        return self


class _Optimizer(Section):
    name: str
    family: Literal["sgd", "adam"]
    weight_decay: NotNegative | None
    usual: Usual | None
    args: Free

    @model_validator(mode="after")
    def _args_repeat_no_key(self) -> _Optimizer:
        keys = type(self).model_fields.keys() - {"name", "family", "usual", "args", "target"}
        for name in self.args:
            if name == "lr" or (name in keys and getattr(self, name) is not None):
                key = "lr.base or lr.peak" if name == "lr" else f"optimizer.{name}"
                raise ValueError(f"optimizer.args.{name} repeats a key of the config, which rules: use {key}")
        return self

    @property
    def memory(self) -> tuple[float, ...]:
        """Decay rates of the moments: (momentum,), (beta 1, beta 2), or () where they aren't known."""
        return ()

    @property
    def epsilon(self) -> float | None:
        return None


class _WithMomentum(_Optimizer):
    momentum: Memory
    nesterov: bool

    @model_validator(mode="after")
    def _nesterov_looks_along_momentum(self) -> _WithMomentum:
        if self.nesterov and self.momentum == 0:
            raise ValueError("optimizer.nesterov=true needs optimizer.momentum above 0; or optimizer.nesterov=false")
        return self

    @property
    def memory(self) -> tuple[float, ...]:
        return (self.momentum,)


class _WithBetas(_Optimizer):
    betas: tuple[Memory, Memory]
    eps: Positive

    @property
    def memory(self) -> tuple[float, ...]:
        return self.betas

    @property
    def epsilon(self) -> float | None:
        return self.eps


class SGD(_WithMomentum):
    name: Literal["sgd"]


class AdamW(_WithBetas):
    name: Literal["adamw"]


class LAMB(_WithBetas):
    name: Literal["lamb"]
    bias_correction: bool | Literal["after"]
    trust_clip: Bounds | None
    norm_clip: Bounds | None
    always_adapt: bool


class LARS(_WithMomentum):
    name: Literal["lars"]
    trust_coefficient: Positive
    eps: NotNegative
    scaled_momentum: bool
    trust_clip: bool
    always_adapt: bool


class Adafactor(_Optimizer):
    name: Literal["adafactor"]
    beta2_decay: Annotated[Number, Field(le=0)]
    eps: tuple[NotNegative | None, NotNegative]
    d: Annotated[Number, Field(ge=1)]


class Muon(_WithMomentum):
    name: Literal["muon"]
    betas: tuple[Memory, Memory]
    eps: Positive


class CustomOptimizer(_Optimizer):
    name: Literal["custom"]
    target: Target = Field(alias="_target_")


class _Cluster(Section):
    nodes: Size
    gpus_per_node: Size | Literal["auto"]
    max_restarts: Count
    timeout_s: Seconds
    environment: dict[Variable, Annotated[str, _matching(r"[^\0]*", "text without NUL")] | int]


class Local(_Cluster):
    name: Literal["local"]
    rendezvous: HostAndPort | None

    @model_validator(mode="after")
    def _one_machine_meets_nobody(self) -> Local:
        if self.rendezvous is not None and self.nodes == 1:
            raise ValueError(
                f"cluster.rendezvous={self.rendezvous} is where several machines meet, and cluster.nodes is 1: give "
                "cluster.nodes, too, or neither"
            )
        return self


class Slurm(_Cluster):
    name: Literal["slurm"]
    partition: Word | None
    account: Word | None
    qos: Word | None
    time_min: Size | None
    signal_s: Annotated[int, Field(ge=0, le=65535)]  # Slurm holds it in 16 bits
    mem_gb: Positive | None
    cpus_per_gpu: Size | None
    gres: Literal["gpus-per-node", "gres", "none"]
    constraint: Text | None
    exclude: Word | None
    nodelist: Word | None
    reservation: Word | None
    dependency: Word | None
    comment: Text | None
    mail: Word | None
    setup: tuple[str, ...]
    extra: tuple[Flag, ...]
    max_requeues: Count
    max_parallel: Size | None
    dry_run: bool

    @model_validator(mode="after")
    def _the_signal_comes_before_the_end(self) -> Slurm:
        if self.time_min is not None and self.signal_s >= 60 * self.time_min:
            raise ValueError(
                f"cluster.signal_s={self.signal_s} is the time between the signal to stop and the end, and "
                f"cluster.time_min={self.time_min} leaves {60 * self.time_min} s in all: give a smaller "
                "cluster.signal_s, or a longer cluster.time_min"
            )
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
            raise ValueError(
                "data.args, data.val_args and data.local need data._target_; the task's own data takes task.args and "
                "task.local"
            )
        return self

    @model_validator(mode="after")
    def _an_argument_is_given_once(self) -> Data:
        _refuse_repeated("data", "args", self.args, self.local)
        _refuse_repeated("data", "val_args", self.val_args, self.local)
        return self


class Checkpoint(Section):
    every: Annotated[Duration, PlainValidator(_with_minutes), PlainSerializer(str, return_type=str)] | None
    keep: Size
    best: (
        Annotated[str, _matching(r"(val|ema)/[^:\s]+:(max|min)", "a value and which is best: val/accuracy:max")] | None
    )
    on_error: Literal["continue", "stop"]


class Evaluate(Section):
    every: Interval | None
    first: bool
    last: bool
    per_gpu: Size | None
    samples: Size | None


class Noise(Section):
    every: Interval | None


class Log(Section):
    every: Interval


class Check(Section):
    contract: bool


class Run(Section):
    dir: Path | None
    config: Path | None
    name: Name | None
    new: bool


class PlanOptions(Section):
    open_data: bool


class RunConfig(Section):
    """One run, whole.

    Attributes:
        given: keys given on the command line or in an experiment, dotted; a group's choice by the group's name.
        chosen: groups whose choice ``auto`` made, and why it is this one.
    """

    action: Literal["train", "plan", "evaluate", "runs", "requeue"]
    output: Literal["text", "json"]
    duration: Length
    seed: Seed
    device: Literal["auto", "cpu", "cuda"]
    debug: bool
    init_from: Path | None
    clip_norm: Positive | None
    ema: Annotated[Duration, PlainValidator(_half_life), PlainSerializer(str, return_type=str)] | None
    on_nonfinite: Literal["stop", "skip"]
    precision: Literal["fp32", "bf16", "fp16"]
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
    check: Check
    run: Run
    plan: PlanOptions
    task: Task
    optimizer: Annotated[SGD | AdamW | LAMB | LARS | Adafactor | Muon | CustomOptimizer, Field(discriminator="name")]
    engine: Annotated[Engine, Field(discriminator="name")]
    cluster: Annotated[Local | Slurm, Field(discriminator="name")]
    given: tuple[str, ...]
    chosen: dict[str, str]

    @model_validator(mode="after")
    def _best_of_an_average_there_is(self) -> RunConfig:
        if self.ema is None and (self.checkpoint.best or "").startswith("ema/"):
            raise ValueError(
                f"checkpoint.best={self.checkpoint.best} is of the weights' average, and there is none: give ema=1ep, "
                "or the like"
            )
        return self

    @model_validator(mode="after")
    def _evaluations_have_data(self) -> RunConfig:
        asked = {f"checkpoint.best={self.checkpoint.best}": self.checkpoint.best is not None}
        asked["evaluate.first=true"] = self.evaluate.first
        wanting = [key for key, wanted in asked.items() if wanted]
        if wanting and self.data.target is not None and self.data.val_args is None:
            raise ValueError(
                f"{wanting[0]} needs validation data, and data._target_={self.data.target} makes none: give "
                f"data.val_args={{split: test}}, or the like, or leave {wanting[0].partition('=')[0]} out"
            )
        return self

    @model_validator(mode="after")
    def _action_has_what_it_needs(self) -> RunConfig:
        if self.output == "json" and self.action in ("train", "requeue"):
            raise ValueError(
                "output=json is how action=plan, action=evaluate and action=runs print, and action is "
                f"{self.action}; leave out one of them"
            )
        if self.action == "evaluate" and self.init_from is None:
            raise ValueError(
                "action=evaluate needs init_from=…: a run directory, a checkpoint of one, or a .safetensors file"
            )
        return self
