"""Test models and data that a config names, from libraries that don't know this project."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from isobatch.scaling.errors import UserError
from isobatch.trainers.model.targets import build
from tests.support.harness import ROUNDING, Runs, distance

GPT2 = transformers.GPT2LMHeadModel  # imported once, before ranks are forked

HERE = "tests.ranks.test_foreign"
CONFIG = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 8, "vocab_size": 50, "attn_pdrop": 0}
TOKENS = {"bos_token_id": 0, "eos_token_id": 0}
TASK = (
    "task=custom", f"task._target_={HERE}.Language", "batch.global_size=12", "duration=3st", "lr.peak=0.1",
    "lr.warmup=0", "evaluate.every=null",
)  # fmt: skip
MODEL = (
    "model._target_=transformers.GPT2LMHeadModel", "model.args.config._target_=transformers.GPT2Config",
    *(f"model.args.config.{key}={value}" for key, value in (CONFIG | TOKENS).items()),
)  # fmt: skip
DATA = (f"data._target_={HERE}.Rows", "data.args.rows=100")
LANGUAGE = (*TASK, *MODEL, *DATA, "data.val_args.rows=11")


class Language:
    """A task with only a loss, since the config names model and data."""

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        tokens = batch["input_ids"]
        output = model(tokens[:, :-1])
        logits = getattr(output, "logits", output)
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"), tokens[:, 1:].numel()


class Rows:
    """A dataset like Hugging Face's: rows are dicts, fetched many at once."""

    def __init__(self, rows: int) -> None:
        self.tokens = torch.randint(50, (rows, 9), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, key: int | list[int]) -> dict[str, Any]:
        return {"input_ids": self.tokens[key], "length": 9}

    def __getitems__(self, keys: list[int]) -> list[dict[str, Any]]:
        return [self[key] for key in keys]


def test_gpt2_is_the_same_on_all_cuts(runs: Runs) -> None:
    """It has dropout on embeddings and residuals. Its tied weights are saved once, and can be loaded."""
    one, two = runs(1, *LANGUAGE), runs(2, *LANGUAGE, "batch.per_gpu=4")
    assert one.ends[0]["state"] == "finished", one.log()
    assert not [event for event in one.events() if event["event"] == "depends_on_cut"]
    assert distance(one.weights(), two.weights()) < ROUNDING
    assert "val/loss" in one.metrics()[-1]
    fresh = GPT2(transformers.GPT2Config(**CONFIG, **TOKENS))
    from safetensors.torch import load_model

    load_model(fresh, one.run.final / "model.safetensors")
    assert fresh.lm_head.weight is fresh.transformer.wte.weight
    assert torch.equal(fresh.lm_head.weight, next(w for n, w in one.weights().items() if n.endswith("wte.weight")))


def test_gpt2_dropout_is_on_and_recomputed_equally(runs: Runs) -> None:
    off = ("model.args.config.resid_pdrop=0", "model.args.config.embd_pdrop=0")
    on = runs(1, *LANGUAGE)
    assert distance(on.weights(), runs(1, *LANGUAGE, "recompute=[transformer.h.*]").weights()) < ROUNDING
    assert distance(on.weights(), runs(1, *LANGUAGE, *off).weights()) > 1e-4


def test_named_data_without_val_args_has_no_validation(runs: Runs) -> None:
    run = runs(1, *TASK, *MODEL, *DATA)
    assert run.ends[0]["state"] == "finished"
    assert not any("val/loss" in line for line in run.metrics())


def test_missing_model_and_data_have_to_be_named(runs: Runs) -> None:
    end = runs(1, *TASK).ends[0]
    assert end["message"] == f"task._target_={HERE}.Language lacks model() -> nn.Module, train_data() -> Dataset"


def test_arguments_with_a_target_are_made_first() -> None:
    """They may be inside lists and inside each other, and a class's method may be a target."""
    third = {"_target_": "fractions.Fraction", "numerator": 1, "denominator": 3}
    made = build("model", "builtins.dict", {"plain": {"a": 1}, "listed": [third, 2], "half": half(third)})
    assert made == {"plain": {"a": 1}, "listed": [Fraction(1, 3), 2], "half": Fraction(1, 6)}
    assert build("model", "fractions.Fraction.from_float", {"f": 0.5}) == Fraction(1, 2)


def half(third: dict[str, Any]) -> dict[str, Any]:
    return {"_target_": "fractions.Fraction", "numerator": third, "denominator": 2}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"config": {"_target_": "transformers.GPT2Confg"}}, "args.config._target_=.* mean transformers.GPT2Config?"),
        ({"config": {"_target_": 3}}, "model.args.config._target_=3 isn't a dotted path"),
        ({"config": {"_target_": "builtins.dict.fromkey"}}, "builtins.dict has no fromkey; did you mean"),
        ({"confg": {"_target_": "transformers.GPT2Config"}}, "model.args=.* don't fit transformers.GPT2LMHeadModel"),
    ],
)
def test_invalid_targets_are_named(args: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build("model", "transformers.GPT2LMHeadModel", args)
