"""BatchNorm whose statistics and running averages don't depend on the number of ranks and passes of a batch.

The class of each layer is replaced in place, so names, sharing and hooks stay. The means and variances of a step's
passes travel as the gradient of an extra parameter, like the note (engines/riders.py), and cost no message.
After the step all ranks update their running statistics once, by the mean over all groups of the global batch.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from isobatch.scaling.errors import UserError
from isobatch.trainers.model.modes import Modes
from isobatch.trainers.model.over_ranks import normalise_over_ranks
from isobatch.trainers.model.precision import widened
from isobatch.trainers.model.randomness import Stream
from isobatch.trainers.ranks.internals import BatchNorm, foreach_copy_, foreach_zero_

FORWARDS = (BatchNorm.forward, nn.SyncBatchNorm.forward)  # forwards that only normalise


class Counting(BatchNorm):
    """A BatchNorm that reports its statistics to ``Statistics`` and doesn't update its running statistics.

    Attributes:
        name: the layer's name in the model.
        does_more: its class has its own forward, such as one with an activation; only its normalisation is replaced.
        found: the sums over ``groups`` (0-dim) of means and unbiased variances in this pass, [2, C]; None: not kept.
    """

    name: str
    does_more: bool
    found: Tensor | None
    groups: Tensor

    def forward(self, input: Tensor) -> Tensor:
        return self._normalise(input) if self.training else super().forward(input)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _normalise(self, input: Tensor) -> Tensor:
        # not compiled: the loop over ghosts would be recompiled for each number of samples
        if self.does_more:
            with _Instead(self):
                return super().forward(input)
        self._check_input_dim(input)
        return self.normalised(input)

    def normalised(self, input: Tensor) -> Tensor:
        """Return ``input`` normalised by its own statistics."""
        raise NotImplementedError

    def tell(self, statistics: Tensor) -> None:
        """Add means and unbiased variances, [groups, 2, C], to ``found``."""
        if self.found is not None:
            self.groups.add_(len(statistics))
            self.found.add_(statistics.sum(0))

    def in_parts(self, input: Tensor, rows: int) -> Tensor:
        """Normalise each run of ``rows`` consecutive rows by itself."""
        parts = input.split(rows)
        like = next(tensor for tensor in (self.running_mean, self.weight, input) if tensor is not None)
        statistics = like.new_zeros(len(parts), 2, self.num_features)
        done = [  # a momentum of 1 leaves a part's own mean and unbiased variance
            F.batch_norm(part, mean, variance, self.weight, self.bias, True, 1.0, self.eps)
            for part, (mean, variance) in zip(parts, statistics, strict=True)
        ]
        self.tell(statistics)
        return done[0] if len(done) == 1 else torch.cat(done)


class _Instead(TorchFunctionMode):
    """Replace ``F.batch_norm`` by ``layer.normalised``, and don't count the layer's steps."""

    def __init__(self, layer: Counting) -> None:
        super().__init__()
        self._layer, self._used = layer, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.batch_norm:
            self._used = True
            return self._layer.normalised(args[0] if args else kwargs["input"])  # torch switches the mode off here
        if func is Tensor.add_ and args[0] is self._layer.num_batches_tracked:
            return args[0]
        return func(*args, **(kwargs or {}))

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if not self._used and error[0] is None:
            layer = f"{self._layer.name}, a {type(self._layer).__bases__[1].__name__}"
            problem = f"batchnorm.mode doesn't reach {layer}: its forward doesn't call torch.nn.functional.batch_norm"
            raise UserError(problem, key="batchnorm.mode")


class Ghosts(Counting):
    """Normalise ghosts of ``ghost_size`` consecutive samples, which no cut splits.

    The rows of the input have to be a multiple of the micro-batch's samples, in their order; else they are one group.
    """

    ghost_size: int
    stream: Stream

    def normalised(self, input: Tensor) -> Tensor:
        rows, samples = len(input), self.stream.samples
        if samples and rows % samples == 0:
            return self.in_parts(input, rows // samples * self.ghost_size)
        self.stream.tell(f"the rows of BatchNorm layer {self.name or 'model'} aren't a multiple of the samples")
        return self.in_parts(input, rows)


class Synced(Counting):
    """Normalise one pass over all ranks, which have to call the layers equally often and in the same order."""

    ranks: int

    def normalised(self, input: Tensor) -> Tensor:
        if self.ranks == 1:
            return self.in_parts(input, len(input))
        output: Tensor
        output, statistics = normalise_over_ranks(input, self.weight, self.bias, self.eps, self.ranks)
        self.tell(statistics)  # the same on all ranks, and so is their mean
        return output


class Statistics:
    """Combine the statistics of all ranks and passes of a step, and update the running statistics of ``layers``."""

    def __init__(self, layers: list[Any], device: torch.device) -> None:
        self._layers = layers
        for layer in layers:
            layer.groups = torch.zeros((), device=device)
            dtype = widened(layer.running_mean).dtype
            layer.found = torch.zeros(2, layer.num_features, device=device, dtype=dtype)
        self._found: list[Tensor] = [layer.found for layer in layers]
        self._momentum = torch.tensor([layer.momentum or 0.0 for layer in layers], device=device)
        self._cumulative = torch.tensor([layer.momentum is None for layer in layers], device=device)
        self._widths = torch.tensor([found.numel() for found in self._found], device=device)
        self.sums = nn.Parameter(self.of_this_pass())

    def begin(self) -> None:
        """Reset the statistics before a pass; those of the previous pass include its recomputed activations."""
        foreach_zero_([*(layer.groups for layer in self._layers), *self._found])

    def of_this_pass(self) -> Tensor:
        """Return the numbers of groups of this pass, then its means and variances, layer by layer."""
        groups = torch.stack([layer.groups for layer in self._layers])
        return torch.cat((groups, *(found.reshape(-1) for found in self._found)))

    @torch.no_grad()
    def update(self) -> None:
        """Update the running statistics by the mean over all groups of the step; unused layers don't change.

        The sums and the numbers of groups may both be divided by the number of ranks.
        """
        assert self.sums.grad is not None, "no backward since the last update"
        groups, found = self.sums.grad.split([len(self._layers), len(self.sums) - len(self._layers)])
        used = groups > 0
        self.sums.grad = None
        counts = [layer.num_batches_tracked for layer in self._layers]
        buffers = [buffer for layer in self._layers for buffer in (layer.running_mean, layer.running_var)]
        tracked = torch.stack(counts) + used
        momentum = torch.where(self._cumulative, 1 / tracked.clamp(min=1), self._momentum) * used
        means = found / self._each(torch.where(used, groups, 1.0))
        moved = torch.cat(buffers).to(found).lerp(means, self._each(momentum.to(found)))
        foreach_copy_(counts, list(tracked))
        foreach_copy_(buffers, list(moved.split([len(buffer) for buffer in buffers])))

    def _each(self, values: Tensor) -> Tensor:
        """Repeat each layer's value for each of its means and variances."""
        return values.repeat_interleave(self._widths, output_size=len(self.sums) - len(self._layers))


def settled(model: nn.Module) -> bool:
    """Return whether all buffers of ``model`` are updated identically on all ranks."""
    layers = [layer for layer in model.modules() if isinstance(layer, Counting)]
    return {*map(id, model.buffers())} <= {id(buffer) for layer in layers for buffer in layer.buffers()}


def statistics_of(model: nn.Module, device: torch.device) -> Statistics | None:
    """Return the statistics of the layers that keep running statistics; None if no layer does."""
    layers = [layer for layer in model.modules() if isinstance(layer, Counting) and layer.running_mean is not None]
    return Statistics(layers, device) if layers else None


def swap_batchnorm(model: nn.Module, mode: str | None, ghost_size: int | None, stream: Stream, ranks: int) -> nn.Module:
    """Make every BatchNorm of ``model`` normalise by ``mode``: ghost or sync; None changes nothing.

    Layers that stay in eval mode aren't changed.
    """
    kind = Ghosts if mode == "ghost" else Synced
    state: dict[str, Any] = {"found": None, "ranks": ranks, "ghost_size": ghost_size, "stream": stream}
    frozen = Modes(model)
    for name, module in model.named_modules() if mode else ():
        if isinstance(module, BatchNorm) and module not in frozen:
            module.__class__ = _made_of(kind, type(module))  # type: ignore[arg-type]
            vars(module).update(state, name=name)
    return model


@cache
def _made_of(kind: type[Counting], cls: type[BatchNorm]) -> type[BatchNorm]:
    return type(f"{kind.__name__}{cls.__name__}", (kind, cls), {"does_more": cls.forward not in FORWARDS})
