"""Reduce gradients with DeepSpeed: replicated at stage 0 (stage0.py), sharded at stages 1 to 3 (zero.py)."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from isobatch.conf.schema import RunConfig
from isobatch.trainers.engines.deepspeed.stage0 import DeepSpeed, import_deepspeed
from isobatch.trainers.engines.deepspeed.zero import ZeRO
from isobatch.trainers.engines.reducer import Parts, Reducer


def make_reducer(parts: Parts, config: RunConfig) -> Reducer:
    """Return the reducer of the engine ``deepspeed``."""
    engine: Any = config.engine
    return (ZeRO if engine.stage else DeepSpeed)(parts, engine)


def preload(config: RunConfig) -> None:
    """Import the modules that the first step needs."""
    import_deepspeed()
    import_module("deepspeed.runtime.zero.muon.muon_optimizer")  # ZeRO checks whether the optimizer is one of these
