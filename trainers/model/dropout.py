"""Dropout whose masks follow the sample: the same however a global batch is cut (see randomness.py)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from isobatch.trainers.model.randomness import STREAMS, Stream
from isobatch.trainers.ranks.internals import Dropout


def row_keys(stream: Stream, layer: int, rows: int, elements: int, channels: bool) -> Tensor:
    """Return ``Stream.keys`` and the offset into the sample's mask for each row of an input: int32 [3, rows, 1].

    Args:
        elements: number of elements of a row.
        channels: each sample has to be one row.
    """
    if misfits(stream, layer, rows, channels):
        drawn = torch.randint(-(1 << 31), 1 << 31, (2, 1, 1), dtype=torch.int32)
        keys, each = drawn.to(stream.device, non_blocking=True), rows
    else:
        keys, each = stream.keys(layer), rows // stream.samples
    begin = (torch.arange(each, device=stream.device) * elements).to(torch.int32).view(1, -1, 1)
    keys = keys.repeat_interleave(each, 1) if each > 1 else keys
    return torch.cat((keys, begin.repeat(1, rows // each, 1)))


def misfits(stream: Stream, layer: int, rows: int, channels: bool) -> bool:
    """Return whether the rows of a layer's input aren't a multiple of the samples, and report it."""
    misfit = not stream.samples or bool(rows % stream.samples) or (channels and rows != stream.samples)
    if misfit:
        name = stream.names.get(layer) or "model"
        stream.tell(f"the rows of dropout layer {name} aren't a multiple of the samples")
    return misfit


@torch.library.custom_op("isobatch::mask_keys", mutates_args=("clock",))
def mask_keys(clock: Tensor, layer: Tensor, rows: int, elements: int, channels: bool, stream: int) -> Tensor:
    """Wrap ``row_keys`` in an operator, so that compiled code reads nothing that changes between two forwards.

    The number of samples changes: code that read it would be recompiled for each. The operator mutates the clock, so
    the compiler keeps all calls, in their order.
    """
    clock += 1
    return row_keys(STREAMS[stream], int(layer), rows, elements, channels)


@mask_keys.register_fake
def _(clock: Tensor, layer: Tensor, rows: int, elements: int, channels: bool, stream: int) -> Tensor:
    return torch.empty(3, rows, 1, dtype=torch.int32, device=STREAMS[stream].device)


def _uniform_bits(keys: Tensor, elements: int) -> Tensor:
    """Return 31 uniform bits for each element of each row: int32 [rows, elements], by ``Stream.keys`` or ``row_keys``.

    Apply murmur3's finaliser twice, with one key before each, in place. Masks turn arithmetic shifts into logical ones.
    """
    places = torch.arange(elements, dtype=torch.int32, device=keys.device)
    if len(keys) == 3:
        places = places + keys[2]
    words = places.mul_(-1640531527) ^ keys[0]
    shifted = torch.empty_like(words)
    for key in (keys[1], None):
        words ^= torch.bitwise_right_shift(words, 16, out=shifted).bitwise_and_(0xFFFF)
        words *= -2048144789
        words ^= torch.bitwise_right_shift(words, 13, out=shifted).bitwise_and_(0x7FFFF)
        words *= -1028477387
        if key is not None:
            words ^= key
    words ^= torch.bitwise_right_shift(words, 16, out=shifted).bitwise_and_(0xFFFF)
    return words.bitwise_and_(0x7FFFFFFF)


class KeyedDropout(nn.Dropout):
    """nn.Dropout (and, with ``channels``, Dropout1d to 3d) whose mask follows the sample.

    The rows of its input have to be a multiple of the micro-batch's samples, in their order, such as [samples, …] or
    [samples × tokens, …]. Other inputs fall back to torch's dropout, keyed by micro-batch.
    """

    def __init__(self, p: float, inplace: bool, stream: Stream, name: str, layer: int, channels: bool) -> None:
        super().__init__(p, inplace)
        self._stream, self._channels = stream, channels
        stream.names[layer] = name
        self._layer = torch.tensor(layer)  # an int would be a compile-time constant

    def forward(self, input: Tensor) -> Tensor:
        stream = self._stream
        if not self.training or self.p == 0 or input.numel() == 0:
            return input
        if torch.compiler.is_compiling():
            rows = input.shape[0]
            elements = input.shape[1] if self._channels else input.numel() // rows
            keys = mask_keys(stream.clock, self._layer, rows, elements, self._channels, stream.number)
        else:
            layer, rows = int(self._layer), stream.samples
            if misfits(stream, layer, input.shape[0], self._channels):
                return nn.functional.dropout(input, self.p, True, self.inplace)
            elements = input.shape[1] if self._channels else input.numel() // rows
            keys = stream.keys(layer)
        bits = _uniform_bits(keys, elements)
        scale = (bits >= round(self.p * 2**31)).to(input.dtype).mul_(1 / (1 - self.p) if self.p < 1 else 0.0)
        shape = (rows, elements, *[1] * (input.dim() - 2)) if self._channels else input.shape
        scale = scale.view(shape)
        return input.mul_(scale) if self.inplace else input * scale


_SWAPPED = {nn.Dropout: False, nn.Dropout1d: True, nn.Dropout2d: True, nn.Dropout3d: True}


def key_dropout(model: nn.Module, stream: Stream) -> nn.Module:
    """Replace every dropout module of ``model`` by a keyed one, in place; shared modules stay shared."""
    swapped: dict[nn.Module | None, nn.Module] = {}
    for layer, (name, module) in enumerate(model.named_modules()):
        if isinstance(module, Dropout) and type(module) in _SWAPPED:
            keyed = KeyedDropout(module.p, module.inplace, stream, name, layer, _SWAPPED[type(module)])
            swapped[module] = keyed.train(module.training)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() omits the second name of a shared module
            if child in swapped:
                setattr(parent, name, swapped[child])
    return swapped.get(model, model)
