"""Byte-level text and a small GPT with dropout. The unit is the token; a file is memory-mapped, not read at once."""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from isobatch.scaling.errors import UserError

BYTES = 256  # size of the vocabulary
LIBRARY = 1_000_000  # bytes of the standard library, so that every Python version has as many samples
Open = Callable[[], np.ndarray]


def open_corpus(data: str | None) -> Open:
    """Return a function that opens the bytes (uint8) of the text file ``data``; None: of the standard library."""
    return standard_library if data is None else partial(mapped, Path(data).expanduser().absolute())


def mapped(file: Path) -> np.ndarray:
    """Map the bytes of ``file`` into memory. Raises UserError if that fails."""
    try:
        return np.memmap(file, np.uint8, "r")
    except FileNotFoundError:
        raise UserError(f"task.args.data={file} doesn't exist", "", "task.args.data", file) from None
    except (OSError, ValueError) as error:
        problem = f"task.args.data={file} can't be mapped into memory: {error}"
        raise UserError(problem, "", "task.args.data", file) from None


def standard_library() -> np.ndarray:
    """Return the first 1 MB of the source of Python's standard library, its modules sorted by name.

    The text, but not its length, depends on the version of Python.
    """
    folder, text = Path(sysconfig.get_path("stdlib")), bytearray()
    for file in sorted(folder.glob("*.py")):
        text += file.read_bytes()
        if len(text) >= LIBRARY:
            return np.frombuffer(text[:LIBRARY], np.uint8)
    problem = f"{folder} has {len(text):,} bytes of Python's source, not {LIBRARY:,}"
    raise UserError(problem, "give a text file as task.args.data", "task.args.data")


class Windows(Dataset):
    """Consecutive windows of a corpus, uint8 [length + 1]; the last byte of each is the first of the next.

    Each byte except the first is predicted once. An incomplete window at the end is left out.

    Args:
        corpus: opens the bytes, in each process that needs them.
        start, stop: the range of bytes to use.
        length: predicted bytes per window.
    """

    def __init__(self, corpus: Open, start: int, stop: int, length: int) -> None:
        self.corpus, self.start, self.stop, self.length = corpus, start, stop, length

    def __len__(self) -> int:
        return max(0, self.stop - self.start - 1) // self.length

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < len(self):
            raise IndexError(index)
        first = self.start + index * self.length
        return torch.from_numpy(self._bytes[first : first + self.length + 1].copy())

    @cached_property
    def _bytes(self) -> np.ndarray:
        return self.corpus()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the bytes, which another process opens itself."""
        return {name: value for name, value in vars(self).items() if name != "_bytes"}


class Text:
    """Predict the next byte of a text by a GPT (Radford et al. 2019): pre-norm, tied embeddings, dropout.

    It also trains another causal language model (``model._target_``) with at least 256 tokens that returns logits, or
    an object with ``.logits``.

    Args:
        data: a text file, mapped into memory; null: 1 MB of the source of Python's standard library, whose text
            depends on the version of Python. The last tenth is for validation.
        length: tokens per sample.
        width: width of the residual stream.
        depth: number of blocks.
        heads: number of attention heads.
        dropout: probability, after the embedding and at the end of each branch.

    Raises:
        UserError: the text can't be read or is too short, or the sizes are invalid.
    """

    def __init__(self, data: str | None, length: int, width: int, depth: int, heads: int, dropout: float) -> None:
        if min(length, width, depth, heads) < 1 or width % heads or not 0 <= dropout < 1:
            problem = f"task.args.length={length}, width={width}, depth={depth}, heads={heads}, dropout={dropout}"
            fix = "sizes have to be 1 or more, heads has to divide width, and dropout has to be from 0 to below 1"
            raise UserError(problem, fix, "task.args")
        self.sizes = length, width, depth, heads, dropout
        corpus = open_corpus(data)
        size = len(corpus())
        held_back = size - size // 10
        self._train, self._val = Windows(corpus, 0, held_back, length), Windows(corpus, held_back, size, length)
        if not len(self._train):
            problem = f"task.args.data={data} has only {size:,} bytes, too few for task.args.length={length}"
            raise UserError(problem, "use a longer text, or a smaller length", "task.args.data", data)

    def model(self) -> nn.Module:
        return GPT(*self.sizes)

    def train_data(self) -> Windows:
        return self._train

    def val_data(self) -> Windows | None:
        return self._val if len(self._val) else None

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
        tokens = batch.long()
        output = model(tokens[:, :-1])
        logits, targets = getattr(output, "logits", output), tokens[:, 1:]
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"), targets.numel()

    def flops_per_unit(self, model: nn.Module) -> float:
        """Return 6 N + 12 · depth · width · length for a token (Chowdhery et al. 2022, arXiv:2204.02311)."""
        parameters = sum(parameter.numel() for parameter in model.parameters())
        if not isinstance(model, GPT):
            return 6.0 * parameters
        length, width, depth, *_ = self.sizes
        return 6.0 * (parameters - model.positions.weight.numel()) + 12.0 * depth * width * length

    def summarise(self, totals: dict[str, tuple[float, float]]) -> dict[str, float]:
        loss, tokens = totals["loss"]
        return {"bits_per_byte": loss / tokens / math.log(2)}


class GPT(nn.Module):
    """A decoder-only transformer: tokens int64 [samples, tokens] → logits [samples, tokens, 256]."""

    def __init__(self, length: int, width: int, depth: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(BYTES, width), nn.Embedding(length, width)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, BYTES, bias=False)
        self.head.weight = self.tokens.weight
        self._start()

    def _start(self) -> None:
        """Initialise weights: std 0.1 in embeddings, 1/√inputs in layers; less at the end of a branch, as in GPT-2."""
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                std = 0.1 if name in ("tokens.weight", "positions.weight") else parameter.shape[1] ** -0.5
                ends = name.endswith(("out.weight", "mlp.1.2.weight"))
                nn.init.normal_(parameter, std=std / math.sqrt(2 * len(self.blocks)) if ends else std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        stream = self.drop(self.tokens(tokens) + self.positions.weight[: tokens.shape[1]])
        for block in self.blocks:
            stream = block(stream)
        logits: Tensor = self.head(self.norm(stream))
        return logits


class Block(nn.Module):
    """Attention and an MLP, each a branch added to the residual stream [samples, tokens, width]."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width, heads), nn.Dropout(dropout))
        self.mlp = nn.Sequential(nn.LayerNorm(width), MLP(width), nn.Dropout(dropout))

    def forward(self, stream: Tensor) -> Tensor:
        attended = stream + self.attention(stream)
        result: Tensor = attended + self.mlp(attended)
        return result


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, stream: Tensor) -> Tensor:
        query, key, value = self.qkv(stream).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        result: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return result


class MLP(nn.Sequential):
    """Two linear layers with a hidden width of 4 × ``width``."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
