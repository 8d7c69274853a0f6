"""Reduce gradients by DeepSpeed: whole at stage 0 (replicated.py), in parts at stages 1 to 3 (zero.py)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from isobatch.trainers.engines.deepspeed.replicated import Replicated, Wrapper
from isobatch.trainers.engines.deepspeed.setup import import_deepspeed
from isobatch.trainers.engines.deepspeed.zero import ZeRO
from isobatch.trainers.engines.reducer import Parts, Reducer

if TYPE_CHECKING:
    from isobatch.conf.schema import RunConfig


def make_reducer(parts: Parts, config: RunConfig) -> Reducer:
    """Return the reducer of the engine ``deepspeed``.

    Raises:
        UserError: DeepSpeed isn't installed, or can't take the config, the model or the optimizer.
    """
    engine: Any = config.engine
    wrapper = Wrapper(parts, engine)
    if engine.stage:
        return ZeRO(parts, wrapper, engine)
    return Replicated(parts, wrapper)


def preload(config: RunConfig) -> None:
    """Import what the first step imports."""
    import_deepspeed()
    if config.engine.stage:  # type: ignore[union-attr]
        import_module("deepspeed.runtime.zero.muon.muon_optimizer")  # it asks whether the optimizer is one
