"""Time LAMB's and LARS's steps against torch's fused AdamW and SGD and other LAMBs and LARSs, taking turns."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from isobatch.trainers.ranks.world import World
from tests.support.harness import in_ranks
from tests.support.peers import import_alone

LAYERS, HIDDEN, VOCABULARY, WARM, TURNS = 12, 256, 30522, 2, 15


def shapes() -> list[tuple[int, ...]]:
    """Return the shapes of a small BERT's parameters in the order of registration."""
    block = [(HIDDEN, HIDDEN), (HIDDEN,)] * 4 + [(HIDDEN,)] * 2
    block += [(4 * HIDDEN, HIDDEN), (4 * HIDDEN,), (HIDDEN, 4 * HIDDEN), *[(HIDDEN,)] * 3]
    return [(VOCABULARY, HIDDEN), (512, HIDDEN), (2, HIDDEN), (HIDDEN,), (HIDDEN,), *block * LAYERS]


def groups(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Return two groups: matrices, and vectors without weight decay and trust ratio."""
    matrices, vectors = ([p for p in parameters if (p.ndim > 1) is many] for many in (True, False))
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0, "trust": False}]


def makers() -> dict[str, tuple[str, Callable[[Any], Optimizer]]]:
    """Return name → (baseline, constructor)."""
    from isobatch.trainers.optim.lamb import LAMB
    from isobatch.trainers.optim.lars import LARS

    adamw, sgd = "AdamW, fused", "SGD, fused"
    decay: dict[str, Any] = {"weight_decay": 0.01}
    momentum: dict[str, Any] = {"weight_decay": 1e-4, "momentum": 0.9}
    lambs = {
        "timm": "timm.optim",
        "torch_optimizer": "torch_optimizer",
        "pytorch_optimizer": "pytorch_optimizer.optimizer",
    }
    larses = {"timm": "timm.optim.lars.Lars", "torch_optimizer": "torch_optimizer.lars.LARS"}
    larses["pytorch_optimizer"] = "pytorch_optimizer.optimizer.lars.LARS"

    def peer(path: str, **options: Any) -> Callable[[Any], Optimizer]:
        module, _, name = path.rpartition(".")
        return lambda groups: getattr(import_alone(module), name)(groups, lr=1e-4, **options)

    return {
        adamw: (adamw, lambda groups: AdamW(groups, lr=1e-4, fused=True, **decay)),
        "AdamW, foreach": (adamw, lambda groups: AdamW(groups, lr=1e-4, foreach=True, **decay)),
        "LAMB, ours": (adamw, lambda groups: LAMB(groups, lr=1e-4, **decay)),
        "LAMB, ours without the kernel": (adamw, lambda groups: LAMB(groups, lr=1e-4, native=False, **decay)),
        **{f"LAMB, {package}": (adamw, peer(f"{path}.lamb.Lamb", **decay)) for package, path in lambs.items()},
        sgd: (sgd, lambda groups: SGD(groups, lr=1e-4, fused=True, **momentum)),
        "LARS, ours": (sgd, lambda groups: LARS(groups, lr=1e-4, **momentum)),
        "LARS, ours without the kernel": (sgd, lambda groups: LARS(groups, lr=1e-4, native=False, **momentum)),
        **{f"LARS, {package}": (sgd, peer(path, **momentum)) for package, path in larses.items()},
    }


def turns(world: World) -> dict[str, tuple[float, list[float]]]:
    """Return name → (seconds of construction and first step, seconds of each later step) on one thread."""
    random = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(0.02 * torch.randn(shape, generator=random)) for shape in shapes()]
    gradients = [0.01 * torch.randn(shape, generator=random) for shape in shapes()]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)

    def timed(body: Callable[[], Any]) -> float:
        for parameter, gradient in zip(parameters, gradients, strict=True):  # some optimizers modify gradients
            assert isinstance(parameter.grad, Tensor)
            parameter.grad.copy_(gradient)
        began = time.perf_counter()
        body()
        return time.perf_counter() - began

    optimizers: dict[str, Optimizer] = {}
    first: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as cache:  # an empty cache, so that the kernel is compiled
        os.environ["XDG_CACHE_HOME"] = cache
        for name, (_, make) in makers().items():

            def begin(name: str = name, make: Callable[[Any], Optimizer] = make) -> None:
                optimizers[name] = make(groups(parameters))
                optimizers[name].step()

            first[name] = timed(begin)
    every = [{name: timed(optimizer.step) for name, optimizer in optimizers.items()} for _ in range(WARM + TURNS)]
    return {name: (first[name], [turn[name] for turn in every[WARM:]]) for name in optimizers}


def rows() -> list[dict[str, Any]]:
    """Return a row per optimizer: the median in ms, the median of the turns' ratios, and the time of the first step."""
    with tempfile.TemporaryDirectory() as folder:
        measured = in_ranks(1, turns, Path(folder), deadline_s=600)[0]
    found = []
    for name, (against, _) in makers().items():
        first, steps = measured[name]
        ratios = [step / baseline for step, baseline in zip(steps, measured[against][1], strict=True)]
        found.append(
            {
                "optimizer": name,
                "ms per step": 1e3 * statistics.median(steps),
                "ratio": statistics.median(ratios),
                "to": against,
                "construction and first step, s": first,
            }
        )
    return found


if __name__ == "__main__":
    for row in rows():
        print(json.dumps(row))
