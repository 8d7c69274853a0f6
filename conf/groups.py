"""The choices of ``optimizer=`` and ``cluster=``: a section each, with a YAML in optimizer/ or cluster/.

An optimizer consists of a section here, its YAML and its implementation.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Field, model_validator

from isobatch.conf.types import (
    Bounds,
    Free,
    HostAndPort,
    Option,
    Seconds,
    Section,
    Target,
    Text,
    Usual,
    Value,
    Variable,
    Word,
    tag,
)
from isobatch.scaling.errors import UserError
from isobatch.scaling.limits import Count, Memory, NotNegative, Number, Positive, Size

# ---- optimizers; ``target`` is the class


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
                key, use = f"optimizer.args.{name}", "lr.base or lr.peak" if name == "lr" else f"optimizer.{name}"
                raise UserError(f"{key} repeats a key of the config, which decides", f"use {use}", key)
        return self

    @property
    def memory(self) -> tuple[float, ...]:
        """Return the decay rates of the moments: (momentum,), (beta 1, beta 2), or () if unknown."""
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
            problem = "optimizer.nesterov=true needs optimizer.momentum above 0"
            raise UserError(problem, "give one, or optimizer.nesterov=false", "optimizer.momentum")
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
    target: ClassVar[str] = "torch.optim.SGD"


class AdamW(_WithBetas):
    name: Literal["adamw"]
    target: ClassVar[str] = "torch.optim.AdamW"


class LAMB(_WithBetas):
    name: Literal["lamb"]
    target: ClassVar[str] = "isobatch.trainers.optim.lamb.LAMB"
    bias_correction: bool | Literal["after"]
    trust_clip: Bounds | None
    norm_clip: Bounds | None
    always_adapt: bool


class LARS(_WithMomentum):
    name: Literal["lars"]
    target: ClassVar[str] = "isobatch.trainers.optim.lars.LARS"
    trust_coefficient: Positive
    eps: NotNegative
    scaled_momentum: bool
    trust_clip: bool
    always_adapt: bool


class Adafactor(_Optimizer):
    name: Literal["adafactor"]
    target: ClassVar[str] = "torch.optim.Adafactor"
    beta2_decay: Annotated[Number, Field(le=0)]
    eps: tuple[NotNegative | None, NotNegative]
    d: Annotated[Number, Field(ge=1)]


class Muon(_WithMomentum):
    name: Literal["muon"]
    target: ClassVar[str] = "isobatch.trainers.optim.muon.MuonAdamW"
    betas: tuple[Memory, Memory]
    eps: Positive


class CustomOptimizer(_Optimizer):
    name: Literal["custom"]
    target: Target = Field(alias="_target_")


class AutoOptimizer(_Optimizer, extra="allow"):
    """A placeholder for the optimizer that suits the task and the batch; ``scaling.planning.automatic`` replaces it.

    It accepts any other key: the section of the chosen optimizer validates them.
    """

    name: Literal["auto"]
    target: ClassVar[str] = ""


Optimizer = SGD | AdamW | LAMB | LARS | Adafactor | Muon | CustomOptimizer | AutoOptimizer
OPTIMIZERS = tuple(tag(kind) for kind in get_args(Optimizer) if kind is not AutoOptimizer)
TARGETS = {tag(kind): kind.target for kind in get_args(Optimizer) if getattr(kind, "target", None)}


# ---- clusters


class _Cluster(Section):
    nodes: Size
    gpus_per_node: Size | Literal["auto"]
    backend: Literal["auto", "gloo"]
    memory_gb: Positive | None
    gpu_memory_gb: Positive | None
    max_restarts: Count
    timeout_s: Seconds
    environment: dict[Variable, Value | int]


class Local(_Cluster):
    name: Literal["local"]
    rendezvous: HostAndPort | None

    @model_validator(mode="after")
    def _one_machine_meets_nobody(self) -> Local:
        if self.rendezvous is not None and self.nodes == 1:
            problem = f"cluster.rendezvous={self.rendezvous} is for several machines, but cluster.nodes=1"
            raise UserError(problem, "give cluster.nodes, too, or neither", "cluster.rendezvous")
        return self


class Slurm(_Cluster):
    name: Literal["slurm"]
    partition: Word | None
    account: Word | None
    qos: Word | None
    time_min: Size | None
    signal_s: Annotated[int, Field(ge=0, le=65535)]  # Slurm stores it in 16 bits
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
    extra: tuple[Option, ...]
    max_requeues: Count
    max_parallel: Size | None
    dry_run: bool

    @model_validator(mode="after")
    def _the_signal_comes_before_the_end(self) -> Slurm:
        if self.time_min is not None and self.signal_s >= 60 * self.time_min:
            problem = f"cluster.signal_s={self.signal_s} isn't shorter than cluster.time_min={self.time_min}"
            raise UserError(problem, "lower cluster.signal_s, or raise cluster.time_min", "cluster.signal_s")
        return self


Cluster = Local | Slurm
