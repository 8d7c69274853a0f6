"""Validate ``engine.config``: reject keys that the plan or Isobatch itself decides."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

from isobatch.conf.engines import DeepSpeed
from isobatch.conf.schema import RunConfig
from isobatch.scaling.errors import UserError
from isobatch.scaling.plan import Plan
from isobatch.scaling.planning.capabilities import either


class Reserved(NamedTuple):
    """Hold the reason why a key can't be set, and the values that are accepted nevertheless."""

    why: str
    allowed: tuple[Any, ...] = ()


OPTIMIZER = "optimizer=… sets that"
AUTOCAST = "precision=… uses autocast over fp32 weights, so DeepSpeed's own precision sections stay off"
OFFLOAD = "engine.offload sets that"
RESUME = "checkpoints have Isobatch's own format for every engine; run.dir=… resumes from them"
SUMS = "it changes how gradients are summed, and so the run"
BITS = "gradients and weights are sent in fp32; fewer bits would change the run"
ORDER = "checkpoints store shards in the order of the parameters, which it changes"

PRECISIONS = ("fp16", "bf16", "bfloat16", "amp", "torch_autocast")  # DeepSpeed's sections that precision=… replaces
_ORDER = ("round_robin_gradients", "parameter_alignment", "legacy_stage1")
_BITS = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")

DEEPSPEED = {
    "optimizer": Reserved(OPTIMIZER),
    "scheduler": Reserved("lr.warmup, lr.decay and other lr keys set that"),
    "zero_force_ds_cpu_optimizer": Reserved(OPTIMIZER, (False,)),
    "zero_allow_untested_optimizer": Reserved(OPTIMIZER, (True,)),
    **{f"{section}.enabled": Reserved(AUTOCAST, (False, "auto")) for section in PRECISIONS},
    "zero_optimization.offload_optimizer": Reserved(OFFLOAD, (None,)),
    "zero_optimization.cpu_offload": Reserved(OFFLOAD, (None, False)),
    "zero_optimization.offload_param": Reserved(f"{OFFLOAD}, and offloads no parameters", (None,)),
    "zero_optimization.cpu_offload_param": Reserved(f"{OFFLOAD}, and offloads no parameters", (None, False)),
    "zero_optimization.zenflow": Reserved(OPTIMIZER, (None,)),
    **{f"zero_optimization.{key}": Reserved(ORDER, (False,)) for key in _ORDER},
    "zero_optimization.zero_hpz_partition_size": Reserved(ORDER, (1,)),
    **{f"zero_optimization.{key}": Reserved(BITS, (False,)) for key in _BITS},
    "zero_optimization.compute_grad_norm": Reserved("clipping, metrics and skipped steps need it", (True,)),
    "zero_optimization.elastic_checkpoint": Reserved(RESUME, (False,)),
    "zero_optimization.load_from_fp32_weights": Reserved(RESUME, (True,)),
    "checkpoint.load_universal": Reserved(RESUME, (False,)),
    "communication_data_type": Reserved(BITS, (None, "fp32")),
    "prescale_gradients": Reserved(SUMS, (False,)),
    "gradient_predivide_factor": Reserved(SUMS, (1,)),
    "sparse_gradients": Reserved(SUMS, (False,)),
}
# Keys that only change the speed, the memory or the logs of an engine; all other keys are rejected.
ALLOWED = {
    "deepspeed": (
        "zero_optimization", "activation_checkpointing", "aio", "comet", "comms_logger", "csv_monitor",
        "disable_python_gc", "dump_state", "flops_profiler", "memory_breakdown", "steps_per_print", "tensorboard",
        "timers", "wall_clock_breakdown", "wandb",
    ),
    "accelerate": ("device_placement", "kwargs_handlers", "log_with", "project_config", "project_dir", "rng_types"),
    "fsdp": ("reshard_after_forward",),
}  # fmt: skip


def check_engine_config(config: RunConfig, plan: Plan) -> None:
    """Raise UserError if ``engine.config`` sets an unknown key, or a reserved key to a value that isn't allowed."""
    engine, reserved = config.engine, _reserved(config, plan)
    for key, rule in reserved.items():
        for found, value in _found(engine.config, key):
            if not any(value == other and (type(value) is not bool or value is other) for other in rule.allowed):
                shown = [str(other).lower() for other in rule.allowed if other is not None]
                here = f" (here {either(shown)})" if shown else ""
                raise _rejection(found, value, f": {rule.why}{here}", "leave it out")
    allowed = ALLOWED.get(engine.name, tuple(engine.config))
    for key in sorted(engine.config.keys() - {name.partition(".")[0] for name in reserved} - {*allowed}):
        near = get_close_matches(key, allowed, n=1, cutoff=0.8)
        fix = f"did you mean {near[0]}?" if near else f"engine={engine.name} takes {either(allowed)}"
        raise _rejection(key, engine.config[key], "", fix)


def _rejection(key: str, value: Any, why: str, fix: str) -> UserError:
    key = f"engine.config.{key}"
    return UserError(f"{key}={json.dumps(value)} isn't supported{why}", fix, key, value)


def _reserved(config: RunConfig, plan: Plan) -> Mapping[str, Reserved]:
    """Return the keys of ``engine.config`` that the plan or Isobatch decides."""
    engine, cut = config.engine, plan.cut

    def size(key: str, value: int) -> Reserved:  # with a batch schedule there is no single size
        return Reserved(f"{key} sets that", (value, "auto") if config.batch.schedule is None else ("auto",))

    accumulation = size("batch.accumulation", cut.accumulation)
    if isinstance(engine, DeepSpeed):
        return {
            "train_batch_size": size("batch.global_size", cut.global_size),
            "train_micro_batch_size_per_gpu": size("batch.per_gpu", cut.per_gpu),
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": Reserved("clip_norm sets that", (config.clip_norm or 0, "auto")),
            "zero_optimization.stage": Reserved("engine.stage sets that", (engine.stage, "auto")),
            **DEEPSPEED,
        }
    if engine.name == "accelerate":
        computed = "no" if config.precision == "fp32" else config.precision
        return {
            "gradient_accumulation_steps": accumulation,
            "mixed_precision": Reserved("precision sets that", (computed,)),
            "cpu": Reserved("device sets that", (config.device == "cpu",)),
            "dynamo_backend": Reserved("compile=true sets that", ("no",)),
        }
    return {}


def _found(given: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield the value at a dotted key with that key; if a parent isn't a section, yield the parent instead."""
    names = key.split(".")
    for depth, name in enumerate(names, 1):
        if not isinstance(given, dict):
            yield ".".join(names[: depth - 1]), given
            return
        if name not in given:
            return
        given = given[name]
    yield key, given
