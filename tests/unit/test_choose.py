"""Test ``optimizer=auto``."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from isobatch.conf import hardware
from isobatch.conf.identity import identity
from isobatch.conf.saved import dump
from isobatch.scaling.errors import UserError
from isobatch.scaling.families import FAMILIES, optimizers
from isobatch.scaling.planning.automatic import configured
from isobatch.scaling.planning.choose import LARGE, WHY, choose
from isobatch.scaling.planning.resolve import resolve

ALL = set(WHY)


def test_every_choice_has_its_reason() -> None:
    assert {name for family in (None, *FAMILIES) for large in (0, 1) for name in optimizers(family, bool(large))} == ALL


@pytest.mark.parametrize(
    ("family", "batch", "chosen"),
    [
        ("images", 64, "sgd"), ("images", 1023, "sgd"), ("images", 1024, "lars"), ("images", 32768, "lars"),
        ("language", 512, "adamw"), ("language", 4096, "adamw"), ("finetune", 32, "adamw"), ("finetune", 4096, "lamb"),
        ("rl", 65536, "adamw"), (None, 32, "adamw"), (None, 8192, "lamb"),
    ],
)  # fmt: skip
def test_the_table(family: str | None, batch: int, chosen: str) -> None:
    choice = choose(family, batch, ALL)
    assert choice.name == chosen
    large = batch >= LARGE
    for text in ("warmup", "regularisation", "Nado et al. 2021", "Shallue et al. 2018"):
        assert (text in choice.why) is large
    assert "or optimizer=" in choice.why


def test_only_what_has_a_base_lr_is_chosen() -> None:
    assert choose("images", 4096, {"sgd", "adamw"}).name == "sgd"
    assert choose("images", 64, {"adamw"}).name == "adamw"
    with pytest.raises(ValueError, match="none of lars, lamb, sgd has a base LR"):
        choose("images", 4096, {"adamw"})


def test_the_config_has_the_chosen_optimizer_and_the_plan_says_why() -> None:
    config = configured(["optimizer=auto", "batch.global_size=2048"])
    assert config.optimizer.name == "lars"
    assert config.chosen.keys() == {"optimizer"}
    plan = resolve(config, 1)
    assert plan.optimizer.why.startswith("auto, at 2,048 samples: LARS")
    named = configured(["optimizer=lars", "batch.global_size=2048"])
    assert identity(config) == identity(named)
    assert resolve(named, 1).optimizer.why == "given"


def test_it_goes_by_the_largest_batch_of_the_run() -> None:
    schedule = "batch.schedule='0sa:64 10ep:2048'"
    assert configured(["optimizer=auto", schedule]).optimizer.name == "lars"
    doubling = ["optimizer=auto", "batch.schedule=doubling", "task.train_samples=1281167", "batch.global_size=512"]
    assert configured(doubling).optimizer.name == "lars"
    assert configured(["optimizer=auto", "batch.schedule='ramp from:32 over:20%'", "batch.global_size=2048"]).chosen
    by_ranks = ["optimizer=auto", "batch.per_gpu=64", "batch.accumulation=4", "cluster.gpus_per_node=8"]
    assert configured(by_ranks).optimizer.name == "lars"
    assert configured([*by_ranks[:-1], "cluster.gpus_per_node=2"]).optimizer.name == "sgd"


def test_it_goes_by_the_share_of_the_gpus_that_a_run_of_a_sweep_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "visible_gpus", lambda env: 8)
    by_ranks = ["optimizer=auto", "batch.per_gpu=64", "batch.accumulation=4", "search.parallel=4"]
    assert configured(by_ranks).optimizer.name == "lars"
    monkeypatch.setenv(hardware.IN_SWEEP, "1")
    assert configured(by_ranks).optimizer.name == "sgd"


def test_its_other_keys_can_be_given() -> None:
    config = configured(["optimizer.weight_decay=0.3", "optimizer=auto"])
    assert (config.optimizer.name, config.optimizer.weight_decay) == ("sgd", 0.3)
    with pytest.raises(UserError, match=r"optimizer\.betas.* \(optimizer=auto chose sgd\)"):
        configured(["optimizer=auto", "optimizer.betas=[0.9,0.9]"])


def test_an_experiment_may_ask_for_it(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\ndefaults:\n  - override /optimizer: auto\nbatch:\n  global_size: 4096\n"
    (tmp_path / "experiment/big.yaml").write_text(text)
    assert configured(["experiment=big"], tmp_path).optimizer.name == "lars"
    assert configured(["experiment=big", "batch.global_size=8"], tmp_path).optimizer.name == "sgd"


@pytest.mark.parametrize("key", ["lr.peak", "lr.base"])
def test_a_learning_rate_is_of_a_named_optimizer(key: str) -> None:
    with pytest.raises(UserError, match=f"{key} is for one optimizer"):
        configured(["optimizer=auto", f"{key}=0.1"])


def test_a_run_that_goes_on_keeps_what_was_chosen(tmp_path: Path) -> None:
    began = configured(["optimizer=auto", "batch.global_size=2048"])
    (tmp_path / "config.yaml").write_text(dump(began))
    (tmp_path / "plan.json").write_text("{}")
    again = configured([f"run.dir={tmp_path}"])
    assert (again.optimizer, again.chosen) == (began.optimizer, began.chosen)
    assert configured([f"run.dir={tmp_path}", "optimizer=auto"]).optimizer == began.optimizer
    old = yaml.safe_load(dump(began))
    del old["chosen"]  # as earlier versions wrote it
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    assert configured([f"run.dir={tmp_path}"]).chosen == {}


def test_it_is_chosen_for_a_run_that_is_new_in_its_folder(tmp_path: Path) -> None:
    large = ["optimizer=auto", "batch.global_size=2048"]
    assert configured([*large, f"run.dir={tmp_path / 'new'}"]).optimizer.name == "lars"
    (tmp_path / "config.yaml").write_text(dump(configured(["optimizer=auto"])))
    (tmp_path / "plan.json").write_text("{}")
    assert configured([*large, f"run.dir={tmp_path}", "run.new=true"]).optimizer.name == "lars"


def test_as_large_as_data_that_nobody_has_counted() -> None:
    with pytest.raises(UserError, match=r"task\.train_samples=N"):
        configured(["optimizer=auto", "batch.global_size=all", "task.train_samples=null"])
