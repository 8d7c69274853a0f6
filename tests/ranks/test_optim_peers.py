"""Test that LAMB and LARS of timm, torch_optimizer and pytorch_optimizer are options of ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from isobatch.trainers.optim.lamb import LAMB
from isobatch.trainers.optim.lars import LARS
from tests.support.papers import PATHS, ZERO_WEIGHTS, after_steps, close
from tests.support.peers import import_alone, installed


@pytest.mark.skipif(not installed(), reason="timm, torch_optimizer and pytorch_optimizer aren't all installed")
@pytest.mark.parametrize("native", PATHS)
def test_lambs_of_other_packages_are_options_of_ours(native: bool) -> None:
    """timm clips nothing here, and pytorch_optimizer has the decay in the step."""
    timm, ranger, kozistr = (
        import_alone(f"{package}.lamb").Lamb
        for package in ("timm.optim", "torch_optimizer", "pytorch_optimizer.optimizer")
    )
    phi: Any = {"norm_clip": (0.0, 10.0)}
    pairs: list[tuple[type[torch.optim.Optimizer], dict[str, Any], dict[str, Any]]] = [
        (timm, {"max_grad_norm": None}, {}),
        (timm, {"max_grad_norm": None, "trust_clip": True, "bias_correction": False},
         {"trust_clip": (0.0, 1.0), "bias_correction": False}),
        (ranger, {"debias": True}, {"bias_correction": "after", **phi}),
        (ranger, {}, {"bias_correction": False, **phi}),
        (kozistr, {"weight_decouple": False, "adam_debias": True}, {"bias_correction": False, **phi}),
    ]  # fmt: skip
    for peer, peer_options, options in pairs:
        shared: dict[str, Any] = {"lr": 0.1, "eps": 1e-6, "weight_decay": 0.1}
        a = after_steps(peer, **shared, **peer_options)
        b = after_steps(LAMB, **shared, **options, native=native)
        assert all(close(x, y.double(), 2e-6) for x, y in zip(a, b, strict=True)), (peer, peer_options)


@pytest.mark.skipif(not installed(), reason="timm, torch_optimizer and pytorch_optimizer aren't all installed")
@pytest.mark.parametrize("native", PATHS)
@pytest.mark.parametrize("nesterov", [False, True])
def test_lars_of_other_packages_are_options_of_ours(native: bool, nesterov: bool) -> None:
    timm, ranger = import_alone("timm.optim.lars").Lars, import_alone("torch_optimizer.lars").LARS
    for peer, peer_options, options in (
        (timm, {"trust_coeff": 0.01}, {}),
        (timm, {"trust_coeff": 0.5, "trust_clip": True}, {"trust_coefficient": 0.5, "trust_clip": True}),
        (ranger, {"trust_coefficient": 0.01}, {}),
    ):
        shared: dict[str, Any] = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.1, "nesterov": nesterov, "eps": 1e-8}
        all_options: dict[str, Any] = {"trust_coefficient": 0.01, "scaled_momentum": False, "native": native, **options}
        a = after_steps(peer, falling=True, **shared, **peer_options)
        b = after_steps(LARS, falling=True, **shared, **all_options)
        whole = range(ZERO_WEIGHTS)  # torch_optimizer omits the decay where a norm is 0
        assert all(close(a[k], b[k].double()) for k in whole), (peer, peer_options)
