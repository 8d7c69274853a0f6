"""Test the config: valid values, and the errors for invalid ones."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from isobatch.conf import hardware
from isobatch.conf.compose import compose, unused_keys
from isobatch.conf.existing import extends, tuning_directory
from isobatch.conf.help import annotated, command_line, help_text, meanings
from isobatch.conf.identity import identity
from isobatch.conf.keys import HERE, RECORDED, keys, leaves, sections
from isobatch.conf.messages import validated
from isobatch.conf.saved import dump
from isobatch.conf.schema import RunConfig
from isobatch.conf.sweep import expand
from isobatch.scaling.errors import UserError
from isobatch.scaling.families import FAMILIES
from isobatch.scaling.planning.automatic import configured
from isobatch.scaling.planning.resolve import resolve
from isobatch.scaling.rules import LAWS
from isobatch.scaling.schedule import DECAYS
from isobatch.scaling.units import Duration

LARGE = set(leaves("", yaml.safe_load((HERE / "experiment/digits_large.yaml").read_text())))


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    """Return the defaults as plain values."""
    return compose([]).model_dump(mode="json", by_alias=True)


def message(*overrides: str, config_dir: Path | None = None) -> str:
    with pytest.raises(UserError) as refusal:
        compose(overrides, config_dir)
    return str(refusal.value)


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


# ---- defaults


def test_every_key_has_its_default_in_yaml_and_none_in_the_schema() -> None:
    def defaults_of(model: type[BaseModel]) -> list[str]:
        return [name for name, field in model.model_fields.items() if not field.is_required()]

    sections = {type(value) for value in dict(compose([])).values() if isinstance(value, BaseModel)}
    assert not [name for model in (RunConfig, *sections) for name in defaults_of(model)]
    in_files = set()
    for file in [HERE / "config.yaml", *HERE.glob("*/*.yaml")]:
        if file.parent.name != "experiment":
            content = yaml.safe_load(file.read_text())
            content.pop("defaults", None)
            in_files |= set(leaves("" if file.parent == HERE else file.parent.name, content))
    in_schema = {key for key in keys() if key not in sections_of_schema() and key not in RECORDED}
    assert {
        key for key in in_schema if not any(key == known or known.startswith(f"{key}.") for known in in_files)
    } == set()


def sections_of_schema() -> set[str]:
    return sections() - {"optimizer.usual"}


def test_every_key_is_explained() -> None:
    unexplained = set(keys()) - sections_of_schema() - meanings().keys() - set(RECORDED)
    assert {key for key in unexplained if not key.endswith(".name") and not key.startswith("optimizer.usual.")} == set()


@pytest.mark.parametrize("file", sorted(HERE.glob("*/*.yaml")), ids=lambda file: f"{file.parent.name}={file.stem}")
def test_every_choice_composes(file: Path) -> None:
    target = [f"{file.parent.name}._target_=some.Thing"] if "???" in file.read_text() else []
    config = compose([f"{file.parent.name}={file.stem}", *target])
    assert (file.parent.name in config.given) == (file.parent.name != "experiment")


def test_config_is_frozen() -> None:
    with pytest.raises(ValidationError):
        compose([]).batch.global_size = 3  # type: ignore[misc]


# ---- values from the command line


def test_values_have_their_types() -> None:
    config = compose(
        ["batch.global_size=64", "lr.base=1", "lr.warmup=500st", "clip_norm=1.5", "lr.milestones=[1ep,50%]"]
    )
    assert config.batch.global_size == 64
    assert config.lr.base == 1.0
    assert config.lr.warmup == Duration(500, "st")
    assert config.lr.milestones == (Duration(1, "ep"), Duration(50, "%"))
    assert config.given == ("batch.global_size", "clip_norm", "lr.base", "lr.milestones", "lr.warmup")
    assert compose(["recompute=[1,blocks.*]"]).recompute == ("1", "blocks.*")


def test_free_mappings_take_new_keys_without_a_plus() -> None:
    config = compose(
        [
            "task.args.new=[1,{a:b}]",
            "task.args.width=7",
            "~task.args.dropout",
            "model._target_=some.Model",
            "model.args={deep: {deeper: 1}}",
            "optimizer.args.maximize=true",
            "engine.config.bucket_cap_mb=50",
            "cluster.environment.NCCL_DEBUG=INFO",
            "+cluster.environment.OMP_NUM_THREADS=4",
        ]
    )
    assert config.task.args == {"width": 7, "depth": 2, "new": [1, {"a": "b"}]}
    assert config.model.args == {"deep": {"deeper": 1}}
    assert config.optimizer.args == {"maximize": True}
    assert config.engine.config == {"bucket_cap_mb": 50}
    assert config.cluster.environment == {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": 4}


@pytest.mark.parametrize(
    ("overrides", "given"),
    [
        ([], set()),
        (["batch.per_gpu=8"], {"batch.per_gpu"}),
        (["batch={per_gpu: 8, accumulation: 2}"], {"batch.per_gpu", "batch.accumulation"}),
        (["optimizer=adamw"], {"optimizer"}),
        (["optimizer=adamw", "optimizer.eps=1e-6"], {"optimizer", "optimizer.eps"}),
        (["lr.milestones.0=20%"], {"lr.milestones"}),
        (["task.args.width=7", "~task.args.depth"], {"task.args.width", "task.args.depth"}),
        (["experiment=digits_large"], {"batch.global_size", "lr.rule", "lr.warmup", "duration"}),
        (
            ["experiment=digits_large", "batch.global_size=64"],
            {"batch.global_size", "lr.rule", "lr.warmup", "duration"},
        ),
        (["experiment=null"], set()),
    ],
)
def test_given_lists_the_keys_of_the_command(overrides: list[str], given: set[str]) -> None:
    assert set(compose(overrides).given) == given


def test_given_lists_the_keys_of_inherited_experiments(tmp_path: Path) -> None:
    head = "# @package _global_\n"
    write(tmp_path / "experiment/base.yaml", f"{head}batch: {{per_gpu: 4}}\nlr: {{base: 0.1}}\n")
    write(tmp_path / "shared.yaml", "clip_norm: 1.0\n")
    write(
        tmp_path / "experiment/sub/mine.yaml",
        f"{head}defaults:\n  - /experiment/base\n  - /shared\n  - override /optimizer: adamw\nlr: {{base: 0.2}}\n",
    )
    config = compose(["experiment=sub/mine", "seed=3"], tmp_path)
    assert set(config.given) == {"batch.per_gpu", "lr.base", "clip_norm", "optimizer", "seed"}
    assert (config.lr.base, config.optimizer.name, config.clip_norm) == (0.2, "adamw", 1.0)
    both = compose(["experiment=[base,digits_large]"], tmp_path)
    assert set(both.given) == {"batch.per_gpu", "lr.base", *LARGE}


@pytest.mark.parametrize("name", ["plain", "with space", "it's", 'a"b', "a,b=c[d]", "ünï", "a\\b"])
def test_users_yaml_is_found_in_a_folder_of_any_name(tmp_path: Path, name: str) -> None:
    write(tmp_path / name / "task/mine.yaml", (HERE / "task/digits.yaml").read_text().replace("digits", "mine", 1))
    assert compose(["task=mine"], tmp_path / name).task.name == "digits"
    assert "task can be custom, digits, " in message("task=mne", config_dir=tmp_path / name)


def test_broken_users_yaml_is_named(tmp_path: Path) -> None:
    write(tmp_path / "task/broken.yaml", "name: [a\n")
    assert "task/broken.yaml" in message("task=broken", config_dir=tmp_path)
    write(tmp_path / "task/list.yaml", "- a\n")
    assert 'task=["a"]' in message("task=list", config_dir=tmp_path)
    write(tmp_path / "task/short.yaml", "name: short\n")
    text = message("task=short", config_dir=tmp_path)
    assert "_target_, args, local, train_samples, units_per_sample, family, tuned" in text
    assert "task=custom" in text
    write(tmp_path / "task/typo.yaml", "name: typo\n_target_: a.B\ntrain_sample: 3\n")
    assert "did you mean task.train_samples?" in message("task=typo", config_dir=tmp_path)
    write(tmp_path / "optimizer/mine.yaml", "eps: 1.0e-6\n")
    assert "optimizer=custom" in message("optimizer=mine", config_dir=tmp_path)
    write(tmp_path / "experiment/headless.yaml", "batch: {global_size: 8}\nduration: 5ep\n")
    write(tmp_path / "experiment/unpackaged.yaml", "defaults:\n  - override /task: images\n")
    for name in ("headless", "unpackaged"):
        text = message(f"experiment={name}", config_dir=tmp_path)
        assert text.count("`# @package _global_`") == 1
        assert text.startswith(f"{tmp_path}/experiment/{name}.yaml ")
        assert "@experiment" not in text
    write(tmp_path / "experiment/absent.yaml", "# @package _global_\ndefaults:\n  - override /tsk: images\n")
    assert "experiment/absent.yaml names 'tsk'" in message("experiment=absent", config_dir=tmp_path)
    write(tmp_path / "experiment/typo.yaml", "# @package _global_\ndefaults:\n  - override /optimizer: adm\n")
    assert "did you mean adamw?" in message("experiment=typo", config_dir=tmp_path)


@pytest.mark.parametrize("value", ["5", "90", "500", "0.05"])
@pytest.mark.parametrize("key", ["stop.after", "checkpoint.every", "lr.warmup", "evaluate.every", "duration"])
def test_a_bare_number_is_rejected_with_units_that_its_key_takes(key: str, value: str) -> None:
    suggested = re.findall(r"[\d.]+(?:[a-z]+|%)", message(f"{key}={value}").partition("; write ")[2])
    assert suggested
    for text in suggested:
        compose([f"{key}={text}"])
    assert all(text.endswith("min") for text in suggested) == (key == "stop.after")
    assert any(text.endswith("%") for text in suggested) == (key == "lr.warmup" and float(value) <= 100)


def test_users_yaml_may_inherit_one_of_ours(tmp_path: Path) -> None:
    write(tmp_path / "task/mine.yaml", "defaults: [custom, _self_]\n_target_: my.Task\nargs: {width: 3}\n")
    write(tmp_path / "optimizer/mine.yaml", "defaults: [adamw, _self_]\neps: 1.0e-6\n")
    config = compose(["task=mine", "optimizer=mine"], tmp_path)
    assert (config.task.target, config.task.args, config.task.tuned) == ("my.Task", {"width": 3}, {})
    assert (config.optimizer.name, config.optimizer.epsilon) == ("adamw", 1e-6)


@pytest.mark.parametrize("name", ["optimizer/sgd.yaml", "experiment/digits_large.yaml", "config.yaml"])
def test_users_yaml_named_like_ours_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, "")
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / name} is named as a file of Isobatch's own")):
        command_line(["--config-dir", str(tmp_path)])
    command_line(["--config-dir", str(HERE)])


def test_a_choice_may_be_placed_at_another_key(tmp_path: Path) -> None:
    assert compose(["optimizer@optimizer=adamw"]) == compose(["optimizer=adamw"])
    inner = compose(["+optimizer@task.args.optimizer=adamw"])
    assert inner.task.args["optimizer"]["betas"] == [0.9, 0.999]
    assert (inner.optimizer.name, inner.given) == ("sgd", ("task.args.optimizer",))
    write(tmp_path / "net/big.yaml", "_target_: my.Net\nargs: {width: 3}\n")
    assert compose(["+net@model=big"], tmp_path).model.args == {"width": 3}


# ---- rejected values: the error's key, and other words that it names (test_messages has the wording)

CUSTOM = "optimizer=custom optimizer._target_=my.Optimizer"
REJECTED = [
    # keys
    ("batch.globl_size=3", "batch.globl_size", ["batch.global_size"]),
    ("global_size=3", "global_size", ["batch.global_size"]),
    ("every=3ep", "every", ["checkpoint.every", "control.every", "evaluate.every", "log.every"]),
    ("+foo=3", "foo", []),
    ("foo.bar=3", "foo.bar", []),
    ("foo/bar=3", "foo/bar", []),
    ("epochs=3", "epochs", ["duration=3ep"]),
    ("batch_size=3", "batch_size", ["batch.global_size", "batch.per_gpu"]),
    ("resume=true", "resume", ["run.dir=DIR"]),
    ("trainer.resume_from_checkpoint=x", "trainer.resume_from_checkpoint", ["run.dir=DIR"]),
    ("ckpt_path=x", "ckpt_path", ["run.dir=DIR", "init_from=PATH"]),
    ("save_steps=500", "save_steps", ["checkpoint.every=500st"]),
    ("save_total_limit=3", "save_total_limit", ["checkpoint.keep"]),
    ("ema_decay=0.999", "ema_decay", ["ema=2000sa"]),
    ("ema.decay=0.999", "ema", ["{'decay': 0.999}"]),
    ("lr=0.1", "lr", ["lr.base", "lr.peak"]),
    ("lr.foo=1", "lr.foo", ["lr.base"]),
    ("given=[a]", "given", []),
    ("optimizer=adamw optimizer.momentum=0.5", "optimizer.momentum", ["betas", "optimizer=sgd"]),
    ("+batch.global_size=3", "", ["batch.global_size", "+"]),
    ("+task=digits", "task", ["task=digits"]),
    ("++task=digits", "task", ["task=digits"]),
    ("~foo", "", ["~foo"]),
    ("~seed", "seed", ["null"]),
    ("~batch.per_gpu", "batch.per_gpu", ["null"]),
    ("~task", "task", ["null"]),
    ("task=null", "task", ["custom", "digits"]),
    ("optimizer@other=adamw", "optimizer", ["other", "optimizer=adamw"]),
    ("+optimizer@other=adamw", "optimizer", ["other", "optimizer=adamw"]),
    ("task@_global_=digits", "task", ["_global_", "task=digits"]),
    ("optimizer.name=adamw", "optimizer.betas", ["eps", "optimizer=adamw"]),
    ("hydra.run.dir=x", "hydra", []),
    ("hydra/launcher=x", "hydra", []),
    ("hydra=x", "hydra", []),
    ("~hydra.job", "hydra", []),
    # groups
    ("optimizer=adm", "optimizer", ["adamw?", "adafactor, adamw, auto"]),
    ("task=3", "task", ["custom, digits"]),
    ("task=a.B", "task", ["task=custom task._target_=a.B"]),
    ("optimizer=a.B", "optimizer", ["optimizer=custom optimizer._target_=a.B lr.peak="]),
    ("experiment=foo", "experiment", ["digits_large"]),
    ("optimizer=../optimizer/sgd", "optimizer", ["sgd"]),
    ("task=custom", "task._target_", []),
    ("optimizer=custom", "optimizer._target_", []),
    # the grammar
    ("seed", "", ["'seed'", "key=value"]),
    ("'run.name=a b(c'", "run.name", ["\"run.name='a b(c'\""]),
    ("=3", "=3", []),
    ("'a b=3'", "", ["a b=3"]),
    ("seed=1,2", "", ["seed=1,2", "-m"]),
    ("seed=range(1,4)", "", ["-m"]),
    ("'task.name=${foo}'", "task.name", ["foo"]),
    ("'task.name=${oc.env:ISOBATCH_NOT_SET}'", "task.name", ["ISOBATCH_NOT_SET"]),
    # sections together
    ("lr.rule=power", "lr.power", ["lr.rule=power"]),
    ("lr.power=2", "lr.power", ["power", "half-life", "noise"]),
    ("lr.decay=step lr.milestones=[]", "lr.milestones", ["lr.decay=step"]),
    ("model.args.x=3", "model.args", ["model._target_"]),
    ("optimizer.momentum=0", "optimizer.momentum", ["optimizer.nesterov"]),
    ("optimizer.args.lr=1", "optimizer.args.lr", ["lr.base", "lr.peak"]),
    ("optimizer.args.momentum=0.5", "optimizer.args.momentum", ["use optimizer.momentum"]),
    ("optimizer.args.nesterov=false", "optimizer.args.nesterov", ["use optimizer.nesterov"]),
    ("optimizer.args.weight_decay=1", "optimizer.args.weight_decay", ["use optimizer.weight_decay"]),
    ("optimizer=adamw optimizer.args.betas=[0.5,0.5]", "optimizer.args.betas", ["use optimizer.betas"]),
    ("optimizer=adamw optimizer.args.eps=1", "optimizer.args.eps", ["use optimizer.eps"]),
    (f"{CUSTOM} optimizer.args.lr=1", "optimizer.args.lr", ["lr.base", "lr.peak"]),
    (
        f"{CUSTOM} optimizer.weight_decay=0 optimizer.args.weight_decay=1",
        "optimizer.args.weight_decay",
        ["use optimizer.weight_decay"],
    ),
    ("optimizer=adamw optimizer.betas=[0.9]", "optimizer.betas", ["[0.9]", "list of 2"]),
    ("optimizer=adamw optimizer.betas=[]", "optimizer.betas", ["[]", "list of 2"]),
    ("optimizer=lamb optimizer.trust_clip=[0]", "optimizer.trust_clip", ["[0]", "list of 2"]),
    ("optimizer=adafactor optimizer.eps=[1e-3]", "optimizer.eps", ["[0.001]", "list of 2"]),
    ("recompute=[true]", "recompute.0", ["'true'"]),
    ("cluster.rendezvous=a:29500", "cluster.rendezvous", ["a:29500", "cluster.nodes"]),
    ("output=json", "output", ["action=plan"]),
    ("action=evaluate", "init_from", ["action=evaluate"]),
    ("action=evaluate init_from=", "init_from", []),
    ("action=evaluate init_from=3", "init_from", ["\"init_from='3'\""]),
    ("action=evaluate init_from=no/where", "init_from", ["init_from=no/where", ".safetensors"]),
    ("action=evaluate run.dir=conf", "run.dir", ["init_from=conf"]),
    ("action=evaluate run.new=true", "run.new", ["init_from=DIR"]),
    ("action=evaluate run.dir=conf init_from=conf", "run.dir", ["leave it out"]),
    ("cluster.environment.A-B=x", "cluster.environment.A-B", ["environment variable"]),
    ("'task.args={1: a}'", "task.args", ["'1'"]),
    ("seed=x batch.per_gpu=0", "seed", ["seed=x", "batch.per_gpu=0"]),
]


@pytest.mark.parametrize(("line", "key", "names"), REJECTED, ids=[line for line, _, _ in REJECTED])
def test_rejection_names_its_key(line: str, key: str, names: list[str]) -> None:
    with pytest.raises(UserError) as rejection:
        compose(shlex.split(line))
    assert rejection.value.key == key
    assert all(name in str(rejection.value) for name in names), str(rejection.value)
    assert len(str(rejection.value)) < 500
    assert not re.search(r"pydantic|hydra\.cc|ConfigKeyError|constrained|Traceback", str(rejection.value))


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(
    "given", ["lr.final=0.2", "lr.exponent=3", "lr.milestones=[10%,20%]", "lr.gamma=0.5", "lr.cooldown=30%"]
)
def test_keys_of_another_decay_are_named(given: str, decay: str) -> None:
    """They change only the identity."""
    plain, changed = [f"lr.decay={decay}"], [f"lr.decay={decay}", given]
    before, after = (resolve(configured(overrides), 1).schedule for overrides in (plain, changed))
    without_effect = [before.lr(sample, 1.0) for sample in range(0, before.samples, 100)] == [
        after.lr(sample, 1.0) for sample in range(0, after.samples, 100)
    ]
    texts = unused_keys(changed, compose(changed))
    assert [text.partition(" ")[0] for text in texts] == [given.partition("=")[0]] * without_effect
    assert all(f"lr.decay is {decay}" in text for text in texts)


def test_keys_of_stop_when_are_unused_without_it() -> None:
    given = ["stop.patience=2", "stop.min_delta=0.1"]
    assert [text.split()[0] for text in unused_keys(given, compose(given))] == ["stop.patience", "stop.min_delta"]
    given.append("stop.when=val/loss:min")
    assert unused_keys(given, compose(given)) == []


def test_runs_at_a_time_are_unused_without_a_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["search.parallel=2"]
    assert [text.split()[0] for text in unused_keys(given, compose(given))] == ["search.parallel"]
    monkeypatch.setenv(hardware.IN_SWEEP, "1")  # as a sweep does
    assert unused_keys(given, compose(given)) == []


def test_a_stored_config_has_no_unused_keys(tmp_path: Path) -> None:
    """Its run has that identity already; a new run from it has another one."""
    stored(tmp_path, "lr.gamma=0.5")
    resumed = [f"run.dir='{tmp_path}'"]
    frozen = [f"run.config='{tmp_path}/config.yaml'", *resumed]
    weights = ["action=evaluate", f"init_from='{tmp_path}'"]
    for overrides in (resumed, frozen, weights):
        assert unused_keys(overrides, compose(overrides)) == []
    assert len(unused_keys([*resumed, "run.new=true"], compose([*resumed, "run.new=true"]))) == 1


def test_keys_of_another_choice_are_reported_once(tmp_path: Path) -> None:
    write(tmp_path / "experiment/other.yaml", "# @package _global_\noptimizer: {name: adamw}\n")
    for overrides in (["optimizer.name=adamw"], ["experiment=other"]):
        assert len(message(*overrides, config_dir=tmp_path).splitlines()) == 1


VALUES: dict[str, list[tuple[Any, str]]] = {  # invalid values, each with a word that its error names
    "batch.global_size": [
        *((0, "all"), (-3, "all"), (2.5, "whole"), (1000.0, "did you mean 1000?"), ("al", "did you mean all?")),
        *((True, "whole"), (None, "null"), ([3], "[3]"), ({"a": 3}, '{"a": 3}')),
    ],
    "batch.per_gpu": [(0, "from 1"), (0.5, "whole"), (float("nan"), "finite"), (10**16, "1e+15")],
    "batch.accumulation": [(0, "from 1"), (-1, "from 1")],
    "batch.unit": [("token", "did you mean tokens?")],
    "batch.even": [(1, "true or false"), ("yes", "true or false")],
    "action": [("pln", "did you mean plan?"), ("tuen", "train, plan, evaluate, tune, runs, report or requeue")],
    "output": [("jsn", "did you mean json?")],
    "device": [("gpu", "auto, cpu or cuda")],
    "seed": [(-1, "from 0"), (2**63, "less than"), ("x", "whole"), (True, "whole")],
    "duration": [(10, "unit"), ("10xx", "'xx'"), ("-1ep", "-1ep"), ("ep", "10ep"), (True, "10ep"), (None, "10ep")],
    "clip_norm": [(0, "above 0"), (-1, "above 0"), (float("inf"), "finite"), ("a", "a number")],
    "lr.base": [(0, "above 0"), (float("inf"), "finite"), (float("nan"), "finite")],
    "lr.base_batch": [(0, "from 1")],
    "lr.rule": [("sqr", "did you mean sqrt?"), ("foo", ", ".join(LAWS)[:-6])],
    "lr.decay": [("cos", ", ".join(DECAYS)[:-5])],
    "lr.final": [(-0.1, "from 0"), (1.1, "to 1")],
    "lr.milestones": [("30%", "a list"), ([4], "lr.milestones.0")],
    "lr.warmup_from": [(-1, "from 0")],
    "log.every": [("0st", "more than 0"), (None, "10ep")],
    "evaluate.every": [("0ep", "more than 0"), ("5min", "checkpoint.every")],
    "checkpoint.every": [("0min", "more than 0"), ("10", "unit")],
    "checkpoint.keep": [(0, "from 1")],
    "checkpoint.best": [("val/accuracy", "val/accuracy:max"), ("val/accuracy:most", "val/accuracy:max")],
    "checkpoint.on_error": [("stopp", "did you mean stop?")],
    "on_nonfinite": [("skp", "did you mean skip?")],
    "ema": [(0.999, "half-life"), ("0sa", "more than 0"), ("5min", "minutes")],
    "init_from": [("", "empty")],
    "data.workers": [(-1, "from 0")],
    "run.dir": [("", "empty"), (3, "\"run.dir='3'\"")],
    "run.name": [("../x", "name"), ("a b", "name"), ("x" * 101, "name"), (".", "name")],
    "task.name": [("a/b", "name"), ("a\nb", "name")],
    "task._target_": [("foo", "my_package.Name"), ("os.", "my_package.Name"), (None, "my_package.Name")],
    "task.train_samples": [(0, "from 1")],
    "task.family": [("image", "did you mean images?"), ("vision", ", ".join(FAMILIES)[:-10])],
    "task.units_per_sample": [(0, "from 1")],
    "task.tuned": [
        ({"sgd": {"lr": 0, "batch": 1}}, "task.tuned.sgd.lr=0"),
        ({"sgd": {"lr": 1}}, "task.tuned.sgd.batch"),
    ],
    "task.args": [
        *(({"x": float("nan")}, "task.args.x=nan"), ({"x": b"a"}, "task.args.x"), ({"x": "\udce9"}, "Unicode")),
        (3, "a mapping"),
    ],
    "optimizer.name": [("foo", "sgd, adamw, lamb")],
    "optimizer.family": [("lamb", "sgd or adam")],
    "optimizer.momentum": [(1, "less than 1"), (-0.1, "from 0")],
    "optimizer.weight_decay": [(-1, "from 0")],
    "numerics": [("exact", "fast or bitwise")],
    "engine.name": [("fsdb", "did you mean fsdp?")],
    "engine": [
        ({"name": "ddp", "config": {}, "stage": 1}, "engine=deepspeed"),
        ({"name": "ddp"}, "engine=ddp"),
        ({"name": "deepspeed"}, "config, stage, offload"),
    ],
    "engine.config": [(3, "a mapping")],
    "cluster.nodes": [(0, "from 1"), (1.5, "whole")],
    "cluster.gpus_per_node": [(0, "auto"), ("aut", "did you mean auto?")],
    "cluster.rendezvous": [
        *(("foo", "host:port"), ("foo:bar", "host:port")),
        *(("a:0", "65535"), ("a:99999", "65535"), ("a:65536", "65535")),
    ],
    "cluster.max_restarts": [(-1, "from 0")],
    "cluster.timeout_s": [(0, "above 0")],
    "cluster.environment": [({"X": True}, "\"cluster.environment.X='true'\""), ({"X": 0.5}, "text")],
}


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [(key, value, named) for key, cases in VALUES.items() for value, named in cases],
    ids=lambda value: str(value)[:40],
)
def test_invalid_values_are_rejected(plain: dict[str, Any], key: str, value: Any, named: str) -> None:
    *parents, last = key.split(".")
    changed: Any = {name: dict(inner) if isinstance(inner, dict) else inner for name, inner in plain.items()}
    section = changed
    for name in parents:
        section = section[name]
    section[last] = value
    with pytest.raises(UserError) as refusal:
        validated(changed)
    assert named in str(refusal.value)
    assert f"{refusal.value.key}.".startswith(f"{key}.")
    assert not re.search(r"pydantic|constrained|literal\[", str(refusal.value))


def test_arguments_that_repeat_no_key_are_accepted() -> None:
    args = ["optimizer.args.weight_decay=1", "optimizer.args.momentum=0.5", "optimizer.args.eps=1"]
    assert set(compose([*CUSTOM.split(), *args]).optimizer.args) == {"weight_decay", "momentum", "eps"}
    compose(["cluster.nodes=2", "cluster.rendezvous=a:65535"])


# ---- sweeps


def test_sweeps_expand_by_hydras_grammar() -> None:
    elements = expand(
        ["batch.global_size=64,256", "seed=range(1,4)", "lr.base=0.1", "optimizer=glob(adam*)", "task.name='a,b'"]
    )
    assert len(elements) == 2 * 3 * 1
    assert elements[0].swept == ("batch.global_size=64", "seed=1", "optimizer=adamw")
    assert elements[0].overrides == (*elements[0].swept[:2], "lr.base=0.1", elements[0].swept[2], "task.name='a,b'")
    assert elements[-1].column == {"batch.global_size": "256", "seed": "3", "optimizer": "adamw"}
    assert [e.swept[0] for e in expand(["lr.milestones=[30%,60%],[50%]"])] == [
        "lr.milestones=[30%,60%]",
        "lr.milestones=[50%]",
    ]
    assert [e.swept for e in expand(["seed=1,1,2"])] == [("seed=1",), ("seed=2",)]
    assert [e.swept for e in expand(["experiment=null,digits_large"])] == [
        ("experiment=null",),
        ("experiment=digits_large",),
    ]
    for element in expand(["experiment=null,digits_large", "task.name='a b',c"]):
        compose(element.overrides[:1])


@pytest.mark.parametrize("override", ["lr.base=interval(0,1)", "seed=range(3,1)", "optimizer=glob(x*)", "seed=1,(2"])
def test_sweeps_of_nothing_are_refused(override: str) -> None:
    with pytest.raises(UserError, match=re.escape(override)):
        expand([override])


# ---- resuming a run directory


def stored(directory: Path, *overrides: str) -> RunConfig:
    config = compose(overrides)
    write(directory / "config.yaml", dump(config))
    write(directory / "plan.json", "{}")
    return config


def test_a_run_directory_supplies_its_config(tmp_path: Path) -> None:
    was = stored(
        tmp_path, "optimizer=adamw", "optimizer.eps=1e-6", "batch.per_gpu=16", "log.every=7st", "lr.warmup=10.0%"
    )
    now = compose([f"run.dir='{tmp_path}'", "batch.per_gpu=8", "action=plan"])
    assert now.optimizer == was.optimizer
    assert now.log == was.log
    assert (now.batch.per_gpu, now.action) == (8, "plan")
    assert set(now.given) == {*was.given, "batch.global_size", "run.dir", "action"}


def test_hardware_is_not_taken_from_a_run_directory(tmp_path: Path) -> None:
    stored(
        tmp_path,
        "cluster.gpus_per_node=8",
        "cluster.nodes=2",
        "device=cuda",
        "debug=true",
        "batch.per_gpu=4",
        "batch.accumulation=1",
    )
    now = compose([f"run.dir='{tmp_path}'", "cluster.gpus_per_node=2"])
    assert (now.cluster.gpus_per_node, now.cluster.nodes, now.device, now.debug) == (2, 1, "auto", False)
    assert "cluster.nodes" not in now.given


def test_the_global_batch_of_a_run_directory_is_kept(tmp_path: Path) -> None:
    stored(tmp_path, "batch.global_size=64", "batch.per_gpu=4", "batch.accumulation=16")
    now = compose([f"run.dir='{tmp_path}'", "cluster.gpus_per_node=2"])
    assert (now.batch.global_size, now.batch.per_gpu, now.batch.accumulation) == (64, 4, None)
    was = stored(tmp_path, "seed=3")
    now = compose([f"run.dir='{tmp_path}'", "batch.per_gpu=2", "batch.accumulation=128"])
    assert (now.batch.global_size, now.batch.accumulation) == (was.batch.global_size, 128)
    assert "batch.global_size" in now.given


def test_a_free_mapping_of_a_run_directory_replaces_the_default(tmp_path: Path) -> None:
    was = stored(tmp_path, "~task.args.dropout", "task.args.extra=1", "~task.tuned.adamw")
    assert compose([f"run.dir='{tmp_path}'"]).task == was.task


def test_a_custom_choice_of_a_run_directory_needs_no_target_again(tmp_path: Path) -> None:
    was = stored(
        tmp_path, "task=custom", "task._target_=my.Task", "optimizer=custom", "optimizer._target_=my.Optimizer"
    )
    now = compose([f"run.dir='{tmp_path}'", "log.every=3st"])
    assert (now.task, now.optimizer) == (was.task, was.optimizer)


def test_science_that_differs_from_the_run_directory_is_refused(tmp_path: Path) -> None:
    stored(tmp_path, "batch.global_size=64")
    text = message(f"run.dir='{tmp_path}'", "batch.global_size=128", "lr.base=0.1", "evaluate.every=2ep")
    assert "batch.global_size=128 (the run has 64)" in text
    assert "lr.base=0.1 (the run has none)" in text
    assert "evaluate" not in text
    assert "optimizer.name=adamw (the run has sgd)" in message(f"run.dir='{tmp_path}'", "optimizer=adamw")
    compose([f"run.dir='{tmp_path}'", "batch.global_size=64", "optimizer=sgd", "task=digits"])


@pytest.mark.parametrize(
    ("was", "now", "named"),
    [
        ([], ["task.args.extra=null"], "task.args.extra=null (the run has none)"),
        (["task.args.depth=null"], ["~task.args.depth"], "~task.args.depth (the run has null)"),
        (["task.args.extra=3"], ["task.args.extra=null"], "task.args.extra=null (the run has 3)"),
        (["task.args.extra={a:1}"], ["task.args.extra={a:1,b:null}"], "task.args.extra.b=null (the run has none)"),
        (["task.args.extra=1"], ["task.args.extra=true"], "task.args.extra=true (the run has 1)"),
        (["optimizer.nesterov=true"], ["optimizer.nesterov=false"], "optimizer.nesterov=false (the run has true)"),
    ],
)
def test_values_that_are_off_differ_from_none(tmp_path: Path, was: list[str], now: list[str], named: str) -> None:
    stored(tmp_path, *was)
    assert f"can't resume with {named}; leave" in message(f"run.dir='{tmp_path}'", *now)


def test_a_run_directory_resumes_with_another_engine(tmp_path: Path) -> None:
    was = stored(tmp_path, "engine=fsdp", "engine.shard=[blocks.*]", "engine.config.reshard_after_forward=false")
    named = f"run.dir='{tmp_path}'"
    assert compose([named]).engine == was.engine
    assert compose([named, "engine.shard=auto"]).engine == was.engine.model_copy(update={"shard": "auto"})
    assert (
        compose([named, "engine=deepspeed", "engine.stage=3"]).engine
        == compose(["engine=deepspeed", "engine.stage=3"]).engine
    )
    text = message(named, "engine=ddp", "numerics=bitwise", "batch.per_gpu=8")
    assert "can't resume with batch.per_gpu=8 (the run has none), numerics=bitwise (the run has fast); leave" in text


def test_the_config_of_a_run_that_never_trained_may_be_corrected(tmp_path: Path) -> None:
    """A whole command replaces its config. Its folder, alone or with keys outside the identity, keeps it."""
    was = stored(tmp_path, "task=custom", "task._target_=my.Tsk", "clip_norm=1", "duration=2ep")
    (tmp_path / "plan.json").unlink()
    named = f"run.dir='{tmp_path}'"
    for housekeeping in ([], ["log.every=3st", "device=cpu", "engine=ddp"]):
        now = compose([named, *housekeeping])
        assert (now.task, now.clip_norm) == (was.task, 1)
    now = compose([named, "task=custom", "task._target_=my.Task", "duration=3ep"])
    assert (now.task.target, now.clip_norm) == ("my.Task", None)
    assert not extends(tmp_path, now)


def test_a_longer_duration_extends_the_run_in_a_directory(tmp_path: Path) -> None:
    stored(tmp_path, "duration=20ep", "batch.global_size=64")
    named = f"run.dir='{tmp_path}'"
    assert compose([named, "duration=30ep"]).duration == Duration(30, "ep")
    assert compose([named, "duration=20.0ep"]).duration == Duration(20, "ep")
    for other in ("10ep", "50000st", "1e9sa"):
        text = message(named, f"duration={other}")
        assert text.startswith(
            f"run.dir={tmp_path} has duration=20ep, which a longer one in the same unit extends (as "
        )
        assert "duration=40ep" in text
        assert f"duration={Duration.parse(other)} doesn't" in text
    text = message(named, "duration=30ep", "seed=3")
    assert "seed=3 (the run has 0)" in text
    assert "duration=" not in text
    assert "duration=10ep (the run has 20ep)" in message(named, "duration=10ep", "seed=3")
    assert compose([named, "duration=10ep", "run.new=true"]).duration == Duration(10, "ep")


# ---- evaluating a run's weights


@pytest.mark.parametrize("of_run", ["", "final", "final/model.safetensors", "checkpoints/step-00000300"])
def test_an_evaluation_takes_the_config_of_the_run_of_its_weights(tmp_path: Path, of_run: str) -> None:
    run = tmp_path / "run"
    was = stored(run, "optimizer=adamw", "task.args.width=7", "ema=5%", "init_from=elsewhere", "cluster.nodes=2")
    write(run / "final/model.safetensors", "")
    (run / "checkpoints/step-00000300").mkdir(parents=True)
    weights = str(run / of_run)
    now = compose(["action=evaluate", f"init_from='{weights}'", "task.args.split=test", "seed=3", "output=json"])
    assert now.task.args == {**was.task.args, "split": "test"}
    assert (now.optimizer, now.ema, now.init_from, now.seed) == (was.optimizer, was.ema, weights, 3)
    assert (now.action, now.output, now.cluster.nodes, now.run.dir) == ("evaluate", "json", 1, None)


def test_tuning_takes_the_config_of_a_run_unless_the_command_says_what_to_train(tmp_path: Path) -> None:
    """Results belong to the run of the weights only where the recipe is its own."""
    run = tmp_path / "run"
    recipe = ("task=digits", "optimizer=adamw", "task.args.width=7")
    stored(run, *recipe, "init_from=elsewhere")
    write(run / "final/model.safetensors", "")
    tune = ("action=tune", f"init_from='{run}'")
    for same in ((), recipe, ("noise.every=3st",)):
        config = compose([*tune, *same])
        assert (config.optimizer.name, config.task.args["width"]) == ("adamw", 7)
        assert tuning_directory(config) == run / "tune"
    for other in (("task=digits",), ("task=mnist1d", "optimizer=adamw"), ("seed=3",), (*recipe, "lr.peak=0.1")):
        config = compose([*tune, *other])
        assert config.optimizer.name == ("sgd" if other == ("task=digits",) else "adamw")
        assert tuning_directory(config) == Path("runs") / f"{config.task.name}-{identity(config)}" / "tune"
    assert tuning_directory(compose([*tune, "task=mnist1d", "run.dir=mine"])) == Path("mine/tune")


def test_an_evaluation_follows_links_to_a_run(tmp_path: Path) -> None:
    stored(tmp_path / "run", "seed=7")
    best = tmp_path / "run/checkpoints/best"
    (best.parent / "step-00000300").mkdir(parents=True)
    best.symlink_to("step-00000300")
    (tmp_path / "mine").symlink_to(best)
    for weights in (best, tmp_path / "mine"):
        assert compose(["action=evaluate", f"init_from='{weights}'"]).seed == 7


def test_weights_without_a_run_are_evaluated_with_the_commands_config(tmp_path: Path) -> None:
    file = write(tmp_path / "checkpoint/model.safetensors", "")
    write(tmp_path / "checkpoint/config.yaml", "model: theirs\n")
    now = compose(["action=evaluate", f"init_from='{file}'", "task.args.width=7"])
    assert (now.task.args["width"], now.init_from) == (7, str(file))


def test_an_evaluation_of_a_damaged_run_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "config.yaml", "format: 1\ngiven: [")
    assert "can't be read" in message("action=evaluate", f"init_from='{tmp_path}'")


def test_run_new_starts_a_run_with_the_config_of_a_run_directory(tmp_path: Path) -> None:
    was = stored(tmp_path, "optimizer=adamw", "optimizer.eps=1e-6", "batch.global_size=63", "cluster.gpus_per_node=3")
    new = [f"run.dir='{tmp_path}'", "run.new=true"]
    same = compose(new)
    assert (same.task, same.optimizer, same.batch, same.lr) == (was.task, was.optimizer, was.batch, was.lr)
    assert same.cluster.gpus_per_node == "auto"
    other = compose([*new, "seed=3", "optimizer=sgd", "lr.base=0.3", "batch.global_size=7"])
    assert (other.seed, other.optimizer.name, other.lr.base, other.batch.global_size) == (3, "sgd", 0.3, 7)


def test_sizes_given_with_run_new_replace_those_of_the_run_directory(tmp_path: Path) -> None:
    new = [f"run.dir='{tmp_path}'", "run.new=true"]
    product = ["batch.per_gpu=4", "batch.accumulation=16"]
    stored(tmp_path, "batch.global_size=64")
    assert "batch.global_size" not in compose([*new, *product]).given
    stored(tmp_path, *product)
    assert "batch.global_size" not in compose(new).given
    resized = compose([*new, "batch.global_size=32"])
    assert (resized.batch.global_size, resized.batch.per_gpu, resized.batch.accumulation) == (32, 4, None)


def test_a_config_older_than_a_key_gets_its_default(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    stored(tmp_path, "optimizer=adamw", "batch.global_size=64")
    old = yaml.safe_load(file.read_text())
    del old["batch"]["even"], old["clip_norm"], old["optimizer"]["eps"]
    file.write_text(yaml.safe_dump(old))
    now = compose([f"run.dir='{tmp_path}'"])
    assert (now.batch.even, now.clip_norm, now.batch.global_size) == (False, None, 64)
    assert now.optimizer == compose(["optimizer=adamw"]).optimizer
    assert "clip_norm=1.0 (the run has none)" in message(f"run.dir='{tmp_path}'", "clip_norm=1")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is damaged"),
        (b"\x00\x01\xff", "can't be read"),
        (b"{", "can't be read"),
        (b"- a\n", "is damaged"),
        (b"format: 2\ngiven: []\n", "has format 2"),
        (b"format: 1\ngiven: []\nbatch: {global_size: 0}\n", "batch.global_size=0"),
        (b"format: 1\ngiven: []\nfoo: 3\n", "unknown key foo"),
        (b"format: 1\ngiven: []\nbatch: 3\n", "batch=3"),
    ],
)
def test_a_damaged_config_is_refused_by_name(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    text = message(f"run.dir='{tmp_path}'")
    assert expected in text
    assert str(tmp_path / "config.yaml") in text


# ---- printed texts


def test_printed_config_reads_back_as_the_config() -> None:
    config = compose(["optimizer=adamw", "task.args.text='a: b # c'", "lr.warmup=1e3sa", "run.name=x"])
    text = annotated(config)
    assert yaml.safe_load(text) == config.model_dump(mode="json", by_alias=True, exclude=set(RECORDED))
    assert "warmup: 1000sa  # duration of the linear warmup to the peak" in text


def test_help_names_every_key_and_choice(tmp_path: Path) -> None:
    write(tmp_path / "task/mine.yaml", "# my very own\nname: mine\n")
    text = help_text([], str(tmp_path))
    for key in set(keys()) - sections_of_schema() - {*RECORDED, "optimizer.usual.lr", "optimizer.usual.batch"}:
        assert f"  {key}" in text
    for file in HERE.glob("*/*.yaml"):
        assert f"{file.parent.name}={file.stem}" in text
    assert re.search(r"task=mine +my very own", text)
    assert max(map(len, text.splitlines())) <= 140


def test_keys_are_explained_by_the_chosen_files(tmp_path: Path) -> None:
    """A user's task is explained by its YAML and the YAML in its defaults, not by another task's."""
    write(tmp_path / "task/mine.yaml", "defaults: [custom, _self_]\n_target_: a.B\nargs:\n  data: x  # my own\n")

    def line(key: str, *overrides: str) -> str:
        text = annotated(configured(overrides, tmp_path), overrides, str(tmp_path))
        return next(line for line in text.splitlines() if line.startswith(f"{key}:"))

    def helped(key: str, *overrides: str) -> str:
        text = help_text(overrides, str(tmp_path))
        return re.sub(r"\s+", " ", text.partition(f"\n  {key}=")[2])[:60]

    assert "an .npz file with images" in line("    data", "task=images")
    assert "a text file of any size" in line("    data", "experiment=text_large")
    assert "the best of a grid" in line("  tuned", "task=images")
    assert "samples per epoch" in line("  train_samples", "task=images")
    assert line("    sgd", "task=digits") == "    sgd:"
    assert line("    data", "task=mine") == "    data: x  # my own"
    assert "usual batches" in line("  family", "task=mine")
    assert "root of the mean square" in line("  eps", "optimizer=auto", "task=text")
    assert helped("task.args.data", "task=images").startswith("null an .npz file")
    assert helped("task.args.data", "experiment=text_large").startswith("null a text file of any size")
    assert helped("task.args.data", "task=mine").startswith("x my own")
    assert helped("task.train_samples", "task=mine").startswith("null samples per epoch")
    assert helped("task.args", "task=nosuch").startswith("{width: 128,")
    assert "task.defaults" not in help_text(["task=mine"], str(tmp_path))


@pytest.mark.parametrize("arguments", [["--confg-dir", "."], ["--cfg", "all"], ["--config-dir", "/nowhere"], ["--n=3"]])
def test_unknown_options_are_rejected(arguments: list[str]) -> None:
    with pytest.raises(UserError):
        command_line(arguments)


def test_a_number_is_no_target() -> None:
    assert "_target_" not in message("task=0.5")


def test_an_empty_value_before_another_override() -> None:
    assert command_line(["task.args.note=", "~task.args.width"]).overrides == ["task.args.note=", "~task.args.width"]
    with pytest.raises(UserError, match=r"task.args.note=width"):
        command_line(["task.args.note=", "width"])


def test_options_may_stand_anywhere() -> None:
    args = command_line(["seed=1", "-m", "lr.base=0.1,0.2", "--config-dir", ".", "~task.args.width"])
    assert args.overrides == ["seed=1", "lr.base=0.1,0.2", "~task.args.width"]
    assert (args.multirun, args.config_dir) == (True, ".")


# ---- hardware


@pytest.mark.parametrize(
    ("devices", "hidden", "gpus"),
    [
        ([], None, 0),
        ([], "0,1", 0),
        ([], "GPU-8932f937", 0),
        (["nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"], None, 2),
        (["nvidia0", "nvidia1"], "1", 1),
        (["nvidia0", "nvidia1"], "", 0),
        (["nvidia0", "nvidia1"], "-1", 0),
        (["nvidia0", "nvidia1"], "0,-1,1", 1),
        (["nvidia0", "nvidia1"], "1,7,0", 1),
        (["nvidia0", "nvidia1"], "0, 1", 2),
        (["nvidia0", "nvidia1"], "GPU-8932f937,MIG-5c", 2),
    ],
)
def test_visible_gpus_are_counted(tmp_path: Path, devices: list[str], hidden: str | None, gpus: int) -> None:
    for name in devices:
        write(tmp_path / "dev" / name, "")
    env = {} if hidden is None else {"CUDA_VISIBLE_DEVICES": hidden}
    assert hardware.visible_gpus(env, tmp_path) == gpus


def test_gpus_that_only_the_driver_lists_are_counted(tmp_path: Path) -> None:
    (tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0").mkdir(parents=True)
    assert hardware.visible_gpus({}, tmp_path) == 1


def test_world_size_follows_from_config_and_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert hardware.world_size(compose(["cluster.nodes=16", "cluster.gpus_per_node=8"])) == 128
    assert hardware.world_size(compose(["device=cpu"])) == 1
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    assert hardware.world_size(compose([])) == 6
    assert hardware.world_size(compose(["cluster.nodes=2", "cluster.gpus_per_node=3"])) == 6
    with pytest.raises(UserError, match=r"gpus_per_node=8 contradicts torchrun's LOCAL_WORLD_SIZE=3"):
        hardware.world_size(compose(["cluster.gpus_per_node=8"]))
    with pytest.raises(UserError, match=r"nodes=1 contradicts torchrun's WORLD_SIZE=6 with LOCAL_WORLD_SIZE=3"):
        hardware.world_size(compose(["cluster.nodes=1"]))
    monkeypatch.setenv("GROUP_WORLD_SIZE", "3")  # 3 + 2 + 1
    assert hardware.world_size(compose(["cluster.nodes=3"])) == 6
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        monkeypatch.setenv(name, "x")
        with pytest.raises(UserError, match=f"{name}=x"):
            hardware.world_size(compose([]))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["cluster.nodes=2"], "needs cluster.rendezvous=host:port"),
        (["debug=true", "cluster.gpus_per_node=2"], "cluster.gpus_per_node=2"),
        (["device=cuda", "cluster.environment.CUDA_VISIBLE_DEVICES=''"], "no GPU is visible"),
    ],
)
def test_commands_that_cannot_start_here_are_refused(overrides: list[str], expected: str) -> None:
    with pytest.raises(UserError, match=re.escape(expected)):
        hardware.refuse_unless_startable(compose(overrides))


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "visible_gpus", lambda env: 2)
    hardware.refuse_unless_startable(compose(["cluster.gpus_per_node=2"]))
    hardware.refuse_unless_startable(compose(["cluster.gpus_per_node=4", "device=cpu"]))
    with pytest.raises(UserError, match="4 processes here need a GPU each, and 2 are visible"):
        hardware.refuse_unless_startable(compose(["cluster.gpus_per_node=4"]))
    hardware.refuse_unless_startable(compose(["cluster.gpus_per_node=4", "cluster.backend=gloo"]))  # can share them
    torchrun = {"TORCHELASTIC_RUN_ID": "none", "RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "3"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="3 processes here"):
        hardware.refuse_unless_startable(compose([]))
    with pytest.raises(UserError, match="contradicts torchrun"):
        hardware.refuse_unless_startable(compose(["debug=true"]))


@pytest.mark.parametrize("by", ["environment", "key"])
def test_runs_of_a_sweep_share_the_gpus(monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    """Eight GPUs and three runs at a time: two GPUs each."""
    eight = "0,1,2,3,4,5,6,7"

    def count(env: Any) -> int:
        return len(env.get("CUDA_VISIBLE_DEVICES", eight).split(","))

    monkeypatch.setattr(hardware, "visible_gpus", count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    config = compose(["search.parallel=3"])
    assert hardware.workers_here(config) == 8  # alone
    monkeypatch.setenv(hardware.IN_SWEEP, "1")
    assert hardware.workers_here(config) == 2
    with pytest.raises(UserError) as error:
        hardware.refuse_unless_startable(compose(["search.parallel=3", "cluster.gpus_per_node=3"]))
    assert error.value.key == "search.parallel"
    monkeypatch.setenv(hardware.GPUS, "")  # restored by monkeypatch
    monkeypatch.delenv(hardware.GPUS)
    if by == "environment":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,6,5,4,3,2,1,0")
    else:
        config = compose(["search.parallel=3", "cluster.environment.CUDA_VISIBLE_DEVICES='7,6,5,4,3,2,1,0'"])
    hardware.enter_slot(config, 2)
    assert hardware.environment(config)["CUDA_VISIBLE_DEVICES"] == "3,2"
    assert hardware.workers_here(config) == 2
    hardware.refuse_unless_startable(config)  # the GPUs of its slot are all its own


def test_an_array_has_its_own_limit() -> None:
    with pytest.raises(UserError) as error:
        compose(["search.parallel=2", "cluster=slurm"])
    assert error.value.key == "search.parallel"
    assert "cluster.max_parallel=2" in error.value.fix
