"""Keys of ``engine.config`` that the plan decides, or the way in which Isobatch works."""

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
    """Say who else decides a key, or why it can't be given, and the values that may be given all the same."""

    why: str
    allowed: tuple[Any, ...] = ()


OPTIMIZER = "optimizer=… says that"
AUTOCAST = "precision=… computes by autocast over fp32 weights, and DeepSpeed's own sections for that stay off"
OFFLOAD = "engine.offload says that"
RESUME = "checkpoints are Isobatch's own, of any engine: run.dir=… goes on from them"
SUMS = "it changes how gradients are added up, and so the run"
BITS = "gradients and weights travel in fp32, and with fewer bits the run is another one"
ORDER = "checkpoints hold the parts of tensors in the order of the parameters, which it changes"

PRECISIONS = ("fp16", "bf16", "bfloat16", "amp", "torch_autocast")  # DeepSpeed's sections for what precision says
_ORDER = ("round_robin_gradients", "parameter_alignment", "legacy_stage1")
_BITS = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")

DEEPSPEED = {
    "optimizer": Reserved(OPTIMIZER),
    "scheduler": Reserved("lr.warmup, lr.decay and the like say that"),
    "zero_force_ds_cpu_optimizer": Reserved(OPTIMIZER, (False,)),
    "zero_allow_untested_optimizer": Reserved(OPTIMIZER, (True,)),
    **{f"{section}.enabled": Reserved(AUTOCAST, (False, "auto")) for section in PRECISIONS},
    "zero_optimization.offload_optimizer": Reserved(OFFLOAD, (None,)),
    "zero_optimization.cpu_offload": Reserved(OFFLOAD, (None, False)),
    "zero_optimization.offload_param": Reserved(f"{OFFLOAD}, and moves no parameters", (None,)),
    "zero_optimization.cpu_offload_param": Reserved(f"{OFFLOAD}, and moves no parameters", (None, False)),
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
# Keys that change the speed, the memory or the logs of an engine alone; the others aren't the user's to say.
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
    """Raise UserError where ``engine.config`` has a key that the plan or Isobatch decides, with another value."""
    engine, reserved = config.engine, _reserved(config, plan)
    for key, one in reserved.items():
        for place, value in _found(engine.config, key):
            if not any(value == may and (type(value) is not bool or value is may) for may in one.allowed):
                shown = [str(may).lower() for may in one.allowed if may is not None]
                here = f" (here {either(shown)})" if shown else ""
                raise _rejection(place, value, f": {one.why}{here}", "leave it out")
    allowed = ALLOWED.get(engine.name, tuple(engine.config))
    for key in sorted(engine.config.keys() - {name.partition(".")[0] for name in reserved} - {*allowed}):
        near = get_close_matches(key, allowed, n=1, cutoff=0.8)
        fix = f"did you mean {near[0]}?" if near else f"engine={engine.name} takes {either(allowed)}"
        raise _rejection(key, engine.config[key], "", fix)


def _rejection(key: str, value: Any, why: str, fix: str) -> UserError:
    key = f"engine.config.{key}"
    return UserError(f"{key}={json.dumps(value)} can't be{why}", fix, key, value)


def _reserved(config: RunConfig, plan: Plan) -> Mapping[str, Reserved]:
    """Return the keys of the config's engine that the plan or Isobatch decides."""
    engine, cut = config.engine, plan.cut

    def ours(key: str, value: int) -> Reserved:  # a batch that moves has no single size
        return Reserved(f"{key} says that", (value, "auto") if config.batch.schedule is None else ("auto",))

    accumulation = ours("batch.accumulation", cut.accumulation)
    if isinstance(engine, DeepSpeed):
        return {
            "train_batch_size": ours("batch.global_size", cut.global_size),
            "train_micro_batch_size_per_gpu": ours("batch.per_gpu", cut.per_gpu),
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": Reserved("clip_norm says that", (config.clip_norm or 0, "auto")),
            "zero_optimization.stage": Reserved("engine.stage says that", (engine.stage, "auto")),
            **DEEPSPEED,
        }
    if engine.name == "accelerate":
        computed = "no" if config.precision == "fp32" else config.precision
        return {
            "gradient_accumulation_steps": accumulation,
            "mixed_precision": Reserved("precision says that", (computed,)),
            "cpu": Reserved("device says that", (config.device == "cpu",)),
            "dynamo_backend": Reserved("compile=true says that", ("no",)),
        }
    return {}


def _found(given: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield the value at a dotted key, or the value that is in place of a section on the way to it, with its key."""
    way = key.split(".")
    for depth, name in enumerate(way, 1):
        if not isinstance(given, dict):
            yield ".".join(way[: depth - 1]), given
            return
        if name not in given:
            return
        given = given[name]
    yield key, given
