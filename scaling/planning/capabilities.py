"""Check before any worker starts that the engine supports the config."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from isobatch.conf.engines import ENGINES, FSDP, Ability, DeepSpeed, Engine
from isobatch.conf.groups import TARGETS
from isobatch.conf.schema import RunConfig
from isobatch.conf.types import tag
from isobatch.scaling.errors import UserError
from isobatch.scaling.plan import EnginePlacement

# A step's time with numerics=bitwise relative to fast on two processes, for a small GPT and for an MLP whose step is
# mostly communication; see benchmarks/results.md.
BITWISE_COST = 1.14, 1.53
NOT_BITWISE = "only engine=ddp sums gradients in an order that doesn't depend on the number of processes"
ABILITIES = {
    (tag(kind), stage if len(kind.abilities) > 1 else None): ability
    for kind in ENGINES
    for stage, ability in enumerate(kind.abilities)
}
"""Abilities of each engine, by its name and stage."""


def placement(engine: Engine) -> EnginePlacement:
    """Return where ``engine`` keeps a run's tensors."""
    name, stage = _chosen(engine)
    ability = ABILITIES[name, stage]
    offload = isinstance(engine, FSDP | DeepSpeed) and engine.offload
    return EnginePlacement(name, stage, ability.shards, ability.offloads if offload else ())


def check_placement(stored: EnginePlacement) -> None:
    """Raise ValueError if no engine has this placement."""
    ability = ABILITIES.get((stored.name, stored.stage))
    if ability is None:
        raise ValueError(f"there is no engine={stored.name} with engine.stage={stored.stage}")
    if stored.shards != ability.shards or stored.offloads not in ((), ability.offloads):
        tensors = f"shard {stored.shards} and offload {stored.offloads}"
        raise ValueError(f"{_shown(stored.name, stored.stage)} doesn't {tensors}")


def check_engine(config: RunConfig) -> None:
    """Raise UserError if the engine doesn't support the config; the message names what works."""
    engine = config.engine
    for key, asked, why, instead in _lacking(ABILITIES[_chosen(engine)], config):
        able = [_shown(*choice) for choice, ability in ABILITIES.items() if not any(_lacking(ability, config))]
        others = f"use {either(able)}, or " if able else ""
        value = config.optimizer.name if key == "optimizer" else config.numerics
        raise UserError(f"{_shown(*_chosen(engine))} doesn't support {asked}: {why}", f"{others}{instead}", key, value)
    if isinstance(engine, FSDP) and (dtype := engine.param_dtype) not in (None, config.precision):
        problem = f"engine.param_dtype={dtype} and precision={config.precision} contradict each other"
        fix = f"give precision={dtype}, or leave engine.param_dtype out"
        raise UserError(problem, fix, "engine.param_dtype", dtype)
    if config.device == "cpu":
        check_device(config, "cpu")
    if config.numerics == "bitwise" and config.compile:
        problem = (
            "numerics=bitwise doesn't support compile=true: the compiled code depends on the micro-batch sizes a "
            "process has seen, and so on the number of processes"
        )
        raise UserError(problem, "leave one of them out", "compile", True)
    if config.numerics == "bitwise" and engine.config:
        key = f"engine.config.{next(iter(engine.config))}"
        problem = f"{key} is for DistributedDataParallel, which numerics=bitwise doesn't use"
        raise UserError(problem, "leave one of them out", key)


def check_device(config: RunConfig, device: str) -> None:
    """Raise UserError if the config asks for something that this type of device can't do."""
    check_precision(config, device)
    if device == "cpu" and isinstance(config.engine, FSDP) and config.engine.offload:
        problem = f"engine.offload=true moves tensors out of a GPU's memory, but {_where(config, device)}"
        raise UserError(problem, "leave it out", "engine.offload", True)


def check_precision(config: RunConfig, device: str) -> None:
    """Raise UserError for fp16 without CUDA."""
    if config.precision == "fp16" and device != "cuda":
        problem = f"precision=fp16 needs CUDA, but {_where(config, device)}"
        raise UserError(problem, "use precision=bf16, or fp32", "precision", "fp16")


def _where(config: RunConfig, device: str) -> str:
    return f"device={device}" if config.device == device else f"this runs on {device}"


def _chosen(engine: Engine) -> tuple[str, int | None]:
    return engine.name, engine.stage if isinstance(engine, DeepSpeed) else None


def _shown(name: str, stage: int | None) -> str:
    """Return the overrides that select an engine on the command line."""
    return f"engine={name}" + ("" if stage is None else f" engine.stage={stage}")


def _lacking(ability: Ability, config: RunConfig) -> Iterator[tuple[str, str, str, str]]:
    """Yield key, text, reason, and a fix with the same engine, for each request that the engine doesn't support."""
    name, target = config.optimizer.name, config.optimizer.target
    if not ability.carries(target):
        shown = f" optimizer._target_={target}" if name == "custom" else ""
        chosen = " (optimizer=auto chose it)" if "optimizer" in config.chosen else ""
        if ability.takes and name == "custom":
            instead = f"optimizer._target_={either(ability.takes)}"
        else:
            instead = f"optimizer={either(other for other in TARGETS if ability.carries(TARGETS[other]))}"
        yield "optimizer", f"optimizer={name}{shown}{chosen}", ability.why_not, instead
    if config.numerics == "bitwise" and not ability.bitwise:
        yield "numerics", "numerics=bitwise", NOT_BITWISE, "leave numerics out"


def either(names: Iterable[str]) -> str:
    """Join names as ``a, b or c``."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last
