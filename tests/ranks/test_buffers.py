"""Test that buffers are moved and separated whatever a module does with its attributes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from isobatch.conf.compose import compose
from isobatch.trainers.model.build import place_buffers, prepare
from isobatch.trainers.model.randomness import Stream


class Guarded(nn.Module):
    """A module that rejects assignments, with a buffer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("one", torch.ones(1).expand(3))
        self.register_buffer("none", None)
        self.register_buffer("two", self.one)
        self.open = False

    def __setattr__(self, name: str, value: Any) -> None:
        assert getattr(self, "open", True), f"{name} is set"
        super().__setattr__(name, value)


def test_buffers_are_moved_under_all_their_names() -> None:
    model = nn.ModuleList([Guarded(), nn.Linear(1, 1)])
    model[1].register_buffer("three", model[0].one)
    place_buffers(model, torch.device("meta"))
    assert model[0].one.is_meta
    assert model[0].one is model[0].two is model[1].three
    assert not model[1].weight.is_meta


def test_expanded_buffers_get_memory_of_their_own() -> None:
    model = prepare(nn.Sequential(Guarded()), compose([]), Stream(0, torch.device("cpu")), 1)
    assert model[0].one.stride() == (1,)
    assert model[0].one is model[0].two
