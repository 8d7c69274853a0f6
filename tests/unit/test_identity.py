"""Test that a run's identity is a hash of exactly its science, and that its folder follows from it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from isobatch.conf.compose import compose
from isobatch.conf.existing import extends, lengthened, run_of
from isobatch.conf.identity import first_free, identity, run_directory, science
from isobatch.conf.keys import HERE, choices_of, keys, sections
from isobatch.conf.messages import validated
from isobatch.conf.saved import dump
from isobatch.conf.schema import RunConfig
from isobatch.conf.sweep import _folder, expand, sweep_directories
from isobatch.scaling.errors import UserError
from tests.support.examples import examples


def optimizer_yaml(choice: str) -> dict[str, Any]:
    """Return the keys of an optimizer, with their defaults."""
    content: dict[str, Any] = yaml.safe_load((HERE / "optimizer" / f"{choice}.yaml").read_text())
    return content


# A value other than the default for every key. A new key has to be added here.
OTHER_SCIENCE: dict[str, Any] = {
    "duration": "21ep",
    "seed": 1,
    "clip_norm": 1.0,
    "init_from": "runs/digits-0123456789ab",
    "ema": "2000sa",
    "batch.global_size": 127,
    "batch.unit": "tokens",
    "batch.even": True,
    "batch.schedule": "0sa:32 10ep:64",
    "lr.scale_weight_decay": True,
    "lr.base": 0.5,
    "lr.base_batch": 8,
    "lr.rule": "sqrt",
    "lr.peak": 0.1,
    "lr.warmup": "6%",
    "lr.warmup_from": 0.01,
    "lr.decay": "linear",
    "lr.final": 0.1,
    "lr.exponent": 3.0,
    "lr.milestones": ["10%"],
    "lr.gamma": 0.5,
    "lr.cooldown": "10%",
    "model._target_": "my.Model",
    "data._target_": "my.Data",
    "precision": "bf16",
    "numerics": "bitwise",
    "batchnorm.mode": "sync",
    "task.name": "other",
    "task._target_": "my.Task",
    "task.args": {"width": 64},
    "task.train_samples": 7,
    "task.units_per_sample": 7,
    "task.family": "speech",
    "task.tuned": {},
    "optimizer.family": "adam",
    "optimizer.momentum": 0.8,
    "optimizer.nesterov": False,
    "optimizer.weight_decay": 0.5,
    "optimizer.usual": {"lr": 0.5, "batch": 8},
    "optimizer.args": {"maximize": True},
}
OTHER_HOUSEKEEPING: dict[str, Any] = {
    "action": "plan",
    "device": "cpu",
    "debug": True,
    "batch.per_gpu": 4,
    "batch.accumulation": 4,
    "compile": True,
    "recompute": ["blocks.*"],
    "noise.every": "1st",
    "noise.parts": 2,
    "task.local": {"folder": "/data/x"},
    "data.workers": 2,
    "check.contract": False,
    "data.fingerprint": False,
    "evaluate.every": "3ep",
    "evaluate.first": True,
    "evaluate.last": False,
    "evaluate.per_gpu": 4,
    "evaluate.samples": 100,
    "checkpoint.every": "5min",
    "checkpoint.keep": 1,
    "checkpoint.keep_every": "10%",
    "checkpoint.best": "val/accuracy:max",
    "checkpoint.on_error": "stop",
    "on_nonfinite": "skip",
    "log.every": "3st",
    "log.to": ["wandb"],
    "log._target_": "my.Tracker",
    "log.peak_tflops": 100.0,
    "stop.when": "val/loss:min",
    "stop.patience": 5,
    "stop.min_delta": 0.5,
    "stop.at": "val/loss<1",
    "stop.after": "9min",
    "search.parallel": 2,
    "run.dir": "elsewhere",
    "run.config": "some.yaml",
    "run.name": "other",
    "run.new": True,
    "plan.open_data": True,
    "plan.memory": True,
    "tune.parts": ["lr"],
    "tune.margin": 0.1,
    "tune.max_step_ms": 100.0,
    "tune.samples": "5%",
    "report.dir": "elsewhere",
    "report.metric": "val/accuracy",
    "report.target": "val/accuracy>=0.9",
    "report.where": "state=finished",
    "report.sort": "val/accuracy",
    "report.points": "8:100 16:110 64:150",
    "chosen": {"optimizer": "because"},
    "engine.config": {"bucket_cap_mb": 1},
    "cluster.nodes": 2,
    "cluster.gpus_per_node": 2,
    "cluster.backend": "gloo",
    "cluster.memory_gb": 4.0,
    "cluster.gpu_memory_gb": 80.0,
    "cluster.max_restarts": 1,
    "cluster.timeout_s": 5.0,
    "cluster.environment": {"A": "b"},
    "given": ["lr.base"],
}
SLURM_KEYS = {
    "partition": "gpu", "account": "a", "qos": "q", "time_min": 90, "signal_s": 60, "mem_gb": 64, "cpus_per_gpu": 8,
    "gres": "none", "constraint": "a100", "exclude": "n1", "nodelist": "n2", "reservation": "r", "comment": "c",
    "dependency": "afterok:1", "mail": "me@example.org", "setup": "['module load a']", "extra": "['--exclusive']",
    "max_requeues": 1, "max_parallel": 2, "dry_run": "true",
}  # fmt: skip
NEED_ANOTHER_KEY = {
    "model.args", "data.args", "data.val_args", "data.local", "lr.power", "lr.noise_scale", "batchnorm.ghost_size",
    "output", "cluster.rendezvous", "log.args",
}  # fmt: skip
CONTROL_SCIENCE: dict[str, Any] = {  # of each controller that has the key, another value than its default
    "least": 16, "most": 512, "quantum": 16, "every": "1%", "patience": 3, "lr": "hold", "eta": 0.5, "factor": 2.0,
    "alpha": 0.5, "half_speed": 256.0, "per": "second", "prior": "runs/digits-0123456789ab",
}  # fmt: skip
OPTIMIZERS = [name for name in choices_of("optimizer") if name not in ("auto", "custom")]
OPTIMIZER_KEYS = {f"optimizer.{name}" for choice in OPTIMIZERS for name in optimizer_yaml(choice)}
TESTED_ELSEWHERE = {
    *(f"cluster.{name}" for name in SLURM_KEYS),
    *NEED_ANOTHER_KEY,
    *OPTIMIZER_KEYS,
    *(f"control.{name}" for name in CONTROL_SCIENCE),
    "control.name",
    *("engine.shard", "engine.param_dtype", "engine.reduce_dtype", "engine.offload", "engine.stage"),
    *("optimizer._target_", "engine.name", "cluster.name", "optimizer.usual.lr", "optimizer.usual.batch"),
}


def changed(config: RunConfig, key: str, value: Any) -> RunConfig:
    plain = config.model_dump(mode="json", by_alias=True)
    section, _, last = key.rpartition(".")
    (plain[section] if section else plain)[last] = value
    return validated(plain)


def test_every_key_is_tested() -> None:
    tested = OTHER_SCIENCE.keys() | OTHER_HOUSEKEEPING.keys() | TESTED_ELSEWHERE
    assert set(keys()) - sections() - tested == set()


@pytest.fixture(scope="module")
def default() -> RunConfig:
    return compose([])


@pytest.mark.parametrize("choice", choices_of("control"))
def test_the_controller_and_its_keys_are_science(default: RunConfig, choice: str) -> None:
    chosen = compose([f"control={choice}"])
    assert (identity(chosen) == identity(default)) == (choice == "none")
    own = type(chosen.control).model_fields.keys() - {"name"}
    others = [changed(chosen, f"control.{name}", CONTROL_SCIENCE[name]) for name in own]
    assert len({identity(config) for config in (chosen, *others)}) == 1 + len(own)


def test_a_run_on_slurm_is_the_same_run(default: RunConfig) -> None:
    on_slurm = compose(["cluster=slurm", *(f"cluster.{name}={value}" for name, value in SLURM_KEYS.items())])
    assert all(
        getattr(on_slurm.cluster, name) != getattr(compose(["cluster=slurm"]).cluster, name) for name in SLURM_KEYS
    )
    assert identity(on_slurm) == identity(default)


@pytest.mark.parametrize("key", OTHER_SCIENCE)
def test_science_changes_the_identity(default: RunConfig, key: str) -> None:
    assert identity(changed(default, key, OTHER_SCIENCE[key])) != identity(default)


@pytest.mark.parametrize("choice", OPTIMIZERS)
def test_every_key_of_an_optimizer_is_science(choice: str) -> None:
    config = compose([f"optimizer={choice}"])
    other = {
        bool: lambda value: not value,
        float: lambda value: (value or 1) * (0.5 if value < 1 else 2),
        list: lambda values: [*values[:-1], values[-1] / 2],
    }
    for name, value in optimizer_yaml(choice).items():
        if type(value) in other:
            assert identity(changed(config, f"optimizer.{name}", other[type(value)](value))) != identity(config), name


@pytest.mark.parametrize("key", OTHER_HOUSEKEEPING)
def test_housekeeping_does_not_change_the_identity(default: RunConfig, key: str) -> None:
    assert identity(changed(default, key, OTHER_HOUSEKEEPING[key])) == identity(default)


def test_housekeeping_that_needs_another_key_does_not_change_the_identity(default: RunConfig) -> None:
    for overrides in (["action=plan", "output=json"], ["cluster.nodes=2", "cluster.rendezvous=a:1"]):
        assert identity(compose(overrides)) == identity(default)


def test_different_changes_have_different_identities(default: RunConfig) -> None:
    runs = [changed(default, key, value) for key, value in OTHER_SCIENCE.items()]
    runs += [compose(overrides) for overrides in (["optimizer=adamw"], ["lr.rule=power", "lr.power=0.7"])]
    runs += [compose(["model._target_=my.Model", "model.args.x=1"]), compose(["model._target_=my.Model"])]
    assert len({identity(run) for run in runs}) == len(runs) - 1  # only model._target_ occurs twice


STORED = """
format: 1
duration: 20ep
seed: 0
batch: {global_size: 256, per_gpu: null, accumulation: null, unit: samples, even: false}
lr:
  base: null
  base_batch: null
  rule: auto
  power: null
  peak: null
  warmup: 5%
  warmup_from: null
  decay: cosine
  final: 0.0
  exponent: 2.0
  milestones: [30%, 60%, 90%]
  gamma: 0.1
  cooldown: 20%
clip_norm: null
model: {_target_: null, args: {}}
task:
  {name: custom, _target_: my.Task, args: {a: 1}, train_samples: 50, units_per_sample: null, family: null, tuned: {}}
optimizer:
  {name: sgd, family: sgd, momentum: 0.9, nesterov: true, weight_decay: 0.0, usual: {lr: 0.1, batch: 256}, args: {}}
given: [task]
"""


def test_a_stored_config_keeps_its_identity(tmp_path: Path) -> None:
    """New keys and defaults must not change it, since runs wouldn't find their directories."""
    (tmp_path / "config.yaml").write_text(STORED)
    assert identity(compose([f"run.dir='{tmp_path}'"])) == "8e651bcbf0c3"


def test_keys_that_are_off_are_not_hashed(default: RunConfig) -> None:
    hashed = science(default)
    assert {key for key, value in hashed.items() if value is None or value is False or value in ("", [], {})} == set()
    assert hashed["seed"] == 0
    assert hashed["lr.final"] == 0.0


def test_spelling_is_not_science() -> None:
    spelled = compose(
        ["duration=20.0EP", "lr.base=1", "seed=0", "lr.milestones=[30.0%,60 %,9e1%]", "task.args={depth: 2}"]
    )
    assert identity(spelled) == identity(compose(["lr.base=1.0"]))


def test_values_of_free_mappings_are_science_even_if_they_are_off() -> None:
    runs = [["task.args.x=null"], ["task.args.x=false"], ["task.args.x=0"], ["task.args.x=''"], ["task.args.x={}"], []]
    assert len({identity(compose(overrides)) for overrides in runs}) == len(runs)


def test_the_cut_is_science_only_if_it_defines_the_global_batch() -> None:
    cut = ["batch.per_gpu=16", "batch.accumulation=4"]
    usual = compose([]).batch.global_size
    assert identity(compose([f"batch.global_size={usual}", *cut])) == identity(compose([]))
    assert identity(compose(cut[:1])) == identity(compose(cut[1:])) == identity(compose([]))
    product, other = compose(cut), compose(["batch.per_gpu=4", "batch.accumulation=16"])
    assert len({identity(product), identity(other), identity(compose([]))}) == 3
    assert not {"batch.global_size"} & science(product).keys()


def test_no_engine_is_science() -> None:
    engines = [
        ["engine=fsdp", "engine.shard=[blocks.*]", "engine.param_dtype=bf16", "engine.offload=true"],
        ["engine=deepspeed", "engine.stage=3", "engine.offload=true", "engine.config.zero_optimization.stage=3"],
        ["engine=accelerate", "engine.config.project_dir=logs"],
    ]
    assert {identity(compose(engine)) for engine in engines} == {identity(compose([]))}


def test_the_per_gpu_batch_is_science_if_numerics_are_bitwise() -> None:
    runs = [["numerics=bitwise", f"batch.per_gpu={size}", "batch.global_size=64"] for size in (8, 16)]
    assert len({identity(compose(run)) for run in [*runs, []]}) == 3
    assert identity(compose([*runs[0], "batch.accumulation=8"])) == identity(compose(runs[0]))
    assert identity(compose(["numerics=fast", "batch.per_gpu=8"])) == identity(compose([]))


def test_a_config_read_from_its_run_directory_keeps_its_identity(tmp_path: Path) -> None:
    for overrides in ([], ["batch.per_gpu=16", "batch.accumulation=4"], ["experiment=digits_large", "lr.base=1e-7"]):
        config = compose(overrides)
        (tmp_path / "config.yaml").write_text(dump(config))
        assert identity(compose([f"run.dir='{tmp_path}'"])) == identity(config)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@examples(60)
@given(args=st.dictionaries(st.text(max_size=8), JSON, max_size=4))
def test_any_arguments_of_a_task_are_stored_and_hashed(default: RunConfig, args: dict[str, Any]) -> None:
    try:
        config = changed(default, "task.args", args)
    except UserError:  # "???", and text that isn't Unicode
        return
    stored = yaml.safe_load(dump(config))
    assert stored.pop("format") == 1
    assert validated(stored) == config
    assert identity(validated(stored)) == identity(config)


# ---- directories of runs


def test_run_directory_follows_from_name_and_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    config = compose([])
    assert run_directory(config) == Path(f"runs/digits-{identity(config)}")
    assert run_directory(compose(["run.name=mine"])) == Path(f"runs/mine-{identity(config)}")
    assert run_directory(compose(["run.dir=a/b", "run.name=mine"])) == Path("a/b")
    assert run_directory(compose(["run.dir='~/a'"])) == Path("/home/someone/a")
    again = compose(["run.dir=a", "run.new=true"])
    assert run_directory(again) == Path("a")
    for expected in ("a-2", "a-3"):
        run_directory(again).mkdir()
        assert run_directory(again) == Path(expected)


def test_first_free_skips_files_too(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    (tmp_path / "x-2").symlink_to("nowhere")
    assert first_free(tmp_path / "x") == tmp_path / "x-3"


def test_a_directory_of_another_run_is_refused(tmp_path: Path) -> None:
    config = compose([])
    assert not extends(tmp_path, config)
    for content in ("", "[]", "{}"):
        (tmp_path / "plan.json").write_text(content)
        with pytest.raises(UserError, match=re.escape(f"{tmp_path}/plan.json")) as error:
            extends(tmp_path, config)
        assert (error.value.key, error.value.value) == ("run.dir", str(tmp_path))
    (tmp_path / "plan.json").write_text(f'{{"identity": "{identity(config)}"}}')
    assert not extends(tmp_path, config)
    (tmp_path / "plan.json").write_text('{"identity": "abc"}')
    with pytest.raises(UserError, match=rf"\babc\b.*\b{identity(config)}\b") as error:
        extends(tmp_path, config)
    assert (error.value.key, error.value.value) == ("run.dir", str(tmp_path))


def holding(directory: Path, *overrides: str) -> Path:
    """Create a run directory with a config and a plan."""
    config = compose(overrides)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(dump(config))
    (directory / "plan.json").write_text(json.dumps({"identity": identity(config)}))
    return directory


def test_a_run_is_extended_only_by_its_directory(tmp_path: Path) -> None:
    run = holding(tmp_path / "run", "duration=40ep")
    longer = compose([f"run.dir='{run}'", "duration=50ep"])
    assert extends(run, longer)
    assert not extends(run, compose([f"run.dir='{run}'"]))
    assert not extends(run, compose(["duration=40ep"]))
    for duration, way in (("20ep", ""), ("50ep", " duration=50ep")):
        with pytest.raises(UserError) as refusal:
            extends(run, compose([f"duration={duration}"]))
        assert refusal.value.key == "duration"
        assert "duration=40ep" in refusal.value.problem
        assert duration in refusal.value.problem
        assert f"run.dir={run}{way}" in refusal.value.fix
    with pytest.raises(UserError, match=re.escape(str(run))) as refusal:
        extends(run, compose(["duration=20ep", "seed=3"]))
    assert refusal.value.key == "run.dir"
    beside = compose([f"run.dir='{run}'", "duration=50ep", "run.new=true"])
    assert not extends(run_directory(beside), beside)


def test_an_interrupted_extension_resumes(tmp_path: Path) -> None:
    """If a start is killed between writing the two files, the config counts."""
    run = holding(tmp_path / "run", "duration=20ep")
    (run / "config.yaml").write_text(dump(compose(["duration=40ep"])))
    for overrides in ([f"run.dir='{run}'"], [f"run.dir='{run}'", "duration=40ep"]):
        assert compose(overrides).duration.value == 40
        assert not extends(run, compose(overrides))


def test_a_checkpoint_is_extended_only_by_the_same_run() -> None:
    short, config = compose(["duration=20ep"]), compose(["duration=40ep"])
    assert lengthened(config, identity(short), "20ep")
    assert not lengthened(config, identity(config), "40ep")
    assert not lengthened(short, identity(config), "40ep")
    assert not lengthened(config, identity(short), "30ep")
    assert not lengthened(config, identity(short), "20")
    assert not lengthened(compose(["duration=40ep", "seed=3"]), identity(short), "20ep")


def test_the_run_of_weights_follows_from_their_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = holding(tmp_path / "run")
    for folder in ("final", "checkpoints/step-00000300", "other"):
        (run / folder).mkdir(parents=True)
        (run / folder / "model.safetensors").touch()
    for weights in ("", "final", "final/model.safetensors", "checkpoints/step-00000300"):
        assert run_of(run / weights) == run
    for weights in ("other", "other/model.safetensors", "checkpoints", "plan.json"):
        assert run_of(run / weights) is None
    monkeypatch.chdir(run / "final")
    assert run_of(Path("model.safetensors")) == run


@pytest.mark.parametrize("where", ["file", "file/below", "/proc/version/x"])
def test_a_path_that_is_no_folder_is_refused(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=re.escape(str(where if where.startswith("/") else tmp_path / "file"))) as error:
        extends(tmp_path / where, compose([]))
    assert (error.value.key, error.value.value) == ("run.dir", str(tmp_path / where))
    assert not extends(tmp_path / "new" / "and" / ("x" * 50), compose([]))


# ---- directories of a sweep's runs


def places(*overrides: str) -> list[Path]:
    elements = expand(overrides)
    return sweep_directories([compose(e.overrides) for e in elements], [e.swept for e in elements])


def test_runs_of_a_sweep_live_side_by_side() -> None:
    few, more = places("batch.global_size=64,256"), places("batch.global_size=64,256,1024")
    assert [place.name for place in more] == [f"batch.global_size={size}" for size in (64, 256, 1024)]
    assert few == more[:2]
    assert few[0].parent.parent == Path("runs")
    assert few[0].parent.name.startswith("digits-sweep-")


def test_sweeps_are_distinguished_by_what_their_runs_share() -> None:
    base = places("seed=1,2")[0].parent
    assert places("seed=1,2", "log.every=3st", "cluster.gpus_per_node=2")[0].parent == base
    assert places("seed=1,2", "lr.base=0.3")[0].parent != base
    assert places("optimizer=sgd,adamw")[0].parent == places("optimizer=adamw,sgd")[0].parent
    assert places("seed=1,2", "run.name=mine")[0].parent.name.startswith("mine-sweep-")
    assert places("seed=1,2", "run.dir=there") == [Path("there/seed=1"), Path("there/seed=2")]


def test_a_run_of_a_sweep_keeps_its_directory_however_the_overrides_are_written(tmp_path: Path) -> None:
    where = f"run.dir='{tmp_path}'"
    first = places(where, "seed=1,2", "lr.base=0.1,0.2")
    assert set(places(where, "+lr.base=0.1,0.2", "seed=1,2")) == set(first)
    assert first[0].name == "lr.base=0.1,seed=1"
    old = tmp_path / "seed=1,lr.base=0.3"  # as earlier versions named it
    old.mkdir()
    assert places(where, "seed=1,2", "lr.base=0.3,0.4")[0] == old
    (old / "plan.json").write_text(json.dumps({"identity": identity(compose(["seed=1", "lr.base=0.3"]))}))
    assert places(where, "lr.base=0.3,0.4", "seed=1")[0] == old
    assert places(where, "lr.base=0.3,0.4", "seed=1,2", "lr.warmup=5%,10%")[0] == old  # 5 % is usual


def test_runs_of_a_sweep_that_differ_in_hardware_only_have_directories_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "plan.json").write_text(json.dumps({"identity": identity(compose(["seed=1"]))}))
    assert len(set(places(f"run.dir='{tmp_path}'", "seed=1", "log.every=1st,2st"))) == 2


def test_a_sweep_of_one_value_each_is_refused() -> None:
    with pytest.raises(UserError, match="seed=1,2"):
        places("batch.global_size=64")


@pytest.mark.parametrize(
    "override",
    [
        "action=train,plan",
        "debug=true,false",
        "run.dir=a,b",
        "run.name=a,b",
        "run.new=true,false",
        "run={dir: a},{dir: b}",
    ],
)
def test_keys_of_the_whole_sweep_cannot_be_swept(override: str) -> None:
    key = "run.dir" if override.startswith("run=") else override.partition("=")[0]
    with pytest.raises(UserError) as error:
        places(override)
    assert error.value.key == key


@pytest.mark.parametrize("action", ["evaluate", "runs", "requeue"])
def test_a_sweep_trains_or_plans(tmp_path: Path, action: str) -> None:
    runs = [holding(tmp_path / name) for name in "ab"]
    with pytest.raises(UserError) as error:
        places(f"action={action}", f"init_from={runs[0]},{runs[1]}")
    assert (error.value.key, error.value.value) == ("action", action)


def test_a_sweep_in_a_run_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump(compose([])))
    with pytest.raises(UserError) as error:
        places(f"run.dir='{tmp_path}'", "log.every=1st,2st")
    assert (error.value.key, error.value.value) == ("run.dir", str(tmp_path))
    beside = places(f"run.dir='{tmp_path}'", "run.new=true", "seed=1,2")
    assert beside[0] == tmp_path.with_name(f"{tmp_path.name}-2") / "seed=1"


def test_folder_names_of_a_sweep_are_safe() -> None:
    names = [
        place.name for place in places("task._target_=a.B,a.C", "task.args.path='../../x','a b','\"','a\nb'", "seed=1")
    ]
    assert len(set(names)) == 8
    assert names[0].startswith("task._target_=a.B,task.args.path=_.._.._x_-")


@examples(300)
@given(st.text(max_size=300), st.text(max_size=300))
@example("é" * 100, "è" * 100)
def test_any_text_gives_one_safe_folder_name(text: str, other: str) -> None:
    name = _folder(text)
    assert len(name.encode()) < 120
    assert Path("runs", name).parent == Path("runs")
    assert name not in (".", "..")
    assert name.isprintable()
    assert not set(name) & set(" '\"\\/$*;&|<>()[]{}!?#~`\n")
    assert (name == _folder(other)) == (text == other)
