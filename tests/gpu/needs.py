"""Skip tests that need what isn't installed: a package, or a newer torch."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.distributed as dist

NEWER = not hasattr(dist, "all_gather_single")
newer_torch = pytest.mark.skipif(NEWER, reason=f"needs torch 2.13, and {torch.__version__} is installed")
"""For several ranks, and for FSDP2."""


def package(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(name) is None, reason=f"{name} isn't installed")


def engine(name: str, *more: Any) -> Any:
    """Return a test's parameters, beginning with an engine of tests/support/same.py, with what the engine needs."""
    marks = {"FSDP": [newer_torch], "Accelerate": [package("accelerate")]}
    return pytest.param(name, *more, marks=marks.get(name, [package("deepspeed")] if "ZeRO" in name else []))
