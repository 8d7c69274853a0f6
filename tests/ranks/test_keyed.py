"""Test dropout keyed by the sample: its rate, its independence, and that it doesn't depend on the cut."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from isobatch.trainers.data.fetch import Fetch
from isobatch.trainers.model.dropout import key_dropout
from isobatch.trainers.model.randomness import STREAMS, Stream, generator_for, mix
from isobatch.trainers.tasks.task import Task

CPU = torch.device("cpu")


def masks(p: float, positions: range, features: int, *, seed: int = 0, layers: int = 1, calls: int = 1) -> Tensor:
    """Return the kept elements of some layers and calls, float [layers, calls, samples, features]."""
    stream = Stream(seed, CPU)
    model = key_dropout(nn.ModuleList(nn.Dropout(p) for _ in range(layers)), stream)
    assert isinstance(model, nn.ModuleList)
    stream.start(positions.start, positions.stop)
    ones = torch.ones(len(positions), features)
    return torch.stack([torch.stack([(layer(ones) > 0).float() for _ in range(calls)]) for layer in model])


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_elements_are_kept_at_the_rate_of_p(p: float) -> None:
    """The rates over a million elements, each sample and each feature are within five standard deviations."""
    kept = masks(p, range(1000), 1000)[0, 0]
    for part, count in ((kept.mean(), 1e6), (kept.mean(0), 1e3), (kept.mean(1), 1e3)):
        assert (part - (1 - p)).abs().max() < 5 * math.sqrt(p * (1 - p) / count)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_p_of_0_keeps_and_p_of_1_drops_everything(p: float) -> None:
    assert masks(p, range(10), 100).mean() == 1 - p


def test_kept_elements_are_scaled_up() -> None:
    stream = Stream(0, CPU)
    dropout = key_dropout(nn.Dropout(0.25), stream)
    stream.start(0, 100)
    assert sorted(set(dropout(torch.ones(100, 50)).flatten().tolist())) == pytest.approx([0, 1 / 0.75])


def test_masks_are_independent() -> None:
    """Correlations between samples, elements, layers, calls, seeds and far positions are those of noise."""
    n = 1 << 16
    base = masks(0.5, range(256), n // 256, layers=2, calls=2) - 0.5
    others = {
        "layer": base[1, 0],
        "call": base[0, 1],
        "sample": base[0, 0].roll(1, 0),
        "element": base[0, 0].roll(1, 1),
        "both": base[0, 0].roll((1, 1), (0, 1)),
        "seed": masks(0.5, range(256), n // 256, seed=1)[0, 0] - 0.5,
        "2^32 samples later": masks(0.5, range(2**32, 2**32 + 256), n // 256)[0, 0] - 0.5,
        "2^40 samples later": masks(0.5, range(2**40, 2**40 + 256), n // 256)[0, 0] - 0.5,
    }
    for name, other in others.items():
        correlation = (base[0, 0] * other).mean() * 4
        assert abs(correlation) < 5 / math.sqrt(n), name


def test_element_pairs_are_independent() -> None:
    """The largest of the 2,016 correlations of 64 elements over 10,000 samples is within noise."""
    kept = masks(0.5, range(10_000), 64)[0, 0] * 2 - 1
    correlations = (kept.T @ kept / len(kept)).fill_diagonal_(0)
    assert correlations.abs().max() < 5 / math.sqrt(len(kept))


def test_mask_follows_the_sample() -> None:
    """A sample's mask is the same on any cut as in the whole batch."""
    whole = masks(0.3, range(40, 100), 33)[0, 0]
    for start, stop in ((40, 41), (47, 90), (99, 100)):
        assert torch.equal(masks(0.3, range(start, stop), 33)[0, 0], whole[start - 40 : stop - 40])


def test_rows_may_be_a_multiple_of_the_samples() -> None:
    """[samples × tokens, features] has the masks of [samples, tokens, features]."""
    reports: list[str] = []
    stream = Stream(0, CPU, reports.append)
    dropout = key_dropout(nn.Dropout(0.5), stream)
    stream.start(5, 9)
    folded = dropout(torch.ones(4 * 6, 10))
    stream.start(5, 9)
    assert torch.equal(folded.view(4, 6, 10), dropout(torch.ones(4, 6, 10)))
    stream.stop()
    assert not reports


def test_other_rows_fall_back_and_are_reported() -> None:
    reports: list[str] = []
    stream = Stream(0, CPU, reports.append)
    model = key_dropout(nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.5)), stream)
    for _ in range(2):
        stream.start(0, 4)
        out = model[1](torch.ones(6, 1000))  # type: ignore[index]
    assert 0.4 < (out > 0).float().mean() < 0.6
    assert reports == ["the rows of dropout layer 1 aren't a multiple of the samples"]


def test_other_draws_of_a_forward_are_reported_and_repeat() -> None:
    """Functional dropout is keyed by micro-batch. The first forward reports it."""
    reports: list[str] = []
    stream = Stream(0, CPU, reports.append)
    keyed = key_dropout(nn.Dropout(0.5), stream)

    def forward(start: int) -> Tensor:
        stream.start(start, start + 4)
        out = nn.functional.dropout(keyed(torch.ones(4, 100)), 0.5)
        stream.stop()
        return out

    first = forward(0)
    assert reports == ["the forward draws random numbers outside of nn.Dropout modules"]
    assert not torch.equal(forward(4), first)
    assert torch.equal(forward(0), first)


def test_channels_are_dropped_whole() -> None:
    stream = Stream(0, CPU)
    dropout = key_dropout(nn.Dropout2d(0.5), stream)
    stream.start(0, 50)
    kept = dropout(torch.ones(50, 40, 3, 3)) > 0
    assert torch.equal(kept.all((2, 3)), kept.any((2, 3)))
    assert 0.4 < kept.float().mean() < 0.6


def test_recomputed_activations_get_the_same_masks() -> None:
    """The layer is called twice in a forward, each time with activation checkpointing."""

    def gradient(recompute: bool) -> Tensor:
        stream = Stream(0, CPU)
        torch.manual_seed(0)
        layer = key_dropout(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Tanh()), stream)
        stream.start(0, 16)
        x = torch.ones(16, 8, requires_grad=True)
        for _ in range(2):
            x = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        x.sum().backward()
        weight = layer[0].weight.grad  # type: ignore[index]
        assert isinstance(weight, Tensor)
        return weight

    assert torch.equal(gradient(recompute=True), gradient(recompute=False))


class Twice(nn.Module):
    """A model that calls one layer twice on the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack((self.drop(x), self.drop(x)))


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
def test_compiled_masks_equal_eager_ones() -> None:
    """One compilation per number of samples serves all positions. Two calls get different masks."""
    counters.clear()
    stream = Stream(0, CPU)
    plain = key_dropout(Twice(), stream)
    compiled = torch.compile(plain, backend="aot_eager_decomp_partition")
    for start, samples in ((0, 17), (17, 16), (33, 17), (50, 16), (66, 16), (82, 17)):
        masks = []
        for model in (plain, compiled):
            stream.start(start, start + samples)
            masks.append(model(torch.ones(samples, 40, requires_grad=True)))
            stream.stop()
        assert torch.equal(*masks)
        assert not torch.equal(*masks[1])
    assert counters["stats"]["unique_graphs"] <= 2
    assert not counters["graph_break"]


def test_dropout_is_off_in_evaluation() -> None:
    stream = Stream(0, CPU)
    dropout = key_dropout(nn.Dropout(0.5), stream).eval()
    assert torch.equal(dropout(torch.ones(3, 3)), torch.ones(3, 3))


def test_shared_dropout_stays_shared() -> None:
    shared = nn.Dropout(0.5)
    model = key_dropout(nn.Sequential(shared, nn.Linear(2, 2), shared), Stream(0, CPU))
    assert model[0] is model[2]  # type: ignore[index]
    assert model[0] is not shared  # type: ignore[index]


def test_augmentation_is_keyed_by_position() -> None:
    draws = {
        torch.randn(1, generator=generator_for(seed, position)).item() for seed in (0, 1) for position in range(50)
    }
    assert len(draws) == 100
    again = torch.randn(1, generator=generator_for(1, 49)).item()
    assert again in draws


def test_different_uses_at_one_position_draw_different_numbers() -> None:
    """A forward doesn't repeat the draws of the dataset, augment or collate for its first sample."""

    class Drawing:
        collate = staticmethod(lambda samples: (*samples[0], torch.rand(3)))
        augment = staticmethod(lambda sample, generator: (sample, torch.rand(3, generator=generator)))

        def __len__(self) -> int:
            return 10

        def __getitem__(self, index: int) -> Tensor:
            return torch.rand(3)

    drawing: Any = Drawing()
    drawn = list(Fetch(drawing, Task(drawing), seed=0)[5, 6].batch)
    Stream(0, CPU).start(5, 6)
    drawn.append(torch.rand(3))
    assert len({tuple(numbers.tolist()) for numbers in drawn}) == len(drawn) == 4


def test_mix_depends_on_words_and_their_order() -> None:
    words = [(0,), (0, 0), (1, 0), (0, 1), (-1, 0), (2**64 - 2, 0)]
    assert len({mix(*w) for w in words}) == len(words)


def test_compiled_code_finds_its_stream_after_others_are_freed() -> None:
    first, second = (Stream(seed, torch.device("cpu")) for seed in (1, 2))
    del first
    third = Stream(3, torch.device("cpu"))
    assert [STREAMS[stream.number] for stream in (second, third)] == [second, third]
