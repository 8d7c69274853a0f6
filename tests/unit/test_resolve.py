"""Test how a command line becomes a plan: units, sizes, the learning rate's source, and errors."""

from __future__ import annotations

import json
import math
import re
from functools import cache, reduce
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from isobatch.conf.compose import compose
from isobatch.conf.identity import identity
from isobatch.conf.messages import validated
from isobatch.conf.schema import RunConfig
from isobatch.scaling.errors import UserError
from isobatch.scaling.plan import Intervals, Plan
from isobatch.scaling.planning.resolve import continued, resolve
from isobatch.scaling.planning.sizes import evaluation_batch
from isobatch.scaling.report.plan_json import from_json, to_json
from isobatch.scaling.report.plan_table import lr_why, moves, table
from isobatch.scaling.rules import Rule
from tests.support.steps import walk

# A task of 1,000 samples with an LR tuned for both optimizers, independent of the YAML defaults.
TASK = (
    "task=custom",
    "task._target_=my_package.MyTask",
    "task.train_samples=1000",
    "task.tuned={sgd: {lr: 0.05, batch: 32}, adamw: {lr: 0.002, batch: 64}}",
    "duration=10ep",
    "batch.global_size=128",
)
TOKENS = ("task.units_per_sample=512", "batch.unit=tokens", "batch.global_size=65536")


@cache
def composed(*overrides: str) -> RunConfig:
    return compose(overrides)


def config_of(*overrides: str) -> RunConfig:
    """Return ``compose([*TASK, *overrides])``, in a twentieth of its time if no group is chosen."""
    if any("=" not in text or "." not in text.partition("=")[0] for text in overrides if text[:9] != "duration="):
        return composed(*TASK, *overrides)
    base = composed(*TASK)
    plain = base.model_dump(mode="json", by_alias=True)
    for override in map(OverridesParser.create().parse_override, overrides):
        *sections, name = override.key_or_group.split(".")
        reduce(lambda section, key: section[key], sections, plain)[name] = override.value()
        plain["given"].append(override.key_or_group)
    return validated(plain)


def plan_of(*overrides: str, world: int = 2, train_samples: int | None = None) -> Plan:
    return resolve(config_of(*overrides), world, train_samples)


@pytest.mark.parametrize(
    "overrides", [(), ("duration=7st", "lr.base=1e-1"), ("batch.global_size=all", "lr.milestones=[1ep,50%]")]
)
def test_quick_configs_equal_those_of_the_command_line(overrides: tuple[str, ...]) -> None:
    quick, real = config_of(*overrides), compose([*TASK, *overrides])
    assert (quick.model_copy(update={"given": ()}), set(quick.given)) == (
        real.model_copy(update={"given": ()}),
        set(real.given),
    )


def refusal(*overrides: str, world: int = 2, train_samples: int | None = None) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the callers look at the message)
        plan_of(*overrides, world=world, train_samples=train_samples)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- sizes


@pytest.mark.parametrize("world", [1, 2, 3, 8, 1000, 100_000])
def test_a_global_batch_is_the_same_on_any_number_of_ranks(world: int) -> None:
    plan = plan_of(world=world)
    assert (plan.cut.global_size, plan.cut.world) == (128, world)
    assert (plan.steps, plan.samples, plan.added, plan.epochs) == (79, 10_000, 112, 10.0)
    assert plan.peak == plan_of(world=1).peak
    assert plan.identity == identity(composed(*TASK))


def test_given_per_gpu_and_accumulation_replace_a_default_global_size() -> None:
    default = TASK[:-1]  # without batch.global_size
    given = ("batch.per_gpu=10", "batch.accumulation=3")
    for world in (1, 2, 7):
        cut = resolve(composed(*default, *given), world).cut
        assert (cut.global_size, cut.per_gpu, cut.accumulation) == (30 * world, 10, 3)
    for override in given:
        config = composed(*default, override)
        assert resolve(config, 2).cut.global_size == config.batch.global_size


def test_three_given_sizes_have_to_agree() -> None:
    cut = plan_of("batch.per_gpu=20", "batch.accumulation=4").cut
    assert (cut.global_size, cut.per_gpu, cut.accumulation) == (128, 20, 4)
    message = refusal("batch.per_gpu=20", "batch.accumulation=3")
    assert "batch.global_size=128, batch.per_gpu=20 and batch.accumulation=3 contradict each other" in message
    alternatives = re.findall(r"batch\.\w+=\d+", message.split("change one:")[1])
    assert alternatives == ["batch.accumulation=4", "batch.per_gpu=22", "batch.global_size=120"]
    for alternative in alternatives:
        plan_of("batch.per_gpu=20", "batch.accumulation=3", alternative)


def test_later_segments_keep_the_given_per_gpu_or_accumulation() -> None:
    assert (plan_of("batch.per_gpu=20").per_gpu, plan_of("batch.per_gpu=20").accumulation) == (20, None)
    assert (plan_of("batch.accumulation=3").per_gpu, plan_of("batch.accumulation=3").accumulation) == (None, 3)


def test_all_gives_full_batch_descent() -> None:
    plan = plan_of("batch.global_size=all", "batch.per_gpu=64", world=3)
    assert (plan.cut.global_size, plan.cut.accumulation, plan.steps, plan.added) == (1000, 6, 10, 0)
    assert plan_of("batch.global_size=all", train_samples=600).cut.global_size == 600
    message = refusal("batch.global_size=all", "task.train_samples=null")
    assert "task.train_samples=N" in message


def test_an_uneven_cut_is_refused_with_even_ones() -> None:
    assert plan_of("batch.even=true", world=4).cut.even
    message = refusal("batch.even=true", world=3)
    assert "nearest even global batches on 3 ranks: 126 or 129; nearest world sizes for 128: 2 or 4" in message
    assert plan_of("batch.even=true", "batch.global_size=126", world=3).even  # so are all later segments


def test_a_world_of_0_is_refused() -> None:
    assert "world size=0" in refusal(world=0)


# ---- intervals


def test_intervals_are_samples_of_the_first_batch() -> None:
    asked = ("log.every=10st", "evaluate.every=1ep", "checkpoint.every=5%", "noise.every=256sa")
    assert plan_of(*asked).intervals == Intervals(1280, 1000, 500, 256)
    moving = plan_of(*asked, "batch.global_size=64", "batch.schedule='0sa:64 1ep:512'")
    assert moving.intervals == Intervals(640, 1000, 500, 256)
    assert plan_of("evaluate.every=null", "checkpoint.every=10min").intervals == Intervals(1280, None, None, None)


def test_a_checkpoint_is_kept_after_each_multiple_of_its_interval() -> None:
    """Every multiple of a tenth of 5,000 samples lies in one step of 128, of which the end is kept."""
    plan = plan_of("checkpoint.keep_every=10%", "duration=5ep")
    ends = [step.stop for step in walk(plan)]
    kept = [stop for stop in ends if plan.keeps(stop)]
    assert kept == [min(stop for stop in ends if stop >= multiple) for multiple in range(500, 5001, 500)]
    assert not plan.keeps(0)
    assert not any(map(plan_of("duration=5ep").keeps, ends))


def test_intervals_wait_for_the_data() -> None:
    asked = ("task.train_samples=null", "evaluate.every=1ep", "checkpoint.every=5%", "duration=5ep")
    assert (plan_of(*asked).intervals.evaluate, plan_of(*asked).intervals.save) == (None, None)
    assert plan_of(*asked, train_samples=600).intervals == Intervals(1280, 600, 150, None)


def test_intervals_belong_to_the_command_not_to_the_run() -> None:
    stored, fresh = plan_of("log.every=10st"), plan_of("log.every=20st")
    assert stored == fresh
    assert continued(fresh, stored, extends=False).intervals.log == 2560
    assert continued(fresh, stored, extends=True).intervals.log == 2560
    old = json.loads(to_json(stored))
    del old["intervals"]
    assert from_json(json.dumps(old)) == stored


def test_a_rejection_names_the_key_and_its_value() -> None:
    for override in ("duration=50%", "lr.warmup=5tok", "checkpoint.every=5tok", "task.family=image"):
        with pytest.raises(UserError) as error:
            plan_of(override)
        key, _, value = override.partition("=")
        assert (error.value.key, str(error.value.value)) == (key, value)
        assert error.value.fix


# ---- tokens


def test_sizes_given_in_tokens_are_samples_in_the_plan_and_tokens_in_texts() -> None:
    plan = plan_of(*TOKENS, "batch.per_gpu=10240", "lr.base=0.1", "lr.base_batch=16384", world=2)
    assert (plan.cut.global_size, plan.cut.per_gpu, plan.cut.accumulation) == (128, 20, 4)
    assert plan.base_batch == 32
    assert lr_why(plan).startswith("peak 0.4 = 0.1 × 65536/16384 (linear; ")
    step = plan.step_at(0)
    assert step
    assert step.expected_units == 65536
    content = json.loads(to_json(plan))
    assert (content["unit"], content["units_per_sample"], content["global_size"]) == ("tokens", 512, 128)


def test_units_per_sample_give_the_expected_units_of_a_step() -> None:
    step = plan_of("task.units_per_sample=512").step_at(0)
    assert step
    assert (step.stop, step.expected_units) == (128, 128 * 512)


def test_all_works_in_tokens() -> None:
    assert plan_of(*TOKENS, "batch.global_size=all").cut.global_size == 1000


@pytest.mark.parametrize("key", ["batch.global_size", "batch.per_gpu", "lr.base_batch"])
def test_tokens_that_are_no_whole_samples_are_refused_with_the_nearest(key: str) -> None:
    message = refusal(*TOKENS, "lr.base=0.1", f"{key}=10000")
    assert message == f"{key}=10000 tokens isn't a whole number of samples of 512 tokens; nearest: 9728 or 10240"
    for near in (9728, 10240):
        plan_of(*TOKENS, "lr.base=0.1", f"{key}={near}")


def test_refusals_name_sizes_in_tokens_too() -> None:
    message = refusal(*TOKENS, "batch.even=true", world=3)
    assert "batch.global_size=65536 on 3 ranks" in message
    near = re.findall(r"\d+", message.split("batches on 3 ranks:")[1].split(";")[0])
    assert near == [str(126 * 512), str(129 * 512)]
    for size in near:
        plan_of(*TOKENS, "batch.even=true", f"batch.global_size={size}", world=3)
    message = refusal(*TOKENS, "batch.per_gpu=10240", "batch.accumulation=3")
    assert message.endswith(f"batch.accumulation=4 or batch.per_gpu={22 * 512} or batch.global_size={120 * 512}")


def test_tokens_of_a_task_without_them_are_refused() -> None:
    assert "give it as task.units_per_sample=N, or use batch.unit=samples" in refusal("batch.unit=tokens")
    assert "duration=5tok counts tokens" in refusal("duration=5tok")


# ---- before the data is opened


def test_a_plan_leaves_unknown_values_open_before_the_data_is_opened() -> None:
    plan = plan_of("task.train_samples=null", world=3)
    assert (plan.samples, plan.steps, plan.epochs, plan.schedule) == (None, None, None, None)
    assert (plan.cut.global_size, plan.peak.lr) == (128, 0.2)
    assert "unknown until the data is opened (plan.open_data=true opens it)" in table(plan)
    content = json.loads(to_json(plan))
    assert [content[name] for name in ("samples", "steps", "epochs", "train_samples")] == [None] * 4
    opened = plan_of("task.train_samples=null", world=3, train_samples=1000)
    assert opened.steps == 79


def test_a_duration_in_steps_is_known_before_the_data_is_opened() -> None:
    plan = plan_of("task.train_samples=null", "duration=50st")
    assert (plan.samples, plan.steps, plan.epochs) == (6400, 50, None)
    assert plan.schedule
    assert plan.schedule.warmup_samples == 320
    unopened = plan_of("task.train_samples=null", "duration=50st", "lr.warmup=1ep")
    assert (unopened.steps, unopened.schedule) == (50, None)


def test_keys_that_the_decay_does_not_use_are_ignored() -> None:
    unused = ("lr.milestones=[1ep,2ep]", "lr.cooldown=1ep")
    assert plan_of("task.train_samples=null", "duration=50st", *unused).schedule
    assert plan_of("duration=1sa").steps == 1  # 30 %, 60 % and 90 % of one sample are all one sample
    assert plan_of("duration=1sa", "lr.decay=step").steps == 1
    assert plan_of("task.train_samples=null", "duration=50st", "lr.decay=wsd", *unused).schedule is None
    assert plan_of("task.train_samples=null", "duration=50st", "lr.decay=step", *unused).schedule is None


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["duration=0ep"], "duration=0ep trains nothing"),
        (["duration=50%"], "duration=50% is a share of itself; use ep, st, sa or tok"),
        (["lr.warmup=11ep"], "lr.warmup takes 11000 samples, but the run has 10000"),
        (["lr.warmup=60%", "lr.decay=wsd", "lr.cooldown=50%"], "lr.warmup (6000 samples) and lr.cooldown (5000)"),
        (["lr.decay=step", "lr.milestones=[60%,30%]"], "lr.milestones are at samples [6000, 3000]; they have to rise"),
        (["lr.decay=step", "lr.warmup=40%"], "start after lr.warmup (4000 samples)"),
        (["lr.warmup=5tok"], "lr.warmup=5tok counts tokens"),
        (["log.every=5tok"], "log.every=5tok counts tokens"),
        (["evaluate.every=5tok"], "evaluate.every=5tok counts tokens"),
    ],
)
def test_invalid_durations_are_refused_with_a_fix(overrides: list[str], expected: str) -> None:
    assert expected in refusal(*overrides)


def test_an_empty_data_set_is_refused() -> None:
    assert "0 samples" in refusal(train_samples=0)


def test_data_shorter_than_a_batch_wraps() -> None:
    assert plan_of(train_samples=5).steps == 1


# ---- the learning rate


def test_the_plan_shows_how_the_peak_is_derived() -> None:
    plan = plan_of("lr.base=0.1", "lr.base_batch=256", "batch.global_size=1024")
    assert plan.peak.lr == pytest.approx(0.4)
    assert lr_why(plan) == "peak 0.4 = 0.1 × 1024/256 (linear; Goyal et al. 2017); base LR: given (lr.base)"
    content = json.loads(to_json(plan))["lr"]
    assert content == {
        "base": 0.1,
        "base_batch": 256,
        "rule": "linear",
        "factor": 4.0,
        "peak": 0.4,
        "warmup_samples": 500,
        "noise_temperature": pytest.approx(0.4 * 1000 / (1024 * 0.1)),
        "why": lr_why(plan),
        "moves": [],
    }


@pytest.mark.parametrize(
    ("overrides", "base", "batch", "source"),
    [
        (["lr.base=0.1", "lr.base_batch=256"], 0.1, 256, "given"),
        (["lr.base=0.1"], 0.1, 32, "paired"),
        (["lr.base_batch=256"], 0.05, 256, "moved"),
        ([], 0.05, 32, "tuned"),
        (["optimizer=adamw"], 0.002, 64, "tuned"),
        (["~task.tuned.sgd", "optimizer.usual={lr: 0.3, batch: 512}"], 0.3, 512, "usual"),
    ],
)
def test_the_base_comes_from_the_strongest_source(overrides: list[str], base: float, batch: int, source: str) -> None:
    plan = plan_of(*overrides)
    assert (plan.base.lr, plan.base_batch, plan.base_source) == (base, batch, source)


def test_an_experiments_base_counts_as_given_on_the_command_line() -> None:
    config = composed("experiment=digits_large", "lr.base=0.1")
    assert "batch.global_size" in config.given
    assert resolve(config, 2).base_source == "paired"


@pytest.mark.parametrize(
    ("overrides", "rule", "factor"),
    [
        ([], Rule("linear"), 4),
        (["optimizer=adamw"], Rule("sqrt"), 2**0.5),
        (["optimizer=adamw", "lr.rule=linear"], Rule("linear"), 2),
        (["lr.rule=sqrt"], Rule("sqrt"), 2),
        (["lr.rule=power", "lr.power=0.75"], Rule("power", 0.75), 4**0.75),
        (["lr.rule=none"], Rule("none"), 1),
    ],
)
def test_the_rule_scales_the_peak(overrides: list[str], rule: Rule, factor: float) -> None:
    plan = plan_of(*overrides)
    assert plan.segments[0].rule == rule
    assert plan.peak.lr == pytest.approx(plan.base.lr * factor)
    assert json.loads(to_json(plan))["lr"]["factor"] == pytest.approx(factor)


def test_a_given_peak_overrides_any_rule() -> None:
    plan = plan_of("lr.peak=0.3", "lr.base=0.1", "lr.base_batch=1", "lr.rule=linear")
    assert plan.peak.lr == 0.3
    assert lr_why(plan) == "peak 0.3 (given as lr.peak)"
    content = json.loads(to_json(plan))["lr"]
    assert [content[name] for name in ("base", "base_batch", "rule", "factor", "peak")] == [None, None, None, None, 0.3]


def test_a_missing_base_names_the_keys_to_give() -> None:
    custom = ("optimizer=custom", "optimizer._target_=torch.optim.RMSprop")
    message = refusal(*custom)
    assert message.startswith("no lr.base for optimizer=custom with task custom")
    assert refusal(*custom, "lr.base=0.1").startswith("no lr.base_batch")
    for working in (["lr.base=0.1", "lr.base_batch=32"], ["lr.peak=0.1"]):
        plan = plan_of(*custom, *working)
        assert (plan.base.betas, plan.base.eps, plan.base.weight_decay) == ((), None, None)


def test_a_rule_that_overflows_is_refused_and_the_fix_works() -> None:
    wild = ("lr.rule=power", "lr.power=1e5")
    assert "give lr.peak" in refusal(*wild)
    assert plan_of(*wild, "lr.peak=0.1").peak.lr == 0.1


@pytest.mark.parametrize(
    ("overrides", "start"),
    [
        ([], 0.05),  # the base LR if the peak is above it
        (["batch.global_size=32"], 0.0),
        (["batch.global_size=16"], 0.0),
        (["lr.rule=none"], 0.0),
        (["lr.peak=0.06"], 0.05),
        (["lr.peak=0.05"], 0.0),
        (["lr.peak=0.06", "~task.tuned.sgd", "optimizer.usual=null"], 0.0),
        (["lr.warmup_from=0.01"], 0.01),
        (["lr.warmup_from=0"], 0.0),
        (["lr.warmup_from=0.2"], 0.2),
    ],
)
def test_the_warmup_starts_from_the_base_or_a_given_value(overrides: list[str], start: float) -> None:
    plan = plan_of(*overrides)
    step = plan.step_at(0)
    assert step
    assert step.recipe.lr == start


def test_a_warmup_that_would_fall_is_refused() -> None:
    message = refusal("lr.warmup_from=0.21")
    assert message.startswith("lr.warmup_from=0.21 is above the peak LR")
    plan_of(f"lr.warmup_from={message.split('at most ')[1]}")
    assert plan_of("lr.warmup_from=0.21", "lr.warmup=0").peak.lr == 0.2


def test_the_schedule_has_the_configs_durations_in_samples() -> None:
    schedule = plan_of("lr.decay=step", "lr.warmup=2st", "lr.gamma=0.5", "lr.milestones=[3ep,50%]").schedule
    assert schedule
    assert (schedule.samples, schedule.warmup_samples, schedule.milestones) == (10_000, 256, (3000, 5000))
    assert (schedule.decay, schedule.gamma, schedule.cooldown_samples) == ("step", 0.5, 0)
    schedule = plan_of("lr.decay=wsd", "lr.cooldown=2ep", "lr.final=0.1").schedule
    assert schedule
    assert (schedule.cooldown_samples, schedule.final, schedule.milestones) == (2000, 0.1, ())


def test_the_plan_names_the_optimizer_and_why() -> None:
    assert json.loads(to_json(plan_of()))["optimizer"] == {
        "name": "sgd",
        "why": "the default",
        "betas": [0.9],
        "eps": None,
        "weight_decay": 0.0001,
    }
    assert json.loads(to_json(plan_of("optimizer=adamw")))["optimizer"]["why"] == "given"
    plan = plan_of("optimizer=adamw", "optimizer.betas=[0.8,0.9]", "optimizer.eps=1e-6", "optimizer.weight_decay=0.3")
    assert (plan.peak.betas, plan.peak.eps, plan.peak.weight_decay) == ((0.8, 0.9), 1e-6, 0.3)


# ---- plan.json


def test_plan_json_has_the_keys_that_readers_need() -> None:
    plan = plan_of("batch.per_gpu=20", world=3)
    content = json.loads(to_json(plan))
    assert content["micro_batches"] == [[15, 2], [14, 7]]
    named = ("global_size", "per_gpu", "accumulation", "world_size", "steps", "samples", "epochs", "unit")
    assert [content[name] for name in named] == [128, 20, 3, 3, 79, 10_000, 10.0, "samples"]
    (segment,) = content["segments"]
    assert (segment["start_sample"], segment["global_size"], segment["rule"]["name"]) == (0, 128, "linear")
    (stage,) = content["stages"]
    assert [stage[name] for name in ("first_step", "global_size", "per_gpu", "accumulation")] == [1, 128, 20, 3]
    assert content["units_per_sample"] is None
    assert content["identity"] == plan.identity
    assert isinstance(content["warnings"], list)
    assert set(content["lr"]) >= {"base", "base_batch", "rule", "factor", "peak", "warmup_samples", "why"}
    assert from_json(to_json(plan)) == plan


# ---- whole recipes

ADAMW = ("optimizer=adamw", "task.tuned={adamw: {lr: 0.001, batch: 64, betas: [0.95, 0.98], weight_decay: 0.1}}")


def test_a_tuning_may_state_the_whole_recipe() -> None:
    plan = plan_of(*ADAMW, "lr.rule=sde")  # at 128
    assert plan.base.betas == (0.95, 0.98)
    assert plan.peak.betas == (0.9, 0.96)
    assert plan.peak.lr == pytest.approx(0.001 * math.sqrt(2))
    assert (plan.peak.eps, plan.peak.weight_decay) == (pytest.approx(1e-8 / math.sqrt(2)), 0.1)
    assert moves(plan) == ["β₁ 0.95 → 0.9, β₂ 0.98 → 0.96 (1 − κ(1 − β))", "ε 1e-08 → 7.07107e-09 (ε/√κ)"]


def test_given_values_override_the_tuning_and_the_rule() -> None:
    plan = plan_of(*ADAMW, "lr.rule=sde", "optimizer.betas=[0.8,0.9]")
    assert plan.base.betas == plan.peak.betas == (0.8, 0.9)
    assert moves(plan)[0] == "β₁ and β₂ given for this batch, so not scaled (lr.rule=sde would scale it)"
    assert plan_of(*ADAMW, "optimizer.weight_decay=0.3").peak.weight_decay == 0.3
    assert plan_of("optimizer=sgd", "optimizer.momentum=0.5").peak.betas == (0.5,)


def test_a_refusal_names_the_largest_valid_batch_in_the_given_unit() -> None:
    message = refusal(*ADAMW, "lr.rule=sde", "batch.global_size=1280")
    assert "the largest batch at which it holds is 1,279 samples: use batch.global_size=1279" in message
    plan_of(*ADAMW, "lr.rule=sde", "batch.global_size=1279")
    tokens = ("batch.unit=tokens", "task.units_per_sample=16", "batch.global_size=20480")
    assert "the largest batch at which it holds is 20,464 tokens: use batch.global_size=20464" in refusal(
        *ADAMW, "lr.rule=sde", *tokens
    )


def test_legw_scales_the_warmup_with_the_batch() -> None:
    plan = plan_of("lr.base=0.1", "lr.base_batch=32", "lr.rule=legw", "lr.warmup=10%")
    assert plan.schedule
    assert plan.schedule.warmup_samples == 4000
    assert moves(plan) == ["warmup × 4 (as much as the batch)"]
    message = refusal("lr.base=0.1", "lr.base_batch=32", "lr.rule=legw", "lr.warmup=10%", "batch.global_size=321")
    assert "the largest batch at which it fits is 320 samples" in message


def test_weight_decay_is_scaled_on_request() -> None:
    plan = plan_of(*ADAMW, "lr.scale_weight_decay=true")
    assert plan.peak.weight_decay == pytest.approx(0.1 * math.sqrt(2))
    assert moves(plan) == ["weight decay 0.1 → 0.141421 (λ₀·κ·η₀/η; Bergsma et al. 2025)"]
    assert "given for this batch (optimizer.weight_decay=0.2)" in refusal(
        *ADAMW, "lr.scale_weight_decay=true", "optimizer.weight_decay=0.2"
    )


def test_the_noise_rule_uses_the_noise_scale() -> None:
    plan = plan_of("lr.base=0.1", "lr.base_batch=64", "lr.rule=noise", "lr.noise_scale=128")
    assert plan.peak.lr == pytest.approx(0.15)
    assert "0.1 × ((1 + 128/64)/(1 + 128/128))^1 (noise; McCandlish et al. 2018)" in lr_why(plan)


def test_linear_scaling_keeps_the_noise_of_sgd() -> None:
    """The noise is ηN/(B(1−m)) (Smith & Le 2018)."""

    def noise(plan: Plan) -> Any:
        return plan.temperature(plan.stages[0])

    first, second = (plan_of("lr.base=0.1", "lr.base_batch=64", f"batch.global_size={size}") for size in (64, 512))
    assert noise(first) == pytest.approx(0.1 * 1000 / (64 * 0.1))
    assert noise(second) == pytest.approx(noise(first))
    other = plan_of("lr.base=0.1", "lr.base_batch=64", "batch.global_size=512", "lr.rule=sqrt")
    assert noise(other) == pytest.approx(noise(first) / math.sqrt(8))
    assert noise(plan_of("optimizer=adamw")) is None
    assert noise(plan_of("task.train_samples=null")) is None


def test_a_given_peak_leaves_the_rest_of_the_recipe_to_the_rule() -> None:
    plan = plan_of(*ADAMW, "lr.rule=sde", "lr.peak=0.03")
    assert (plan.peak.lr, plan.peak.betas) == (0.03, (0.9, 0.96))
    assert lr_why(plan) == "peak 0.03 (given as lr.peak)"
    assert "the largest batch at which it holds is 1,279 samples" in refusal(
        *ADAMW, "lr.rule=sde", "lr.peak=0.03", "batch.global_size=1280"
    )
    assert moves(plan_of("lr.peak=0.3", "lr.rule=legw", "lr.base_batch=64")) == ["warmup × 2 (as much as the batch)"]
    message = refusal("optimizer=adamw", "optimizer.usual=null", "~task.tuned.adamw", "lr.rule=sde", "lr.peak=0.03")
    assert "give lr.base_batch, the tuned batch" in message
    assert "which lr.peak replaces" in refusal("lr.peak=0.3", "lr.scale_weight_decay=true")


def test_a_tuning_of_another_shape_is_refused() -> None:
    message = refusal("optimizer=adamw", "task.tuned={adamw: {lr: 0.1, batch: 8, betas: [0.9]}}")
    assert message.startswith("task.tuned.adamw.betas=[0.9]; adamw has 2")
    assert "sgd has no ε that a rule knows" in refusal("task.tuned={sgd: {lr: 0.1, batch: 8, eps: 1e-8}}")


def test_a_tuning_of_another_model_is_marked_as_adapted() -> None:
    assert plan_of("model._target_=a.B").base_source == "adapted"
    assert plan_of("data._target_=a.B").base_source == "adapted"
    assert (
        plan_of("optimizer.usual={lr: 0.1, batch: 8}", "~task.tuned.sgd", "model._target_=a.B").base_source == "usual"
    )


def test_every_rank_of_synced_statistics_needs_a_sample() -> None:
    sync = ("batchnorm.mode=sync", "batch.global_size=2")
    assert plan_of(*sync, world=2).sync
    message = refusal(*sync, world=3)
    assert message.startswith("batchnorm.mode=sync needs a sample on every rank in every pass, but 2 samples per step")


# ---- numerics=bitwise


def test_bitwise_cuts_depend_only_on_the_global_and_the_per_gpu_batch() -> None:
    sizes = ("batch.global_size=100", "batch.per_gpu=16", "numerics=bitwise")
    plans = [plan_of(*sizes, world=world) for world in (1, 2, 3, 4, 8)]
    assert {plan.cut.pieces for plan in plans} == {7}
    assert [plan.cut.accumulation for plan in plans] == [7, 4, 3, 2, 1]
    assert len({plan.identity for plan in plans}) == 1
    assert from_json(to_json(plans[2])) == plans[2]
    assert continued(plans[0], plans[2], extends=False) == plans[0]
    assert plan_of(*sizes, "batch.accumulation=3", world=3).cut.pieces == 7
    growing = plan_of("numerics=bitwise", "batch.per_gpu=16", "batch.schedule='0sa:128 2000sa:200'", world=3)
    assert [stage.cut.pieces for stage in growing.stages] == [8, 13]
    ghosts = ("batchnorm.mode=ghost", "batchnorm.ghost_size=8", "batch.global_size=96", "batch.per_gpu=20")
    assert plan_of(*ghosts, "numerics=bitwise", world=5).cut.pieces == 6
    in_tokens = plan_of(*TOKENS, "batch.global_size=4096", "batch.per_gpu=1024", "numerics=bitwise", world=3)
    assert in_tokens.cut.pieces == 4


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "give batch.per_gpu"),
        (["batch.accumulation=2"], "give batch.per_gpu"),
        (["batch.per_gpu=8", "batchnorm.mode=sync"], "use batchnorm.mode=ghost, or null"),
        (["batch.per_gpu=16", "batch.global_size=100", "batch.accumulation=2"], "batch.accumulation=4"),
        (["batch.per_gpu=16", "batch.global_size=64", "batch.even=true"], "nearest even global batches on 3 ranks: "),
        (["batch.per_gpu=16", "batch.global_size=100", "batch.even=true"], "nearest world sizes for 100: none"),
    ],
)
def test_incompatible_keys_are_refused_with_bitwise(overrides: list[str], expected: str) -> None:
    assert expected in refusal("numerics=bitwise", *overrides, world=2 if "batch.accumulation=2" in overrides else 3)


def test_bitwise_needs_a_global_batch_independent_of_processes() -> None:
    """Otherwise several runs would have one identity."""
    sizes = ("task=digits", "batch.per_gpu=4", "batch.accumulation=2")
    assert resolve(compose(sizes), 2).cut.global_size == 16
    with pytest.raises(ValueError, match=r"global batch depends on .*; give batch\.global_size, or leave"):
        resolve(compose([*sizes, "numerics=bitwise"]), 2)
    resolve(compose([*sizes, "numerics=bitwise", "batch.global_size=16"]), 2)


NEVER = ("checkpoint.best=val/loss:min", "evaluate.last=false", "duration=10st", "batch.global_size=64")


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (("evaluate.every=null",), "evaluate.every=1ep"),
        (("evaluate.every=10st",), "sample 576, before the first evaluation is due (sample 640)"),
        (("evaluate.every=577sa",), "a shorter evaluate.every"),
    ],
)
def test_the_best_of_no_evaluation_is_rejected(overrides: tuple[str, ...], named: str) -> None:
    assert named in refusal(*NEVER, *overrides)
    plan_of(*NEVER, *overrides, "evaluate.first=true")


def test_an_evaluation_due_before_the_last_step_counts() -> None:
    plan_of(*NEVER, "evaluate.every=576sa")


def test_evaluation_batches_are_given_in_the_same_unit() -> None:
    config = config_of(*TOKENS, "batch.per_gpu=10240", "evaluate.per_gpu=1024")
    assert evaluation_batch(config, resolve(config, 1)) == 2
    assert evaluation_batch(config, resolve(config, 1), limit=1) == 1
    assert "evaluate.per_gpu=700 tokens" in refusal(*TOKENS, "evaluate.per_gpu=700")
