"""Test that unsupported combinations with an engine are rejected early, and that the named alternatives work."""

from __future__ import annotations

import json
import pickle
import re
from functools import cache
from itertools import product

import pytest

from isobatch.conf.engines import ELEMENTWISE
from isobatch.conf.keys import choices_of
from isobatch.conf.schema import RunConfig
from isobatch.scaling.plan import EnginePlacement, Plan
from isobatch.scaling.planning.automatic import configured
from isobatch.scaling.planning.resolve import continued, resolve
from isobatch.scaling.report.plan_json import from_json, to_json
from isobatch.scaling.report.plan_table import table

ENGINES = {
    "ddp": ["engine=ddp"],
    "accelerate": ["engine=accelerate"],
    "fsdp": ["engine=fsdp"],
    **{f"zero{stage}": ["engine=deepspeed", f"engine.stage={stage}"] for stage in range(4)},
}
SHARDED = ("fsdp", "zero1", "zero2", "zero3")
CUSTOM = ("optimizer=custom", "lr.peak=0.1")


@cache
def config_of(*overrides: str) -> RunConfig:
    return configured(overrides)


def plan_of(*overrides: str, world: int = 2) -> Plan:
    return resolve(config_of(*overrides), world)


def refusal(*overrides: str) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the callers look at the message)
        plan_of(*overrides)
    return str(error.value)


def named(message: str) -> list[list[str]]:
    """Return the overrides of each alternative in ``engine=a, engine=b or engine=deepspeed engine.stage=0``."""
    ways = message.rpartition("; use ")[2]
    key, found = "", []
    for text in re.split(r", or |, | or ", ways):
        if text.startswith("leave "):
            continue
        key = text.partition("=")[0] if "=" in text else key
        found.append(text.split() if "=" in text else [f"{key}={text}"])
    return found


def with_way(overrides: list[str], way: list[str]) -> list[str]:
    """Apply an alternative of an error to the rejected overrides."""
    keys = {text.partition("=")[0] for text in way}
    dropped = {*keys, "engine.stage"} if "engine" in keys else keys
    return [*(text for text in overrides if text.partition("=")[0] not in dropped), *way]


# ---- engine and optimizer


@pytest.mark.parametrize(
    ("engine", "optimizer"), list(product(ENGINES, ["sgd", "adamw", "lamb", "lars", "muon", "adafactor"])), ids=str
)
def test_unsupported_optimizers_of_an_engine_are_refused(engine: str, optimizer: str) -> None:
    overrides = [*ENGINES[engine], f"optimizer={optimizer}"]
    elementwise = optimizer in ("sgd", "adamw")
    if engine not in SHARDED or elementwise or (engine == "fsdp" and optimizer != "adafactor"):
        assert plan_of(*overrides).engine.name == config_of(*overrides).engine.name
        return
    message = refusal(*overrides)
    assert message.startswith(f"{' '.join(ENGINES[engine])} doesn't support optimizer={optimizer}: ")
    ways = named(message)
    assert ["engine=ddp"] in ways
    assert ["optimizer=adamw"] in ways
    for way in ways:
        plan_of(*with_way(overrides, way))


@pytest.mark.parametrize("engine", ENGINES)
def test_custom_optimizers_of_an_engine_are_checked(engine: str) -> None:
    for name in ("Adam", "RMSprop", "SGD", "NAdam"):
        plan_of(*ENGINES[engine], *CUSTOM, f"optimizer._target_=torch.optim.{name}")
    assert "torch.optim.Adagrad" not in ELEMENTWISE
    rejected = [*ENGINES[engine], *CUSTOM, "optimizer._target_=my_package.Mine"]
    if not engine.startswith("zero") or engine == "zero0":
        plan_of(*rejected)
        return
    message = refusal(*rejected)
    assert "doesn't support optimizer=custom optimizer._target_=my_package.Mine: " in message
    for way in named(message):
        plan_of(*with_way(rejected, way))
    assert [f"optimizer._target_={target}" for target in ELEMENTWISE] == [way[0] for way in named(message)[-10:]]


def test_adafactor_is_recognised_by_its_target() -> None:
    adafactor = (*CUSTOM, "optimizer._target_=torch.optim.Adafactor")
    plan_of("engine=accelerate", *adafactor)
    for engine in SHARDED:
        assert "_target_=torch.optim.Adafactor: " in refusal(*ENGINES[engine], *adafactor)


def test_optimizer_auto_ignores_the_engine() -> None:
    auto = ("optimizer=auto", "task=images", "batch.global_size=2048")
    plan_of("engine=fsdp", *auto)
    assert "optimizer=lars (optimizer=auto chose it): " in refusal("engine=deepspeed", *auto)


# ---- engine and other keys


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "ddp"])
def test_only_ddp_is_bitwise(engine: str) -> None:
    bitwise = ("numerics=bitwise", "batch.per_gpu=8")
    plan_of("engine=ddp", *bitwise)
    message = refusal(*ENGINES[engine], *bitwise)
    assert "doesn't support numerics=bitwise: " in message
    assert message.endswith("; use engine=ddp, or leave numerics out")


def test_bitwise_rejects_compile_and_ddp_options() -> None:
    bitwise = ("numerics=bitwise", "batch.per_gpu=8")
    assert "doesn't support compile=true: the compiled code" in refusal(*bitwise, "compile=true")
    message = refusal(*bitwise, "engine.config.static_graph=true")
    assert "engine.config.static_graph is for DistributedDataParallel, which numerics=bitwise doesn't use" in message


def test_a_dtype_other_than_the_precision_is_refused() -> None:
    plan_of("engine=fsdp", "engine.param_dtype=bf16", "engine.reduce_dtype=bf16", "precision=bf16")
    plan_of("engine=fsdp", "precision=bf16")
    for precision in ("fp32", "fp16"):
        message = refusal("engine=fsdp", "engine.param_dtype=bf16", f"precision={precision}")
        assert (
            f"engine.param_dtype=bf16 and precision={precision} contradict each other; give precision=bf16" in message
        )


# ---- engine.config


ZERO = "engine.config.zero_optimization"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("engine.config.train_batch_size=32", "batch.global_size sets that (here 64 or auto)"),
        ("engine.config.train_micro_batch_size_per_gpu=16", "batch.per_gpu sets that (here 32 or auto)"),
        ("engine.config.gradient_accumulation_steps=2", "batch.accumulation sets that (here 1 or auto)"),
        ("engine.config.gradient_clipping=1.0", "clip_norm sets that (here 0 or auto)"),
        ("engine.config.optimizer={type: Adam}", "optimizer=… sets that"),
        ("engine.config.scheduler={type: WarmupLR}", "lr.warmup, lr.decay"),
        (
            "engine.config.fp16.enabled=true",
            "autocast over fp32 weights, so DeepSpeed's own precision sections stay off (here false or auto)",
        ),
        ("engine.config.bf16={enabled: true}", "precision=… uses autocast"),
        ("engine.config.torch_autocast.enabled=true", "precision=… uses autocast"),
        ("engine.config.amp.enabled=true", "precision=… uses autocast"),
        (f"{ZERO}.stage=2", "engine.stage sets that (here 1 or auto)"),
        (f"{ZERO}.stage=true", "engine.stage sets that (here 1 or auto)"),
        (f"{ZERO}=true", "engine.stage sets that"),
        (f"{ZERO}.offload_optimizer.device=cpu", "engine.offload sets that"),
        (f"{ZERO}.offload_param={{device: cpu}}", "engine.offload sets that, and offloads no parameters"),
        (f"{ZERO}.round_robin_gradients=true", "in the order of the parameters"),
        (f"{ZERO}.parameter_alignment=true", "in the order of the parameters"),
        (f"{ZERO}.zero_quantized_gradients=true", "fewer bits"),
        ("engine.config.communication_data_type=fp16", "fewer bits"),
        ("engine.config.prescale_gradients=true", "how gradients are summed"),
        ("engine.config.gradient_predivide_factor=2.0", "how gradients are summed"),
        ("engine.config.sparse_gradients=true", "how gradients are summed"),
        ("engine.config.checkpoint.load_universal=true", "run.dir=…"),
        ("engine.config.tensor_parallel={autotp_size: 2}", "engine=deepspeed takes zero_optimization, "),
    ],
)
def test_deepspeed_keys_that_contradict_the_plan_are_refused(config: str, expected: str) -> None:
    message = refusal("engine=deepspeed", config)
    assert message.startswith(re.split(r"=|(?<=offload_optimizer)\.", config)[0])
    assert expected in message


@pytest.mark.parametrize(
    "config",
    [
        ["engine.config.train_batch_size=64", "engine.config.gradient_accumulation_steps=1"],
        ["engine.config.train_batch_size=auto", "engine.config.train_micro_batch_size_per_gpu=auto"],
        ["clip_norm=1.0", "engine.config.gradient_clipping=1.0"],
        [f"{ZERO}.stage=1", f"{ZERO}.reduce_bucket_size=1000", f"{ZERO}.offload_optimizer=null"],
        ["engine.config.bf16.enabled=auto", "engine.config.amp=auto", "precision=bf16"],
        ["engine.config.fp16.enabled=false", "engine.config.communication_data_type=fp32"],
        ["engine.config.wall_clock_breakdown=true", f"{ZERO}.round_robin_gradients=false"],
    ],
)
def test_deepspeed_keys_that_agree_with_the_plan_are_accepted(config: list[str]) -> None:
    plan_of("engine=deepspeed", *config)


def test_a_batch_schedule_allows_only_auto_sizes() -> None:
    moving = ("engine=deepspeed", "batch.schedule='0sa:64 10ep:128'")
    plan_of(*moving, "engine.config.train_batch_size=auto")
    message = refusal(*moving, "engine.config.train_batch_size=64")
    assert "batch.global_size sets that (here auto)" in message


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["engine=accelerate", "engine.config.gradient_accumulation_steps=4"], "batch.accumulation sets that (here 1"),
        (["engine=accelerate", "engine.config.mixed_precision=bf16"], "precision sets that (here no)"),
        (["engine=accelerate", "engine.config.split_batches=true"], "engine=accelerate takes device_placement, "),
        (["engine=accelerate", "engine.config.step_scheduler_with_optimizer=false"], "rng_types"),
        (["engine=accelerate", "engine.config.cpu=true"], "device sets that"),
        (["engine=accelerate", "engine.config.dynamo_backend=inductor"], "compile=true sets that"),
        (["engine=fsdp", "engine.config.mp_policy=bf16"], "engine=fsdp takes reshard_after_forward"),
    ],
)
def test_keys_of_other_engines_that_contradict_the_plan_are_refused(overrides: list[str], expected: str) -> None:
    assert expected in refusal(*overrides)


def test_keys_of_other_engines_that_agree_with_the_plan_are_accepted() -> None:
    plan_of("engine=fsdp", "engine.config.reshard_after_forward=false")
    plan_of("engine=accelerate", "engine.config.mixed_precision=bf16", "precision=bf16")
    plan_of("engine=accelerate", "engine.config.cpu=true", "device=cpu", "engine.config.log_with=tensorboard")


# ---- the engine in the plan


@pytest.mark.parametrize(
    ("overrides", "row"),
    [
        (["engine=ddp"], None),
        (["engine=accelerate"], "accelerate: parameters, gradients and optimizer state whole on each rank"),
        (["engine=fsdp"], "fsdp: parameters, gradients and optimizer state sharded over 8 ranks"),
        (["engine=deepspeed", "engine.stage=0"], "deepspeed (ZeRO 0): parameters, gradients and optimizer state whole"),
        (["engine=deepspeed"], "deepspeed (ZeRO 1): optimizer state sharded over 8 ranks"),
        (
            ["engine=deepspeed", "engine.stage=2", "engine.offload=true"],
            "deepspeed (ZeRO 2): gradients and optimizer state sharded over 8 ranks; optimizer state in the host's",
        ),
    ],
)
def test_the_plan_shows_what_is_sharded(overrides: list[str], row: str | None) -> None:
    text = " ".join(table(plan_of(*overrides, world=8)).split())
    assert ("engine" in text) is (row is not None)
    assert row is None or f" engine {row}" in text


def test_the_plan_as_json_names_what_is_sharded() -> None:
    content = json.loads(to_json(plan_of("engine=fsdp", "engine.offload=true")))["engine"]
    everything = ["parameters", "gradients", "optimizer state"]
    assert content == {"name": "fsdp", "stage": None, "shards": everything, "offloads": everything}
    content = json.loads(to_json(plan_of("engine=deepspeed", "engine.stage=2")))["engine"]
    assert content == {"name": "deepspeed", "stage": 2, "shards": everything[1:], "offloads": []}


def test_a_resumed_plan_has_the_new_engine() -> None:
    before = plan_of("engine=deepspeed", "engine.stage=3", world=4)
    assert from_json(to_json(before)) == before
    today = plan_of("engine=fsdp", world=3)
    assert continued(today, before, extends=False) == today
    assert before.dealt(3, None).engine == before.engine


def test_a_plan_without_an_engine_is_read_as_ddp() -> None:
    content = json.loads(to_json(plan_of()))
    del content["engine"], content["numerics"]
    assert from_json(json.dumps(content)) == plan_of()
    assert plan_of().engine == EnginePlacement("ddp")


@pytest.mark.parametrize("gpus_only", ["precision=fp16", "engine=fsdp engine.offload=true"])
def test_gpu_features_are_refused_with_device_cpu(gpus_only: str) -> None:
    asked = gpus_only.split()
    resolve(configured([*asked, "device=auto"]), 2)
    with pytest.raises(ValueError, match="but device=cpu; "):
        resolve(configured([*asked, "device=cpu"]), 2)


@pytest.mark.parametrize("engine", choices_of("engine"))
def test_a_config_can_be_pickled(engine: str) -> None:
    """A spawned worker gets it so."""
    config = config_of(f"engine={engine}")
    assert pickle.loads(pickle.dumps(config)) == config  # noqa: S301
