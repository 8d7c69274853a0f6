"""Test what is suggested for the keys and values of other launchers: every suggestion is a command that composes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from isobatch.conf.elsewhere import KEYS, VALUES, our_key
from isobatch.conf.help import command_line
from isobatch.conf.keys import keys
from isobatch.scaling.errors import UserError
from isobatch.scaling.planning.automatic import configured
from isobatch.scaling.planning.resolve import resolve

GIVEN = (None, True, 5, 500.0, 0.5, 0, -1, "x", "auto", "SGD", "5ep", "50%", "10min", "a b", "out/dir", "5")


def alternatives(suggestion: str) -> list[list[str]]:
    """Return the overrides of each alternative: ``a=1 or b=2`` are two, ``a=1 b=2`` and ``a=1, with b=2`` one."""
    found = [re.findall(r"(?:^|(?<=\s))[a-z_.]+=[^\s,)]+", way) for way in re.split(r"\bor ", suggestion)]
    return [[word for text in way for word in shlex.split(text)] for way in found if way]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Go to a folder in which the placeholder of a directory is one."""
    (tmp_path / "DIR").mkdir()
    monkeypatch.chdir(tmp_path)


def composes(suggestion: str) -> None:
    """Check that the keys in a suggestion exist, and that its overrides compose."""
    named = re.findall(r"\b[a-z_]+(?:\.\w+)+", re.sub(r"=\S+", "=", suggestion))
    assert {re.sub(r"\.args\..*", ".args", key) for key in named} <= set(keys())
    found = alternatives(suggestion)
    assert bool(found) == ("=" in suggestion)
    assert found or named or not suggestion or suggestion.startswith("-m")
    for overrides in found:
        config = configured(overrides)
        assert config.duration.value > 0
        assert config.duration.unit != "%"


@pytest.mark.parametrize("key", KEYS)
def test_suggestions_for_keys_compose(key: str) -> None:
    for suggestion in {our_key(key, value) for value in GIVEN}:
        composes(suggestion)
    assert our_key(key, False) == our_key(key, "false") == ""


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in VALUES.items() for value in values])
def test_suggestions_for_values_compose(key: str, value: str) -> None:
    composes(VALUES[key][value])


def test_an_optimizer_of_torch_has_a_learning_rate() -> None:
    for suggestion in VALUES["optimizer"].values():
        for overrides in alternatives(suggestion):
            resolve(configured(overrides), 1)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("epochs", 0.5, "duration=0.5ep"),
        ("max_steps", 500.0, "duration=500st"),
        ("max_steps", -1, "duration=5000st"),
        ("max_steps", 0.5, "duration=5000st"),
        ("warmup", 0.1, "lr.warmup=10%"),
        ("warmup", "5%", "lr.warmup=5%"),
        ("warmup_ratio", 0.03, "lr.warmup=3%"),
        ("save_steps", 0.1, "checkpoint.every=10%"),
        ("val_check_interval", 0.25, "evaluate.every=0.25ep"),
        ("log", 5, "log.every=5st"),
        ("noise", "5ep", "noise.every=5ep"),
        ("evaluate", 2, "evaluate.every=2ep"),
        ("checkpoint", 5, "checkpoint.every=5min"),
        ("strategy", "auto", "engine=ddp"),
        ("strategy", "fsdp", "engine=fsdp"),
        ("optim", "SGD", "optimizer=sgd"),
        ("num_workers", 0, "data.workers=0"),
        ("output_dir", "out/mine", "run.dir=out/mine"),
        ("run_name", "a/b", "run.name=NAME"),
        ("mixed_precision", "no", "precision=fp32"),
    ],
)
def test_a_value_is_taken_over_where_it_fits(key: str, value: Any, expected: str) -> None:
    assert our_key(key, value) == expected


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("task.lr=0.1", "did you mean lr.peak=0.1 or lr.base=0.1?"),
        ("val_every=1", "did you mean evaluate.every=1ep?"),
        ("mixed_precision=bf16", "did you mean precision=bf16?"),
        ("mixed_precision=fp16", "did you mean precision=fp16?"),
        ("amp=bf16", "did you mean precision=bf16?"),
        ("amp=true", "did you mean precision=bf16 or precision=fp16?"),
        ("logger=tensorboard", "did you mean log.to=tensorboard?"),
        ("dropout=0.1", "did you mean task.args.dropout=0.1?"),
        ("world_size=2", "did you mean cluster.gpus_per_node=2?"),
        ("nproc=2", "did you mean cluster.gpus_per_node=2?"),
        ("nproc_per_node=2", "did you mean cluster.gpus_per_node=2?"),
        ("local_rank=3", "did you mean cluster.gpus_per_node=8,"),
        ("checkpoint_dir=out", "did you mean run.dir=out?"),
        ("dataloader_workers=4", "did you mean data.workers=4?"),
        ("betas=[0.9,0.98]", "did you mean optimizer.betas=[0.9,0.98]?"),
        ("betas=[0.9]", "did you mean optimizer.betas?"),
        ("tune=true", "did you mean -m lr.peak="),
        ("engine=zero1", "did you mean engine=deepspeed engine.stage=1?"),
        ("engine=zero2", "did you mean engine=deepspeed engine.stage=2?"),
        ("engine=zero3", "did you mean engine=deepspeed engine.stage=3?"),
        ("device=cuda:1", "did you mean device=cuda (CUDA_VISIBLE_DEVICES"),
        ("ema=true", "half-life"),
    ],
)
def test_hints_have_our_key_and_the_given_value(override: str, hint: str) -> None:
    with pytest.raises(UserError) as error:
        configured([override])
    assert hint in error.value.fix
    assert "True" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("--optimizer adam", ["optimizer=adamw", "torch.optim.Adam"]),
        ("--engine fsdp", ["engine=fsdp"]),
        ("--task custom", ["task=custom"]),
        ("--logger wandb", ["log.to=wandb"]),
        ("--lr 0.1 --epochs 5", ["lr.peak=0.1"]),
        ("--epochs 5 --lr 0.1", ["duration=5ep"]),
        ("--epochs seed=3", ["duration=10ep"]),
        ("--epochs --lr 3", ["duration=10ep"]),
        ("--fp16 --epochs 5", ["precision=fp16"]),
        ("--seed=3", ["seed=3"]),
    ],
)
def test_options_of_other_launchers(line: str, named: list[str]) -> None:
    with pytest.raises(UserError) as error:
        command_line(line.split())
    assert all(name in error.value.fix for name in named), error.value.fix


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("trainer.max_epochs=5", ["duration=5ep"]),
        ("evaluate.steps=500", ["evaluate.every=500st"]),
        ("evaluate.epochs=2", ["evaluate.every=2ep"]),
        ("checkpoint.steps=500", ["checkpoint.every=500st"]),
        ("log.interval=50", ["log.every=50st"]),
        ("noise.steps=5", ["noise.every=5st"]),
        ("cluster.num_nodes=2", ["cluster.nodes=2"]),
        ("checkpoint.monitor=val_loss", ["checkpoint.best"]),
        ("lr.epochs=3", ["lr.base", "lr.warmup"]),
        ("task.epochs=3", ["task.args.epochs=3"]),
        ("task.classes=3", ["task.args.classes=3"]),
        ("trainer.logger=x", ["log.to=wandb", "log.to=tensorboard"]),
        ("early_stopping.patience=5", ["stop.when", "stop.patience=5"]),
    ],
)
def test_dotted_keys_of_other_launchers(override: str, named: list[str]) -> None:
    """If their section has a counterpart here, the suggestion is one of its keys."""
    with pytest.raises(UserError) as error:
        configured([override])
    assert error.value.key == override.partition("=")[0]
    assert all(name in error.value.fix for name in named), error.value.fix
