"""Make the engine that a config names.

Its module, which is named as it is, is imported where it is chosen. It has ``make_reducer(parts, config)``; it may have
``preload(config)``, which imports what a step does, and ``refuse_environment(config, plan)``, which raises UserError
where what it is launched with contradicts the plan.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from types import ModuleType

from torch import nn

from isobatch.conf.schema import RunConfig
from isobatch.scaling.plan import Plan
from isobatch.scaling.planning.capabilities import check_device
from isobatch.scaling.rules import Recipe
from isobatch.trainers.engines.engine import Engine
from isobatch.trainers.engines.reducer import Parts, Reducer
from isobatch.trainers.optim.groups import Groups
from isobatch.trainers.optim.make import make_optimizer
from isobatch.trainers.ranks.world import World
from isobatch.trainers.tasks.task import Task


def make_engine(
    config: RunConfig,
    task: Task,
    model: nn.Module,
    recipe: Recipe,
    world: World,
    stored: Groups = (),
    tell: Callable[[str], None] = lambda text: None,
) -> Engine:
    """Return the engine that the config names.

    Args:
        recipe: what the optimizer is made with; so are ``stored`` and ``tell``.

    Raises:
        UserError: it can't train this model, or the package that it needs isn't installed.
    """
    check_device(config, world.device.type)
    parts = Parts(model, world, lambda: make_optimizer(config, task, model, recipe, stored, tell))
    reducer: Reducer = _module(config).make_reducer(parts, config)
    skip, ema = config.on_nonfinite == "skip", config.ema is not None
    return Engine(task, parts, reducer, ema=ema, skip_nonfinite=skip, precision=config.precision)


def refuse_environment(config: RunConfig, plan: Plan) -> None:
    """Raise UserError where what the engine is launched with contradicts the plan."""
    if refuse := getattr(_module(config), "refuse_environment", None):
        refuse(config, plan)


def import_engine(config: RunConfig) -> None:
    """Import what ``make_engine`` and the first step import, once for all workers that are forked from here.

    It starts no thread, and no CUDA. A package that can't be imported is the workers' to reject.
    """
    module = _module(config)
    with suppress(Exception):
        if preload := getattr(module, "preload", None):
            preload(config)


def _module(config: RunConfig) -> ModuleType:
    name = "bitwise" if config.numerics == "bitwise" else config.engine.name
    return import_module(f"isobatch.trainers.engines.{name}")
