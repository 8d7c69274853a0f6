"""BatchNorm over all ranks, also on the CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from isobatch.trainers.model.precision import widened


@torch.compiler.disable  # type: ignore[untyped-decorator]
def normalise_over_ranks(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, ranks: int
) -> tuple[Tensor, Tensor]:
    """Normalise a batch by the statistics of all ranks; all ranks have to call it, and its backward communicates, too.

    Args:
        input: [rows, C, …]; a rank may have no rows.
        weight, bias: [C]; their gradients aren't summed over ranks.

    Returns:
        The output, like ``input``; mean and unbiased variance, [1, 2, C], without a gradient.
    """
    output, statistics = _OverRanks.apply(input, weight, bias, eps, ranks)  # type: ignore[no-untyped-call]
    return output, statistics


class _OverRanks(torch.autograd.Function):
    """Combine the ranks' means and sums of squared deviations as in Chan et al. 1979 ("Updating Formulae and a Pairwise
    Algorithm for Computing Sample Variances"): a difference of sums of squares would cancel.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, ranks: int
    ) -> tuple[Tensor, Tensor]:
        x = widened(input)
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
        inputs, weight, mean, scale, count = ctx.saved_tensors
        x, g = widened(inputs), widened(grad)
        unit = (x - _along(mean, x)) * _along(scale, x)
        own = torch.stack((g.sum(_but_channels(g)), (g * unit).sum(_but_channels(g))))
        sums = own / count
        dist.all_reduce(sums)
        back = g - _along(sums[0], x) - unit * _along(sums[1], x)
        back *= _along(scale if weight is None else scale * weight, x)
        by_weight, by_bias = (None, None) if weight is None else (own[1].to(weight), own[0].to(weight))
        return back.to(inputs), by_weight, by_bias, None, None


def _combined(x: Tensor, ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and sum of squared deviations (both [C]) and number of the values of all ranks, float64."""
    channels, count = x.shape[1], x.numel() // x.shape[1]
    own = x.new_zeros(2 * channels + 1, dtype=torch.float64)
    if count:  # a rank without values contributes zeros
        variance, mean = torch.var_mean(x, _but_channels(x), correction=0)
        own.copy_(torch.cat((mean, variance * count, mean.new_full((1,), count))))
    everyone = own.new_empty(ranks * len(own))
    dist.all_gather_single(everyone, own)
    means, squares, counts = everyone.view(ranks, -1).split((channels, channels, 1), 1)
    total = counts.sum()
    mean = (means * counts).sum(0) / total
    return mean, (squares + counts * (means - mean) ** 2).sum(0), total


def _but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _along(values: Tensor, x: Tensor) -> Tensor:
    """Reshape ``values`` [C] to broadcast over ``x`` [rows, C, …]."""
    return values.to(x).view(-1, *[1] * (x.dim() - 2))
