"""Make the engine that a config names.

The engine's module has the engine's name and is imported only if the engine is chosen. It has
``make_reducer(parts, config)``. It may have ``preload(config)``, which imports the modules that a step needs, and
``refuse_environment(config, plan)``, which raises UserError if the launcher's environment contradicts the plan.
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
        recipe, stored, tell: passed to ``make_optimizer``.

    Raises:
        UserError: the engine can't train this model, or the package that it needs isn't installed.
    """
    check_device(config, world.device.type)
    parts = Parts(model, world, lambda: make_optimizer(config, task, model, recipe, stored, tell))
    reducer: Reducer = _module(config).make_reducer(parts, config)
    skip, ema = config.on_nonfinite == "skip", config.ema is not None
    return Engine(task, parts, reducer, ema=ema, skip_nonfinite=skip, precision=config.precision)


def refuse_environment(config: RunConfig, plan: Plan) -> None:
    """Raise UserError if the environment that the engine was launched with contradicts the plan."""
    if refuse := getattr(_module(config), "refuse_environment", None):
        refuse(config, plan)


def import_engine(config: RunConfig) -> None:
    """Import the modules that ``make_engine`` and the first step need, once for all workers forked from here.

    It starts no threads and doesn't initialise CUDA. Import errors are ignored here: the workers report them.
    """
    module = _module(config)
    with suppress(Exception):
        if preload := getattr(module, "preload", None):
            preload(config)


def _module(config: RunConfig) -> ModuleType:
    name = "bitwise" if config.numerics == "bitwise" else config.engine.name
    return import_module(f"isobatch.trainers.engines.{name}")
