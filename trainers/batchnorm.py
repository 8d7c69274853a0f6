"""BatchNorm whose statistics, and their running averages, don't depend on how many ranks and passes a batch took.

Layers are given another class in place: names, sharing and hooks stay. What the passes of a step find of means and
variances travels as the note does (trainers/tally.py), as the gradient of an extra parameter, so it costs no message.
After the step all ranks move their running statistics alike, once, by the mean over all groups of the global batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from scaling.plan import Plan
from trainers.keyed import Stream
from trainers.rundir import Refused
from trainers.tally import Attach

if TYPE_CHECKING:
    from conf.schema import BatchNorm

FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)  # those that are replaced


class Counting(_BatchNorm):
    """A BatchNorm that tells ``Statistics`` what it finds, and leaves its running statistics alone.

    Attributes:
        found: sums over ``groups`` (0-dim) of their means and unbiased variances, [2, C], in this pass; None: not kept.
    """

    found: Tensor | None
    groups: Tensor

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        return self.normalised(input)

    def normalised(self, input: Tensor) -> Tensor:
        """``input`` by statistics of its own."""
        raise NotImplementedError

    def tell(self, statistics: Tensor) -> None:
        """Take in means and unbiased variances: [groups, 2, C]."""
        if self.found is not None:
            self.groups.add_(len(statistics))
            self.found.add_(statistics.sum(0))

    def in_parts(self, input: Tensor, rows: int) -> Tensor:
        """Normalise every ``rows`` consecutive rows by themselves."""
        parts = input.split(rows)
        like = next(tensor for tensor in (self.running_mean, self.weight, input) if tensor is not None)
        statistics = like.new_zeros(len(parts), 2, self.num_features)
        done = [  # a momentum of 1 leaves a part's own mean and unbiased variance
            F.batch_norm(part, mean, variance, self.weight, self.bias, True, 1.0, self.eps)
            for part, (mean, variance) in zip(parts, statistics, strict=True)
        ]
        self.tell(statistics)
        return done[0] if len(done) == 1 else torch.cat(done)


class Ghosts(Counting):
    """Normalises ghosts, ``ghost_size`` consecutive samples each, which no cut parts.

    The rows of its input have to be a multiple of the micro-batch's samples, in their order; else they are one group.
    """

    ghost_size: int
    stream: Stream
    name: str

    def normalised(self, input: Tensor) -> Tensor:
        rows, samples = len(input), self.stream.samples
        if not samples or rows % samples:
            self.stream.tell(f"the rows of BatchNorm layer {self.name or 'model'} aren't a multiple of the samples")
            return self.in_parts(input, rows)
        return self.in_parts(input, rows // samples * self.ghost_size)


class Synced(Counting):
    """Normalises one pass over all ranks, each of which has to call it as often, and in the same order."""

    ranks: int

    def normalised(self, input: Tensor) -> Tensor:
        if self.ranks == 1:
            return self.in_parts(input, len(input))
        output, statistics = _over_ranks(input, self.weight, self.bias, self.eps, self.ranks)
        self.tell(statistics)  # all ranks the same, which their mean is, too
        return output


@torch.compiler.disable
def _over_ranks(*args: Any) -> tuple[Tensor, Tensor]:
    return _OverRanks.apply(*args)  # type: ignore[no-untyped-call,no-any-return]


class _OverRanks(torch.autograd.Function):
    """Normalise by mean and variance over all ranks; one message forward, one backward.

    The ranks' means and sums of squares about them are combined as in Chan et al. 1979 ("Updating Formulae and a
    Pairwise Algorithm for Computing Sample Variances"); a difference of sums would cancel.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, ranks: int
    ) -> tuple[Tensor, Tensor]:
        x = _wide(input)
        mean, squares, count = _combined(x, ranks)
        scale = torch.rsqrt(squares / count + eps)
        ctx.save_for_backward(input, weight, mean.to(x), scale.to(x), count.to(x))
        output = (x - _along(mean, x)) * _along(scale if weight is None else scale * weight, x)
        output = output if bias is None else output + _along(bias, x)
        statistics = torch.stack((mean, squares / (count - 1).clamp(min=1)))[None].to(x)
        ctx.mark_non_differentiable(statistics)
        return output.to(input), statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        entered, weight, mean, scale, count = ctx.saved_tensors
        x, g = _wide(entered), _wide(grad)
        unit = (x - _along(mean, x)) * _along(scale, x)
        own = torch.stack((g.sum(_but_channels(g)), (g * unit).sum(_but_channels(g))))
        sums = own / count
        dist.all_reduce(sums)
        back = g - _along(sums[0], x) - unit * _along(sums[1], x)
        back *= _along(scale if weight is None else scale * weight, x)
        by_weight, by_bias = (None, None) if weight is None else (own[1].to(weight), own[0].to(weight))
        return back.to(entered), by_weight, by_bias, None, None


def _combined(x: Tensor, ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, sum of squares about it (both [C]) and number of the values of all ranks, float64."""
    channels, count = x.shape[1], x.numel() // x.shape[1]
    mine = x.new_zeros(2 * channels + 1, dtype=torch.float64)
    if count:  # a rank that has no values takes part with zeros
        variance, mean = torch.var_mean(x, _but_channels(x), correction=0)
        mine.copy_(torch.cat((mean, variance * count, mean.new_tensor([count]))))
    everyone = mine.new_empty(ranks * len(mine))
    dist.all_gather_single(everyone, mine)
    means, squares, counts = everyone.view(ranks, -1).split((channels, channels, 1), 1)
    total = counts.sum()
    mean = (means * counts).sum(0) / total
    return mean, (squares + counts * (means - mean) ** 2).sum(0), total


def _but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _along(values: Tensor, x: Tensor) -> Tensor:
    """``values`` [C] as they are broadcast over ``x`` [rows, C, …]."""
    return values.to(x).view(-1, *[1] * (x.dim() - 2))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


class Statistics(nn.Module):
    """Brings together what all ranks and passes of a step have found, and moves the layers' running statistics.

    Args:
        layers: that keep some; at least one.
    """

    def __init__(self, layers: list[Counting], device: torch.device) -> None:
        super().__init__()
        self._layers, self._found = layers, list[Tensor]()
        for layer in layers:
            layer.groups = torch.zeros((), device=device)
            layer.found = torch.zeros(2, layer.num_features, device=device, dtype=_width_of(layer))
            self._found.append(layer.found)
        self._momentum = torch.tensor([layer.momentum or 0.0 for layer in layers], device=device)
        self._cumulative = torch.tensor([layer.momentum is None for layer in layers], device=device)
        self._widths = torch.tensor([found.numel() for found in self._found], device=device)
        self.sums = nn.Parameter(self._of_this_pass())

    def begin(self) -> None:
        """Before a pass: forget the one before it, and what its backward has computed again."""
        torch._foreach_zero_([*(layer.groups for layer in self._layers), *self._found])

    def attach(self, loss: Tensor) -> Tensor:
        """``loss`` unchanged; its backward leaves what this pass found as the parameter's gradient."""
        attached: Tensor = Attach.apply(loss, self.sums, self._of_this_pass())  # type: ignore[no-untyped-call]
        return attached

    def _of_this_pass(self) -> Tensor:
        """The numbers of groups, then means and variances, layer by layer."""
        groups = torch.stack([layer.groups for layer in self._layers])
        return torch.cat((groups, *(found.reshape(-1) for found in self._found)))

    def drop(self) -> None:
        """Forget the step."""
        self.sums.grad = None

    @torch.no_grad()
    def update(self, ranks: int) -> None:
        """Move the running statistics by the mean over all groups of the step; a layer that had none stays.

        Args:
            ranks: by which the reduction divided.
        """
        assert self.sums.grad is not None, "no backward since the last update"
        groups, found = (self.sums.grad * ranks).split([len(self._layers), len(self.sums) - len(self._layers)])
        self.drop()
        counts = _there(layer.num_batches_tracked for layer in self._layers)
        buffers = _there(buffer for layer in self._layers for buffer in (layer.running_mean, layer.running_var))
        tracked = torch.stack(counts) + (groups > 0)
        momentum = torch.where(self._cumulative, 1 / tracked.clamp(min=1), self._momentum) * (groups > 0)
        groups, momentum = (self._each(values) for values in (groups.clamp(min=1), momentum.to(found)))
        moved = torch.cat(buffers).to(found).lerp(found / groups, momentum)
        torch._foreach_copy_(counts, list(tracked))
        torch._foreach_copy_(buffers, list(moved.split([len(buffer) for buffer in buffers])))

    def _each(self, values: Tensor) -> Tensor:
        """A layer's value for each of its means and variances."""
        return values.repeat_interleave(self._widths, output_size=len(self.sums) - len(self._layers))


def _width_of(layer: Counting) -> torch.dtype:
    return torch.float32 if layer.running_mean is None else _wide(layer.running_mean).dtype


def _there(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def settled(model: nn.Module) -> bool:
    """Whether every buffer of ``model`` is one that is moved alike on all ranks."""
    layers = [layer for layer in model.modules() if isinstance(layer, Counting)]
    return {*map(id, model.buffers())} <= {id(buffer) for layer in layers for buffer in layer.buffers()}


def statistics_of(model: nn.Module, device: torch.device) -> Statistics | None:
    """For the layers of ``model``, on ``device`` already, that keep running statistics; None where there are none."""
    layers = [layer for layer in model.modules() if isinstance(layer, Counting) and layer.running_mean is not None]
    return Statistics(layers, device) if layers else None


def swap_batchnorm(model: nn.Module, config: BatchNorm, stream: Stream, ranks: int) -> nn.Module:
    """Make every BatchNorm of ``model`` (but those that have a forward of their own) normalise as ``config`` says."""
    kind: type[Counting] = Synced
    state: dict[str, Any] = {"found": None, "ranks": ranks}
    if config.mode == "ghost":
        kind, state = Ghosts, {"found": None, "ghost_size": config.ghost_size, "stream": stream}
    for name, module in model.named_modules() if config.mode else ():
        if isinstance(module, _BatchNorm) and type(module).forward in FORWARDS:
            module.__class__ = _made_of(kind, type(module))
            vars(module).update(state, name=name)
    return model


@cache
def _made_of(kind: type[Counting], cls: type[_BatchNorm]) -> type[_BatchNorm]:
    return type(f"{kind.__name__}{cls.__name__}", (kind, cls), {})


def refuse_empty_passes(plan: Plan) -> None:
    """Raises Refused where some rank has no samples in a pass that all have to take part in."""
    cut = min((stage.cut for stage in plan.stages), key=lambda cut: cut.micro_batches[-1][0])
    if not cut.micro_batches[-1][0]:
        raise Refused(
            f"batchnorm.mode=sync wants a sample on every rank in every pass, and {plan.size(cut.global_size)} a step "
            f"are fewer than {cut.world} ranks × accumulation {cut.accumulation}: use a larger batch.global_size, "
            "fewer of both, or batchnorm.mode=ghost"
        )
