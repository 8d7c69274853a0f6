"""Test that the engine ``accelerate`` trains the same run as ``ddp``, and respects its launcher's options."""

from __future__ import annotations

import sys
from typing import Any

import accelerate  # noqa: F401  imported once, before ranks are forked
import pytest

from isobatch.conf.compose import compose
from isobatch.scaling.errors import UserError
from isobatch.scaling.planning.resolve import resolve
from isobatch.trainers.engines.accelerate import refuse_contradictions
from isobatch.trainers.engines.make import make_engine
from isobatch.trainers.ranks.world import World
from isobatch.trainers.tasks.task import make_task
from tests.ranks.test_exact import task
from tests.support.harness import ROUNDING, Run, Runs, distance, in_ranks

HANDLER = "engine.config.kwargs_handlers=[{_target_:accelerate.DistributedDataParallelKwargs,%s}]"
COUNTED = task("Counted", "clip_norm=0.5")  # dropout, unequal units


def both(runs: Runs, world: int, *overrides: str) -> tuple[Run, Run]:
    """Return the runs of ``ddp`` and ``accelerate``."""
    return runs(world, *overrides), runs(world, *overrides, "engine=accelerate")


@pytest.mark.parametrize(
    ("world", "options"),
    [
        (1, ("batch.per_gpu=7",)),
        (3, ("batch.per_gpu=5",)),  # three passes, the last of them uneven
        (4, ("batch.global_size=2", "task.args.samples=50")),  # stand-ins
        (2, ("ema=50sa", "optimizer=adamw", "lr.peak=0.01")),
        (2, ("precision=bf16",)),
    ],
)
def test_run_equals_that_of_ddp(runs: Runs, world: int, options: tuple[str, ...]) -> None:
    """The runs are bitwise equal on the same cut, since both reduce the same sums in the same buckets."""
    ddp, accelerated = both(runs, world, *COUNTED, *options)
    assert distance(ddp.weights(), accelerated.weights()) == 0
    assert accelerated.losses() == ddp.losses()


def test_run_is_the_same_on_another_cut(runs: Runs) -> None:
    whole = runs(1, *COUNTED)
    assert distance(whole.weights(), runs(3, *COUNTED, "batch.per_gpu=5", "engine=accelerate").weights()) < ROUNDING


def test_reassigned_buffers_equal_those_of_ddp(runs: Runs) -> None:
    """Every forward starts with rank 0's buffer, even if a module assigns a new tensor to it."""
    odd = (
        "task=custom",
        "task._target_=tests.support.tasks.Odd",
        "lr.peak=0.05",
        "duration=5st",
        "evaluate.every=null",
    )
    ddp, accelerated = both(runs, 2, *odd)
    assert distance(ddp.weights(), accelerated.weights()) == 0


def test_nonfinite_step_is_skipped(runs: Runs) -> None:
    nan = (*COUNTED, "task._target_=tests.support.tasks.BecomesNaN", "on_nonfinite=skip")
    ddp, accelerated = both(runs, 2, *nan)
    assert any(event["event"] == "skip" for event in accelerated.events())
    assert distance(ddp.weights(), accelerated.weights()) == 0


def test_resumes_with_ddp_on_another_world_size(runs: Runs) -> None:
    adamw = (*COUNTED, "optimizer=adamw", "lr.peak=0.01")
    stopped = runs(3, *adamw, "engine=accelerate", stop_at=5)
    assert [end["state"] for end in stopped.ends] == ["stopped"] * 3
    rest = runs(2, *adamw, resume=stopped)
    assert distance(rest.weights(), runs(1, *adamw).weights()) < 1e-5


def test_wrapper_has_the_options_of_ddp(runs: Runs) -> None:
    """Gradients are views of the buckets, and a model without buffers sends no message for them."""

    def wrapped(world: World) -> list[bool]:
        config = compose([*COUNTED, "engine=accelerate", "device=cpu"])
        counted = make_task(config)
        model = counted.model()
        engine: Any = make_engine(config, counted, model, resolve(config, world.size, 500).peak, world)
        wrapper = engine._reducer._wrapper
        return [wrapper.gradient_as_bucket_view, wrapper.forward_sync_buffers]

    assert in_ranks(2, wrapped, runs.folder) == [[True, False]] * 2


def test_keywords_of_the_ddp_handler_are_used(runs: Runs) -> None:
    partial = task("Partial", "batch.global_size=4", "engine=accelerate")
    unused = runs(2, *partial, HANDLER % "find_unused_parameters:true,broadcast_buffers:false")
    assert distance(unused.weights(), runs(1, *partial).weights()) < ROUNDING


@pytest.mark.parametrize(
    ("option", "key", "expected"),
    [
        (HANDLER % "comm_hook:fp16", "engine.config.kwargs_handlers", "comm_hook=fp16"),
        (
            "engine.config.kwargs_handlers=[{_target_:accelerate.utils.GradScalerKwargs}]",
            "engine.config.kwargs_handlers",
            "GradScalerKwargs",
        ),
        ("engine.config.bucket_cap_mb=50", "engine.config.bucket_cap_mb", "kwargs_handlers"),
        ("engine.config.log_with=no-such-tracker", "engine.config", "no-such-tracker"),
    ],
)
def test_invalid_config_is_rejected(runs: Runs, option: str, key: str, expected: str) -> None:
    for end in runs(2, *COUNTED, "engine=accelerate", option).ends:
        assert (end["raised"], end["key"]) == ("UserError", key)
        assert expected in end["message"]


def test_missing_package_is_reported_with_the_install_command(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert "pip install '.[accelerate]'" in runs(1, *COUNTED, "engine=accelerate").ends[0]["message"]


LAUNCHED = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_DYNAMO_MODE": "default"}


@pytest.mark.parametrize(
    ("env", "fix"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "give precision=bf16"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "give precision=bf16 instead"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "deepspeed engine.stage=3"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp_version=1 isn't supported"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true",
             "FSDP_RESHARD_AFTER_FORWARD": "false"},
            "engine=fsdp engine.offload=true engine.config.reshard_after_forward=false",
        ),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "engine=fsdp and engine=deepspeed shard a model"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "runs are data-parallel"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "give compile=true"),
    ],
)  # fmt: skip
def test_launcher_options_that_contradict_the_plan_are_rejected(env: dict[str, str], fix: str) -> None:
    with pytest.raises(UserError, match="accelerate launch says") as refused:
        refuse_contradictions(LAUNCHED | env, "fp32", compiled=False, device="cpu")
    assert fix in str(refused.value)


@pytest.mark.parametrize(
    ("env", "plan"),
    [
        ({}, {"precision": "bf16"}),  # "no" is also the launcher's default
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {"precision": "bf16"}),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {"compiled": True}),
        ({"ACCELERATE_USE_CPU": "True", "ACCELERATE_USE_FSDP": "false"}, {}),
    ],
)
def test_launcher_options_that_agree_with_the_plan_are_accepted(env: dict[str, str], plan: dict[str, Any]) -> None:
    refuse_contradictions(LAUNCHED | env, **{"precision": "fp32", "compiled": False, "device": "cpu"} | plan)


def test_launcher_that_asks_for_the_cpu_on_a_gpu_is_rejected() -> None:
    with pytest.raises(UserError, match="give device=cpu"):
        refuse_contradictions({"ACCELERATE_USE_CPU": "True"}, "fp32", compiled=False, device="cuda")


def test_launcher_options_are_checked_before_training(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """An accumulation equal to the plan's changes nothing. A different one is rejected, like other contradictions."""
    three = (*COUNTED, "batch.per_gpu=14", "engine=accelerate")
    plain = runs(1, *three)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    assert distance(runs(1, *three).weights(), plain.weights()) == 0
    refused = runs(1, *three, "batch.per_gpu=41").ends[0]["message"]
    assert "STEPS=3, but the plan has batch.accumulation=1; set it to 1 or auto, or leave it out" in refused
    others = (option for option in three if not option.startswith("batch.global_size"))
    scheduled = runs(1, *others, "batch.schedule=0sa:42 42sa:84")
    assert "has batch.accumulation=3, 6; set it to 1 or auto" in scheduled.ends[0]["message"]
    assert not (scheduled.run.path / "metrics.jsonl").exists()  # rejected before training
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert "give precision=fp16" in runs(1, *three).ends[0]["message"]
