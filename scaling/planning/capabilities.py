"""Check before any worker starts that the engine can do what a config asks for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from isobatch.conf.engines import ENGINES, FSDP, Ability, DeepSpeed, Engine
from isobatch.conf.groups import TARGETS
from isobatch.conf.schema import RunConfig
from isobatch.conf.types import tag
from isobatch.scaling.errors import UserError
from isobatch.scaling.plan import EnginePlacement

# A step's time with numerics=bitwise as a multiple of fast, on two processes: of a small GPT, and of an MLP whose step
# is mostly messages; see benchmarks/README.md.
BITWISE_COST = 1.14, 1.53
NOT_BITWISE = "only engine=ddp adds up gradients in an order that no number of processes changes"
ABILITIES = {
    (tag(kind), stage if len(kind.abilities) > 1 else None): ability
    for kind in ENGINES
    for stage, ability in enumerate(kind.abilities)
}
"""What each engine can do, by its name and stage."""


def placement(engine: Engine) -> EnginePlacement:
    """Return where the engine that a config names keeps a run's tensors."""
    name, stage = _chosen(engine)
    ability = ABILITIES[name, stage]
    offload = isinstance(engine, FSDP | DeepSpeed) and engine.offload
    return EnginePlacement(name, stage, ability.shards, ability.offloads if offload else ())


def check_placement(stored: EnginePlacement) -> None:
    """Raise ValueError for a placement that no engine has."""
    ability = ABILITIES.get((stored.name, stored.stage))
    if ability is None:
        raise ValueError(f"there is no engine={stored.name} with engine.stage={stored.stage}")
    if stored.shards != ability.shards or stored.offloads not in ((), ability.offloads):
        does = f"shard {stored.shards} and offload {stored.offloads}"
        raise ValueError(f"{_shown(stored.name, stored.stage)} doesn't {does}")


def check_engine(config: RunConfig) -> None:
    """Raise UserError where the config asks for what its engine can't do, with what would work."""
    engine = config.engine
    for key, asked, why, instead in _lacking(ABILITIES[_chosen(engine)], config):
        able = [_shown(*choice) for choice, ability in ABILITIES.items() if not any(_lacking(ability, config))]
        others = f"use {either(able)}, or " if able else ""
        value = config.optimizer.name if key == "optimizer" else config.numerics
        raise UserError(f"{_shown(*_chosen(engine))} can't have {asked}: {why}", f"{others}{instead}", key, value)
    if isinstance(engine, FSDP) and (dtype := engine.param_dtype) not in (None, config.precision):
        problem = f"engine.param_dtype={dtype} and precision={config.precision} contradict each other"
        fix = f"give precision={dtype}, or leave engine.param_dtype out"
        raise UserError(problem, fix, "engine.param_dtype", dtype)
    if config.device == "cpu":
        check_device(config, "cpu")
    if config.numerics == "bitwise" and config.compile:
        problem = (
            "numerics=bitwise doesn't go with compile=true: what a process compiles depends on the sizes of "
            "micro-batches that it has met, and so on the number of processes"
        )
        raise UserError(problem, "leave one of them out", "compile", True)
    if config.numerics == "bitwise" and engine.config:
        key = f"engine.config.{next(iter(engine.config))}"
        problem = f"{key} is for DistributedDataParallel, which numerics=bitwise does without"
        raise UserError(problem, "leave one of them out", key)


def check_device(config: RunConfig, device: str) -> None:
    """Raise UserError where the config asks for what training on this type of device can't do."""
    check_precision(config, device)
    if device == "cpu" and isinstance(config.engine, FSDP) and config.engine.offload:
        problem = f"engine.offload=true is for what a GPU holds, and {_where(config, device)}"
        raise UserError(problem, "leave it out", "engine.offload", True)


def check_precision(config: RunConfig, device: str) -> None:
    """Raise UserError for fp16 where there is no CUDA."""
    if config.precision == "fp16" and device != "cuda":
        problem = f"precision=fp16 is for CUDA, and {_where(config, device)}"
        raise UserError(problem, "use precision=bf16, or fp32", "precision", "fp16")


def _where(config: RunConfig, device: str) -> str:
    return f"device={device}" if config.device == device else f"this runs on {device}"


def _chosen(engine: Engine) -> tuple[str, int | None]:
    return engine.name, engine.stage if isinstance(engine, DeepSpeed) else None


def _shown(name: str, stage: int | None) -> str:
    """Return what names an engine on the command line."""
    return f"engine={name}" + ("" if stage is None else f" engine.stage={stage}")


def _lacking(its: Ability, config: RunConfig) -> Iterator[tuple[str, str, str, str]]:
    """Yield the key of what is asked for and can't be had, the text, why, and the fix with the same engine."""
    name, target = config.optimizer.name, config.optimizer.target
    if not its.carries(target):
        shown = f" optimizer._target_={target}" if name == "custom" else ""
        chosen = " (optimizer=auto chose it)" if "optimizer" in config.chosen else ""
        if its.takes and name == "custom":
            instead = f"optimizer._target_={either(its.takes)}"
        else:
            instead = f"optimizer={either(other for other in TARGETS if its.carries(TARGETS[other]))}"
        yield "optimizer", f"optimizer={name}{shown}{chosen}", its.why_not, instead
    if config.numerics == "bitwise" and not its.bitwise:
        yield "numerics", "numerics=bitwise", NOT_BITWISE, "leave numerics out"


def either(names: Iterable[str]) -> str:
    """Join names as ``a, b or c``."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last
