"""What reduces gradients and holds the model, by name. scaling/planning/capabilities.py says which can do what."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from isobatch.conf.types import Free, Modules, Section


class DDP(Section):
    name: Literal["ddp"]
    config: Free


class FSDP(Section):
    name: Literal["fsdp"]
    shard: Literal["auto"] | Modules
    param_dtype: Literal["bf16", "fp16"] | None
    reduce_dtype: Literal["bf16", "fp16"] | None
    offload: bool
    config: Free

    @model_validator(mode="after")
    def _gradients_are_reduced_as_they_are_computed(self) -> FSDP:
        if self.reduce_dtype is not None and self.param_dtype is None:
            raise ValueError(
                f"engine.reduce_dtype={self.reduce_dtype} needs engine.param_dtype: without it gradients are fp32, and "
                "reduced in that"
            )
        return self


class Accelerate(Section):
    name: Literal["accelerate"]
    config: Free


class DeepSpeed(Section):
    name: Literal["deepspeed"]
    stage: Literal[0, 1, 2, 3]
    offload: bool
    config: Free

    @model_validator(mode="after")
    def _what_is_offloaded_is_sharded(self) -> DeepSpeed:
        if self.offload and self.stage == 0:
            raise ValueError("engine.offload=true needs engine.stage=1, 2 or 3: at 0 DeepSpeed offloads nothing")
        return self


Engine = DDP | FSDP | Accelerate | DeepSpeed
