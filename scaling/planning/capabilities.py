"""What each engine shards, and what it can't have: data, asked before any worker starts.

An engine changes nothing of what a run is: neither its identity nor ``optimizer=auto`` asks for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from isobatch.scaling.limits import Text

if TYPE_CHECKING:
    from isobatch.conf.groups import Engine
    from isobatch.conf.schema import RunConfig

# A step's time with numerics=bitwise as a multiple of fast, on two processes: of a small GPT, and of an MLP whose step
# is mostly messages; see benchmarks/README.md.
BITWISE_COST = 1.14, 1.53

PARAMETERS, GRADIENTS, OPTIMIZER_STATE = "parameters", "gradients", "optimizer state"
OPTIMIZERS = ("sgd", "adamw", "lamb", "lars", "muon", "adafactor", "custom")
# Those of torch that treat each number by itself, whatever tensor it is in, and keep no state before the first step, as
# Adagrad does, which DeepSpeed makes anew.
ELEMENTWISE = tuple(
    f"torch.optim.{name}"
    for name in ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adadelta", "RMSprop", "Rprop", "ASGD")
)
FLAT = (
    "its optimizer sees a part of one flat tensor, and only one that treats each number by itself, and begins without "
    "state, does the same there"
)
NOT_BITWISE = "only engine=ddp adds up gradients in an order that no number of processes changes"


@dataclass(frozen=True, slots=True)
class Held:
    """How an engine holds a run's tensors, as the plan says it.

    Attributes:
        stage: of DeepSpeed's ZeRO.
        shards: what is in parts, one a rank; of the rest each rank holds the whole.
        offloads: what is in the host's memory.
    """

    name: Text
    stage: int | None = None
    shards: tuple[Text, ...] = ()
    offloads: tuple[Text, ...] = ()

    def __post_init__(self) -> None:
        its = next((it for it in ABILITIES if (it.name, it.stage) == (self.name, self.stage)), None)
        if its is None:
            raise ValueError(f"there is no engine={self.name} with engine.stage={self.stage}")
        if self.shards != its.shards or self.offloads not in ((), its.offloads):
            raise ValueError(f"{its.choice} doesn't shard {self.shards} and offload {self.offloads}")


@dataclass(frozen=True, slots=True)
class Ability:
    """What an engine can do.

    Attributes:
        stage: of DeepSpeed's ZeRO.
        shards: what is in parts, one a rank.
        offloads: what ``engine.offload=true`` moves to the host's memory.
        optimizers: that it carries; ``why_not`` says why it doesn't carry the others.
        custom: targets of ``optimizer=custom`` that it carries; None: all, but for ``not_custom``.
        bitwise: it carries ``numerics=bitwise``.
    """

    name: str
    stage: int | None = None
    shards: tuple[str, ...] = ()
    offloads: tuple[str, ...] = ()
    optimizers: tuple[str, ...] = OPTIMIZERS
    why_not: str = ""
    custom: tuple[str, ...] | None = None
    not_custom: tuple[str, ...] = ()
    bitwise: bool = False

    @property
    def choice(self) -> str:
        """What names it on the command line."""
        return f"engine={self.name}" + ("" if self.stage is None else f" engine.stage={self.stage}")


ALL = (PARAMETERS, GRADIENTS, OPTIMIZER_STATE)
ABILITIES = (
    Ability("ddp", bitwise=True),
    Ability("accelerate"),
    Ability(
        "fsdp",
        shards=ALL,
        offloads=ALL,
        optimizers=tuple(name for name in OPTIMIZERS if name != "adafactor"),
        why_not="torch's Adafactor and Rprop don't work on tensors that are in parts",
        not_custom=("torch.optim.Adafactor", "torch.optim.Rprop"),
    ),
    Ability("deepspeed", 0),
    *(
        Ability(
            "deepspeed",
            stage,
            shards=ALL[3 - stage :],
            offloads=(OPTIMIZER_STATE,),
            optimizers=("sgd", "adamw", "custom"),
            why_not=FLAT,
            custom=ELEMENTWISE,
        )
        for stage in (1, 2, 3)
    ),
)
WHOLE = Held("ddp")


def ability(engine: Engine) -> Ability:
    """That of the engine which a config names."""
    stage = engine.stage if engine.name == "deepspeed" else None
    return next(one for one in ABILITIES if (one.name, one.stage) == (engine.name, stage))


def held(engine: Engine) -> Held:
    """How the engine that a config names holds a run's tensors."""
    its = ability(engine)
    offload = engine.name in ("fsdp", "deepspeed") and engine.offload
    return Held(its.name, its.stage, its.shards, its.offloads if offload else ())


def check_engine(config: RunConfig) -> None:
    """Raises ValueError where the config asks for what its engine can't have, with what would work."""
    its = ability(config.engine)
    for asked, why, instead in _lacking(its, config):
        able = [one.choice for one in ABILITIES if not any(_lacking(one, config))]
        others = f"use {either(able)}, or " if able else ""
        raise ValueError(f"{its.choice} can't have {asked}: {why}; {others}{instead}")
    if config.engine.name == "fsdp" and config.engine.param_dtype not in (None, config.precision):
        raise ValueError(
            f"engine.param_dtype={config.engine.param_dtype} and precision={config.precision} contradict each other: "
            f"give precision={config.engine.param_dtype}, or leave engine.param_dtype out"
        )
    if config.device == "cpu" and config.precision == "fp16":
        raise ValueError("precision=fp16 is for CUDA, and device=cpu: use precision=bf16, or fp32")
    if config.device == "cpu" and config.engine.name == "fsdp" and config.engine.offload:
        raise ValueError("engine.offload=true is for what a GPU holds, and device=cpu: leave it out")
    if config.numerics == "bitwise" and config.compile:
        raise ValueError(
            "numerics=bitwise doesn't go with compile=true: what a process compiles depends on the sizes of "
            "micro-batches that it has met, and so on the number of processes; leave one of them out"
        )
    if config.numerics == "bitwise" and config.engine.config:
        raise ValueError(
            f"engine.config.{next(iter(config.engine.config))} is for DistributedDataParallel, which numerics=bitwise "
            "does without: leave one of them out"
        )


def _lacking(its: Ability, config: RunConfig) -> Iterator[tuple[str, str, str]]:
    """What is asked for and can't be had, why, and what to do about it with the same engine."""
    optimizer = config.optimizer
    if not _carries(its, optimizer.name, getattr(optimizer, "target", None)):
        target = f" optimizer._target_={optimizer.target}" if optimizer.name == "custom" else ""
        chosen = " (optimizer=auto chose it)" if "optimizer" in config.chosen else ""
        carried = (
            either(its.custom) if its.custom and target else either(name for name in its.optimizers if name != "custom")
        )
        instead = f"optimizer{'._target_' if its.custom and target else ''}={carried}"
        yield f"optimizer={optimizer.name}{target}{chosen}", its.why_not, instead
    if config.numerics == "bitwise" and not its.bitwise:
        yield "numerics=bitwise", NOT_BITWISE, "leave numerics out"


def either(names: Iterable[str]) -> str:
    """``a, b or c``."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def _carries(its: Ability, name: str, target: Any) -> bool:
    if name != "custom":
        return name in its.optimizers
    return target not in its.not_custom if its.custom is None else target in its.custom
