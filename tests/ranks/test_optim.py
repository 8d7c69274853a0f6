"""Compare LAMB and LARS, by the C kernel and by torch's operations, with their papers' formulas."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isobatch.scaling.errors import UserError
from isobatch.trainers.optim.lamb import LAMB
from isobatch.trainers.optim.lars import LARS
from isobatch.trainers.optim.layerwise import Layerwise
from tests.support.papers import (
    PATHS,
    SHAPES,
    STEPS,
    after_steps,
    close,
    gradients,
    lamb_by_the_paper,
    lars_by_the_paper,
    weights,
)

LAMBS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"bias_correction": False}, {"correction": False}),
    ({"bias_correction": "after", "trust_clip": (0.01, 10.0)}, {"correction": "after", "trust": (0.01, 10.0)}),
    ({"trust_clip": (0.0, 0.5)}, {"trust": (0.0, 0.5)}),
    ({"trust_clip": (3.0, 4.0)}, {"trust": (3.0, 4.0)}),
    ({"norm_clip": (2.0, 10.0)}, {"phi": (2.0, 10.0)}),
    ({"weight_decay": 0.0}, {"decay": 0.0}),
]
LARSES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"nesterov": True}, {"nesterov": True}),
    ({"scaled_momentum": False}, {"scaled": False}),
    ({"scaled_momentum": False, "nesterov": True, "eps": 0.5}, {"scaled": False, "nesterov": True, "eps": 0.5}),
    ({"trust_clip": True, "trust_coefficient": 1.0}, {"clip": True, "trust": 1.0}),
    ({"momentum": 0.0, "weight_decay": 0.0}, {"momentum": 0.0, "decay": 0.0}),
]


@pytest.mark.parametrize("native", PATHS)
@pytest.mark.parametrize(("options", "terms"), LAMBS)
def test_lamb_follows_the_paper(options: dict[str, Any], terms: dict[str, Any], native: bool) -> None:
    given = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.1, **options}
    found = after_steps(LAMB, **given, native=native)
    for k, (start, end) in enumerate(zip(weights(), found, strict=True)):
        wanted = lamb_by_the_paper(
            start.detach(),
            [gradients(1 + step)[k] for step in range(STEPS)],
            **{"lr": 0.1, "decay": 0.1, "eps": 1e-3, **terms},
        )
        assert close(end, wanted), (k, SHAPES[k])


@pytest.mark.parametrize("native", PATHS)
@pytest.mark.parametrize(("options", "terms"), LARSES)
def test_lars_follows_the_paper(options: dict[str, Any], terms: dict[str, Any], native: bool) -> None:
    given = {"lr": 2.0, "trust_coefficient": 0.01, "weight_decay": 0.1, **options}
    found = after_steps(LARS, falling=True, **given, native=native)
    for k, (start, end) in enumerate(zip(weights(), found, strict=True)):
        wanted = lars_by_the_paper(
            start.detach(), [gradients(1 + step)[k] for step in range(STEPS)], **{"lr": 2.0, "decay": 0.1, **terms}
        )
        assert close(end, wanted), (k, SHAPES[k])


@pytest.mark.parametrize("native", PATHS)
@pytest.mark.parametrize("cls", [LAMB, LARS])
def test_group_without_trust_is_scaled_only_by_always_adapt(cls: type[Layerwise], native: bool) -> None:
    by = lamb_by_the_paper if cls is LAMB else lars_by_the_paper
    terms = {"lr": 0.01, "decay": 0.1} | ({"eps": 1e-6, "betas": (0.9, 0.999)} if cls is LAMB else {"trust": 0.001})
    for options, adapt in (({}, False), ({"always_adapt": True}, True)):
        given = {"lr": 0.01, "weight_decay": 0.1, "native": native, **options}
        found = after_steps(lambda p, given=given: cls([{"params": p, "trust": False}], **given), falling=cls is LARS)
        wanted = by(weights()[0].detach(), [gradients(1 + step)[0] for step in range(STEPS)], **terms, adapt=adapt)
        assert close(found[0], wanted)


@pytest.mark.parametrize("native", PATHS)
@pytest.mark.parametrize("cls", [LAMB, LARS])
def test_maximize_minimises_the_negative(cls: type[Layerwise], native: bool) -> None:
    up, down = weights(), weights()
    ascent, descent = cls(up, maximize=True, native=native), cls(down, native=native)
    for a, b, gradient in zip(up, down, gradients(1), strict=True):
        a.grad, b.grad = gradient, -gradient
    ascent.step()
    descent.step()
    assert all(torch.equal(a, b) for a, b in zip(up, down, strict=True))


@pytest.mark.parametrize("cls", [LAMB, LARS])
def test_float64_stays_float64(cls: type[Layerwise]) -> None:
    found = after_steps(cls, falling=cls is LARS, dtype=torch.float64, lr=0.1, weight_decay=0.1)
    gs = [gradients(1 + step)[0] for step in range(STEPS)]
    terms = {"eps": 1e-6, "betas": (0.9, 0.999)} if cls is LAMB else {"trust": 0.001}
    by = lamb_by_the_paper if cls is LAMB else lars_by_the_paper
    assert close(found[0], by(weights()[0].detach(), gs, lr=0.1, decay=0.1, **terms), within=1e-12)


@pytest.mark.parametrize("native", PATHS)
@pytest.mark.parametrize("cls", [LAMB, LARS])
def test_bf16_parameters_have_fp32_state_also_after_loading(cls: type[Layerwise], native: bool) -> None:
    """The update equals that of float32 weights, rounded once, also bitwise after loading a state_dict."""
    low, high = weights(torch.bfloat16), [nn.Parameter(each.detach().float()) for each in weights(torch.bfloat16)]
    for a, b, gradient in zip(low, high, gradients(1), strict=True):
        a.grad, b.grad = gradient.bfloat16(), gradient.bfloat16().float()
    ours, wide = cls(low, lr=0.1, native=native), cls(high, lr=0.1, native=native)
    ours.step()
    wide.step()
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(low, high, strict=True))
    kept = [state[key] for state in ours.state.values() for key in cls.keeps]
    assert kept
    assert all(tensor.dtype == torch.float32 for tensor in kept)
    copies = [nn.Parameter(each.detach().clone()) for each in low]
    again = cls(copies, lr=0.1, native=native)
    again.load_state_dict(copy.deepcopy(ours.state_dict()))
    for a, b, gradient in zip(low, copies, gradients(2), strict=True):
        a.grad = b.grad = gradient.bfloat16()
    ours.step()
    again.step()
    assert all(torch.equal(a, b) for a, b in zip(low, copies, strict=True))


@pytest.mark.parametrize("native", PATHS)
@pytest.mark.parametrize("cls", [LAMB, LARS])
def test_any_order_in_memory_gives_the_same_update(cls: type[Layerwise], native: bool) -> None:
    """Test channels_last, a gradient with other strides than its parameter, and a parameter with gaps."""
    plain = nn.Parameter(torch.randn(4, 3, 5, 2, generator=torch.Generator().manual_seed(0)))
    last = nn.Parameter(plain.detach().clone(memory_format=torch.channels_last))
    gaps = nn.Parameter(torch.zeros(4, 3, 5, 4)[..., ::2].copy_(plain.detach()))
    assert not gaps.is_contiguous()
    optimizers = [cls([parameter], lr=0.1, native=native) for parameter in (plain, last, gaps)]
    for step in range(3):
        gradient = torch.randn(plain.shape, generator=torch.Generator().manual_seed(step))
        plain.grad = gradient
        last.grad = gradient.clone(memory_format=torch.contiguous_format if step else torch.channels_last)
        gaps.grad = gradient.clone(memory_format=torch.channels_last)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(last, plain, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gaps, plain, rtol=1e-6, atol=1e-7)


def test_invalid_arguments_are_rejected() -> None:
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = LAMB(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(UserError, match=r"LAMB needs dense gradients.*\[10, 4\] is sparse.*sparse=False"):
        optimizer.step()
    parameter = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    parameter.grad = torch.zeros_like(parameter)
    with pytest.raises(UserError, match="LARS takes no complex parameters"):
        LARS([parameter]).step()
    for cls, options in (
        (LAMB, {"lr": -1}), (LAMB, {"betas": (0.9, 1.0)}), (LAMB, {"trust_clip": (2.0, 1.0)}),
        (LAMB, {"bias_correction": "before"}), (LARS, {"trust_coefficient": 0.0}), (LARS, {"momentum": 1.0}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(options))):
            cls([nn.Parameter(torch.zeros(2))], **options)


def test_closure_is_called_with_gradients_enabled() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = LAMB([parameter])

    def closure() -> Tensor:
        loss = (parameter**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert float(parameter.detach().max()) < 1.0
