"""LAMB and LARS against their papers' formulas in float64, by the C kernel and by torch's operations."""

from __future__ import annotations

import copy
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.peers import alone, installed
from tests.ranks.harness import in_ranks
from trainers.optim import kernels
from trainers.optim.lamb import LAMB
from trainers.optim.lars import LARS
from trainers.optim.layerwise import Layerwise
from trainers.rundir import Refused
from trainers.world import World

PATHS = [True, False]  # native or not
SHAPES = [(300, 300), (70, 130), (5,), (2, 3, 4), (), (3, 0), (4, 4), (6, 2)]
ZERO_WEIGHTS, ZERO_GRADIENT = 6, 7
STEPS = 4
EVERYTHING = (0.0, float("inf"))


def weights(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    random = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=random).to(dtype) for shape in SHAPES]
    made[ZERO_WEIGHTS].zero_()
    return [nn.Parameter(each) for each in made]


def gradients(step: int) -> list[Tensor]:
    made = [each.detach() for each in weights(seed=step)]
    made[ZERO_WEIGHTS] += 1
    made[ZERO_GRADIENT].zero_()
    return made


def lamb_by_the_paper(
    w: Tensor, gs: list[Tensor], *, lr: float, decay: float, eps: float, betas: tuple[float, float] = (0.9, 0.99),
    correction: Any = True, trust: tuple[float, float] = EVERYTHING, phi: tuple[float, float] = EVERYTHING,
    adapt: bool = True,
) -> Tensor:  # fmt: skip
    w, m, v = w.double(), 0.0, 0.0
    for t, g in enumerate((g.double() for g in gs), start=1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        c1, c2 = 1 - betas[0] ** t, 1 - betas[1] ** t
        r = (m / c1) / ((v / c2) ** 0.5 + eps) if correction is True else m / (v**0.5 + eps)
        u = r + decay * w
        ratio = 1.0
        if adapt and w.norm() > 0 and u.norm() > 0:
            ratio = min(max(min(max(float(w.norm()), phi[0]), phi[1]) / float(u.norm()), trust[0]), trust[1])
        w = w - lr * ratio * (c2**0.5 / c1 if correction == "after" else 1.0) * u
    return w


def lars_by_the_paper(
    w: Tensor, gs: list[Tensor], *, lr: float, decay: float, eps: float = 0.0, momentum: float = 0.9,
    trust: float = 0.01, nesterov: bool = False, scaled: bool = True, clip: bool = False, adapt: bool = True,
) -> Tensor:  # fmt: skip
    w, v = w.double(), 0.0
    for step, g in enumerate(g.double() for g in gs):
        eta = lr / (1 + step)  # a rate that falls tells momentum of steps from momentum of gradients
        local = 1.0
        if adapt and w.norm() > 0 and g.norm() > 0:
            local = trust * float(w.norm()) / (float(g.norm()) + decay * float(w.norm()) + eps)
            local = min(local / eta, 1.0) if clip else local
        d = local * (g + decay * w) * (eta if scaled else 1.0)
        v = momentum * v + d
        w = w - (d + momentum * v if nesterov else v) * (1.0 if scaled else eta)
    return w


def after_steps(
    make: Callable[..., torch.optim.Optimizer],
    *,
    falling: bool = False,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> list[Tensor]:
    parameters = weights(dtype)
    optimizer = make(parameters, **options)
    first = [group["lr"] for group in optimizer.param_groups]
    for step in range(STEPS):
        for parameter, gradient in zip(parameters, gradients(1 + step), strict=True):
            parameter.grad = gradient.to(parameter.dtype)
        for group, lr in zip(optimizer.param_groups, first, strict=True):
            group["lr"] = lr / (1 + step) if falling else lr
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def close(found: Tensor, wanted: Tensor, within: float = 1e-6) -> bool:
    return wanted.numel() == 0 or float((found.double() - wanted).abs().max()) <= within * (
        1 + float(wanted.abs().max())
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
    ({"trust_clip": True, "trust": 1.0}, {"clip": True, "trust": 1.0}),
    ({"momentum": 0.0, "weight_decay": 0.0}, {"momentum": 0.0, "decay": 0.0}),
]


@pytest.mark.parametrize("native", PATHS)
@pytest.mark.parametrize(("options", "terms"), LAMBS)
def test_lamb_is_the_papers(options: dict[str, Any], terms: dict[str, Any], native: bool) -> None:
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
def test_lars_is_the_papers(options: dict[str, Any], terms: dict[str, Any], native: bool) -> None:
    given = {"lr": 2.0, "trust": 0.01, "weight_decay": 0.1, **options}
    found = after_steps(LARS, falling=True, **given, native=native)
    for k, (start, end) in enumerate(zip(weights(), found, strict=True)):
        wanted = lars_by_the_paper(
            start.detach(), [gradients(1 + step)[k] for step in range(STEPS)], **{"lr": 2.0, "decay": 0.1, **terms}
        )
        assert close(end, wanted), (k, SHAPES[k])


@pytest.mark.parametrize("native", PATHS)
@pytest.mark.parametrize("cls", [LAMB, LARS])
def test_a_group_without_trust_is_not_scaled_unless_all_are(cls: type[Layerwise], native: bool) -> None:
    by = lamb_by_the_paper if cls is LAMB else lars_by_the_paper
    terms = {"lr": 0.01, "decay": 0.1} | ({"eps": 1e-6, "betas": (0.9, 0.999)} if cls is LAMB else {"trust": 0.001})
    for options, adapt in (({}, False), ({"always_adapt": True}, True)):
        given = {"lr": 0.01, "weight_decay": 0.1, "native": native, **options}
        found = after_steps(lambda p, given=given: cls([{"params": p, "trust": False}], **given), falling=cls is LARS)
        wanted = by(weights()[0].detach(), [gradients(1 + step)[0] for step in range(STEPS)], **terms, adapt=adapt)
        assert close(found[0], wanted)


@pytest.mark.parametrize("native", PATHS)
@pytest.mark.parametrize("cls", [LAMB, LARS])
def test_maximize_is_the_descent_of_the_negative(cls: type[Layerwise], native: bool) -> None:
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
    """The update is that of the same weights in float32, rounded once; bit by bit the same after a state_dict."""
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
def test_any_order_in_memory(cls: type[Layerwise], native: bool) -> None:
    """Channels last, a gradient in another order than its parameter, and a parameter with gaps."""
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


def test_what_cannot_be_is_refused() -> None:
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = LAMB(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(Refused, match=r"LAMB needs the whole gradient.*\[10, 4\] is sparse.*sparse=False"):
        optimizer.step()
    parameter = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    parameter.grad = torch.zeros_like(parameter)
    with pytest.raises(Refused, match="LARS takes no complex parameters"):
        LARS([parameter]).step()
    for cls, options in (
        (LAMB, {"lr": -1}), (LAMB, {"betas": (0.9, 1.0)}), (LAMB, {"trust_clip": (2.0, 1.0)}),
        (LAMB, {"bias_correction": "before"}), (LARS, {"trust": 0.0}), (LARS, {"momentum": 1.0}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(options))):
            cls([nn.Parameter(torch.zeros(2))], **options)


def test_a_closure_is_called_with_gradients() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = LAMB([parameter])

    def closure() -> Tensor:
        loss = (parameter**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert float(parameter.detach().max()) < 1.0


@pytest.fixture
def no_kernels_yet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernels.kernels.cache_clear()
    yield tmp_path
    kernels.kernels.cache_clear()


def test_without_a_compiler_one_warning_says_so(no_kernels_yet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.warns(UserWarning, match="LAMB and LARS go on with torch's own operations.*no-such-compiler"):
        found = after_steps(LAMB)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LARS(weights())
    assert all(torch.equal(a, b) for a, b in zip(found, after_steps(LAMB, native=False), strict=True))


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_ranks_take_the_kernel_together_or_not_at_all(no_kernels_yet: Path) -> None:
    def body(world: World, lacking: int) -> list[bool]:
        if world.rank == lacking:
            os.environ |= {"CC": "no-such-compiler", "XDG_CACHE_HOME": str(no_kernels_yet / "other")}
        optimizer = LAMB(weights())
        alone = optimizer._native
        optimizer.agree()
        return [alone, optimizer._native]

    for lacking, found in ((1, [[True, False], [False, False]]), (2, [[True, True]] * 2)):
        assert in_ranks(2, lambda world, who=lacking: body(world, who), no_kernels_yet / "ranks") == found


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_many_processes_may_build_at_once(no_kernels_yet: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        libraries = list(pool.map(lambda _: kernels._built(), range(4)))
    assert [path.name for path in no_kernels_yet.rglob("*")] == ["isobatch", libraries[0].name]
    assert kernels.kernels() is not None


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_threads_are_torchs_and_change_no_bit(tmp_path: Path) -> None:
    """In a process of its own: one that ran threads can't be forked. There is one OpenMP in it, torch's."""

    def body(world: World) -> Any:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append([*after_steps(LAMB), *after_steps(LARS)])
        libraries = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
        same = all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        return [same, len([name for name in libraries if "omp" in Path(name).name])]

    assert in_ranks(1, body, tmp_path) == [[True, 1]]


@pytest.mark.skipif(not installed(), reason="timm, torch_optimizer and pytorch_optimizer aren't all installed")
@pytest.mark.parametrize("native", PATHS)
def test_the_lambs_of_others_are_options(native: bool) -> None:
    """timm's with its clip off, torch_optimizer's, and pytorch_optimizer's with the decay in the step."""
    timm, ranger, kozistr = (
        alone(f"{package}.lamb").Lamb for package in ("timm.optim", "torch_optimizer", "pytorch_optimizer.optimizer")
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
    for peer, theirs, ours in pairs:
        shared: dict[str, Any] = {"lr": 0.1, "eps": 1e-6, "weight_decay": 0.1}
        a = after_steps(peer, **shared, **theirs)
        b = after_steps(LAMB, **shared, **ours, native=native)
        assert all(close(x, y.double(), 2e-6) for x, y in zip(a, b, strict=True)), (peer, theirs)


@pytest.mark.skipif(not installed(), reason="timm, torch_optimizer and pytorch_optimizer aren't all installed")
@pytest.mark.parametrize("native", PATHS)
@pytest.mark.parametrize("nesterov", [False, True])
def test_the_lars_of_others_are_options(native: bool, nesterov: bool) -> None:
    timm, ranger = alone("timm.optim.lars").Lars, alone("torch_optimizer.lars").LARS
    for peer, theirs, ours in (
        (timm, {"trust_coeff": 0.01}, {}),
        (timm, {"trust_coeff": 0.5, "trust_clip": True}, {"trust": 0.5, "trust_clip": True}),
        (ranger, {"trust_coefficient": 0.01}, {}),
    ):
        shared: dict[str, Any] = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.1, "nesterov": nesterov, "eps": 1e-8}
        mine: dict[str, Any] = {"trust": 0.01, "scaled_momentum": False, "native": native, **ours}
        a = after_steps(peer, falling=True, **shared, **theirs)
        b = after_steps(LARS, falling=True, **shared, **mine)
        whole = range(ZERO_WEIGHTS)  # where a norm is 0, torch_optimizer leaves out the decay
        assert all(close(a[k], b[k].double()) for k in whole), (peer, theirs)
