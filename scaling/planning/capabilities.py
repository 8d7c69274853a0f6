"""What each engine shards, and what it can't do: a table that is read before any worker starts.

An engine changes nothing of what a run is: neither its identity nor ``optimizer=auto`` depends on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from isobatch.conf.groups import OPTIMIZERS, Engine
from isobatch.conf.schema import RunConfig
from isobatch.scaling.errors import UserError
from isobatch.scaling.plan import EnginePlacement

# A step's time with numerics=bitwise as a multiple of fast, on two processes: of a small GPT, and of an MLP whose step
# is mostly messages; see benchmarks/README.md.
BITWISE_COST = 1.14, 1.53

PARAMETERS, GRADIENTS, OPTIMIZER_STATE = "parameters", "gradients", "optimizer state"
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
class Ability:
    """Describe what an engine can do.

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
        """Return what names it on the command line."""
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


def ability(engine: Engine) -> Ability:
    """Return the ability of the engine which a config names."""
    stage = engine.stage if engine.name == "deepspeed" else None
    return next(one for one in ABILITIES if (one.name, one.stage) == (engine.name, stage))


def placement(engine: Engine) -> EnginePlacement:
    """Return where the engine that a config names keeps a run's tensors."""
    its = ability(engine)
    offload = engine.name in ("fsdp", "deepspeed") and engine.offload
    return EnginePlacement(its.name, its.stage, its.shards, its.offloads if offload else ())


def check_placement(stored: EnginePlacement) -> None:
    """Raise ValueError for a placement that no engine has."""
    its = next((it for it in ABILITIES if (it.name, it.stage) == (stored.name, stored.stage)), None)
    if its is None:
        raise ValueError(f"there is no engine={stored.name} with engine.stage={stored.stage}")
    if stored.shards != its.shards or stored.offloads not in ((), its.offloads):
        raise ValueError(f"{its.choice} doesn't shard {stored.shards} and offload {stored.offloads}")


def check_engine(config: RunConfig) -> None:
    """Raise UserError where the config asks for what its engine can't do, with what would work."""
    its, device = ability(config.engine), config.device
    for key, asked, why, instead in _lacking(its, config):
        able = [one.choice for one in ABILITIES if not any(_lacking(one, config))]
        others = f"use {either(able)}, or " if able else ""
        value = config.optimizer.name if key == "optimizer" else config.numerics
        raise UserError(f"{its.choice} can't have {asked}: {why}", f"{others}{instead}", key, value)
    if config.engine.name == "fsdp" and (dtype := config.engine.param_dtype) not in (None, config.precision):
        problem = f"engine.param_dtype={dtype} and precision={config.precision} contradict each other"
        fix = f"give precision={dtype}, or leave engine.param_dtype out"
        raise UserError(problem, fix, "engine.param_dtype", dtype)
    if device == "cpu" and config.precision == "fp16":
        raise UserError(
            "precision=fp16 is for CUDA, and device=cpu", "use precision=bf16, or fp32", "precision", "fp16"
        )
    if device == "cpu" and config.engine.name == "fsdp" and config.engine.offload:
        problem = "engine.offload=true is for what a GPU holds, and device=cpu"
        raise UserError(problem, "leave it out", "engine.offload", True)
    if config.numerics == "bitwise" and config.compile:
        problem = (
            "numerics=bitwise doesn't go with compile=true: what a process compiles depends on the sizes of "
            "micro-batches that it has met, and so on the number of processes"
        )
        raise UserError(problem, "leave one of them out", "compile", True)
    if config.numerics == "bitwise" and config.engine.config:
        key = f"engine.config.{next(iter(config.engine.config))}"
        problem = f"{key} is for DistributedDataParallel, which numerics=bitwise does without"
        raise UserError(problem, "leave one of them out", key)


def _lacking(its: Ability, config: RunConfig) -> Iterator[tuple[str, str, str, str]]:
    """Yield the key of what is asked for and can't be had, the text, why, and the fix with the same engine."""
    optimizer = config.optimizer
    if not _carries(its, optimizer.name, getattr(optimizer, "target", None)):
        target = f" optimizer._target_={optimizer.target}" if optimizer.name == "custom" else ""
        chosen = " (optimizer=auto chose it)" if "optimizer" in config.chosen else ""
        carried = (
            either(its.custom) if its.custom and target else either(name for name in its.optimizers if name != "custom")
        )
        instead = f"optimizer{'._target_' if its.custom and target else ''}={carried}"
        yield "optimizer", f"optimizer={optimizer.name}{target}{chosen}", its.why_not, instead
    if config.numerics == "bitwise" and not its.bitwise:
        yield "numerics", "numerics=bitwise", NOT_BITWISE, "leave numerics out"


def either(names: Iterable[str]) -> str:
    """Join names as ``a, b or c``."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def _carries(its: Ability, name: str, target: Any) -> bool:
    if name != "custom":
        return name in its.optimizers
    return target not in its.not_custom if its.custom is None else target in its.custom
