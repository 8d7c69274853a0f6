"""Define the tasks: a GPT-2, a ResNet-50 and their data, which is random and made once on the host for all loops."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from isobatch.trainers.tasks.text import Block

TOKENS = 50_304  # GPT-2's 50,257, padded to a multiple of 64


class TorchDropout(nn.Dropout):
    """torch's dropout in our loop: Isobatch replaces nn.Dropout itself, and leaves classes derived from it alone."""


class GPT2(nn.Module):
    """GPT-2 (Radford et al. 2019), whose forward returns the sum of the losses: int64 [samples, length + 1] → 0-dim."""

    def __init__(
        self, tokens: int, length: int, width: int, depth: int, heads: int, p: float, dropout: type[nn.Dropout]
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(tokens, width), nn.Embedding(length, width)
        self.drop = dropout(p)
        blocks = [Block(width, heads, p) for _ in range(depth)]
        for block in blocks:
            block.attention[2], block.mlp[2] = dropout(p), dropout(p)
        self.blocks = nn.ModuleList(blocks)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, tokens, bias=False)
        self.head.weight = self.tokens.weight
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        stream = self.drop(self.tokens(inputs) + self.positions.weight[: inputs.shape[1]])
        for block in self.blocks:
            stream = block(stream)
        logits = self.head(self.norm(stream))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


class Text:
    """A task with a GPT-2, by default the one of 124 million parameters.

    Args:
        keyed: let Isobatch replace the dropout by its own.

    Attributes:
        unit: name and number of the units of a sample.
    """

    def __init__(
        self,
        tokens: int = TOKENS,
        length: int = 1024,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        dropout: float = 0.0,
        keyed: bool = True,
    ) -> None:
        self.sizes, self.keyed = (tokens, length, width, depth, heads, dropout), keyed
        self.tokens, self.length, self.flops = tokens, length, 12.0 * depth * width * length
        self.unit = "tokens", length

    def model(self) -> nn.Module:
        return GPT2(*self.sizes, nn.Dropout if self.keyed else TorchDropout)

    def train_data(self) -> TensorDataset:
        return random_tokens(self.tokens, self.length)

    def loss(self, model: nn.Module, batch: tuple[Tensor]) -> tuple[Tensor, int]:
        return model(batch[0]), batch[0].shape[0] * self.length

    def flops_per_unit(self, model: Any) -> float:
        """Return 6 N + 12 · depth · width · length for a token (Chowdhery et al. 2022, arXiv:2204.02311)."""
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return 6.0 * float(parameters - model.positions.weight.numel()) + self.flops


@cache
def random_tokens(tokens: int, length: int) -> TensorDataset:
    return TensorDataset(torch.randint(tokens, (2048, length + 1), generator=torch.Generator().manual_seed(0)))


class Bottleneck(nn.Module):
    """A block of ResNet-50, with its stride in the 3×3 convolution."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, kernel in ((inputs, width, 1), (width, width, 3), (width, 4 * width, 1)):
            conv = nn.Conv2d(before, after, kernel, stride if kernel == 3 else 1, kernel // 2, bias=False)
            layers += [conv, nn.BatchNorm2d(after), nn.ReLU()]
        self.branch = nn.Sequential(*layers[:-1])
        same = inputs == 4 * width and stride == 1
        conv = nn.Conv2d(inputs, 4 * width, 1, stride, bias=False)
        self.shortcut = nn.Identity() if same else nn.Sequential(conv, nn.BatchNorm2d(4 * width))

    def forward(self, images: Tensor) -> Tensor:
        return F.relu(self.branch(images) + self.shortcut(images))


class Images:
    """A task with a ResNet-50 (He et al. 2016) in channels_last on images of ``size`` × ``size`` bytes per channel."""

    unit = "images", 1

    def __init__(self, size: int = 224, width: int = 64, blocks: tuple[int, ...] = (3, 4, 6, 3)) -> None:
        self.size, self.width, self.blocks = size, width, blocks

    def model(self) -> nn.Module:
        width, channels = self.width, self.width
        layers: list[nn.Module] = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        layers.append(nn.MaxPool2d(3, 2, 1))
        for stage, blocks in enumerate(self.blocks):
            for block in range(blocks):
                layers.append(Bottleneck(channels, width << stage, 2 if stage and not block else 1))
                channels = 4 * width << stage
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000)]
        model: nn.Module = nn.Sequential(*layers).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model

    def train_data(self) -> TensorDataset:
        return random_images(self.size)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        images = batch[0].to(memory_format=torch.channels_last).float().div_(255)
        return F.cross_entropy(model(images), batch[1], reduction="sum"), len(images)

    def flops_per_unit(self, model: Any) -> float:
        """Return the operations of convolutions and matrix products for an image, counted by torch."""
        with FlopCounterMode(display=False) as counter:
            batch = torch.zeros(1, 3, self.size, self.size), torch.zeros(1).long()
            self.loss(self.model().eval(), batch)[0].backward()
        return float(counter.get_total_flops())


@cache
def random_images(size: int) -> TensorDataset:
    random = torch.Generator().manual_seed(0)
    images = torch.randint(256, (1024, 3, size, size), dtype=torch.uint8, generator=random)
    return TensorDataset(images, torch.randint(1000, (1024,), generator=random))
