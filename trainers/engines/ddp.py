"""Reduce gradients with torch's DistributedDataParallel; a single rank trains without it."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from isobatch.conf.schema import RunConfig
from isobatch.scaling.geometry import Cut
from isobatch.trainers.engines.reducer import Parts, Reducer
from isobatch.trainers.engines.step_report import Note, Number
from isobatch.trainers.model.batchnorm import settled
from isobatch.trainers.model.targets import check_call


def make_reducer(parts: Parts, config: RunConfig) -> Reducer:
    """Return the reducer of the engine ``ddp``."""
    return DDP(parts, config.engine.config)


class DDP(Reducer):
    """Average gradients over ranks; ``wrap`` wraps a module in DistributedDataParallel, with ``keywords``."""

    def __init__(
        self,
        parts: Parts,
        keywords: dict[str, Any],
        wrap: Callable[..., nn.Module] = DistributedDataParallel,
        run_backward: Callable[[Tensor], Any] = Tensor.backward,
    ) -> None:
        root, self.mean_over = parts.root, parts.world.size
        parts.model.to(parts.world.device)
        self._run_backward = run_backward
        self._wrapper: DistributedDataParallel | None = None
        check_call("engine.config", "DistributedDataParallel", DistributedDataParallel, (root,), keywords)
        if self.mean_over > 1:
            parts.riders.ride_in(root, self.mean_over)
            ours = {"gradient_as_bucket_view": True}
            if settled(parts.model) and "broadcast_buffers" not in keywords:
                ours["forward_sync_buffers"] = False
            wrapper = wrap(root, **{**ours, **keywords})
            assert isinstance(wrapper, DistributedDataParallel)
            self._wrapper = wrapper
        super().__init__(parts, parts.make_optimizer(), self._wrapper)
        if self._wrapper:
            self.shares_buffers = True
            self._settle_buckets(parts)

    def _settle_buckets(self, parts: Parts) -> None:
        """Run one backward, after which DDP rearranges its buckets.

        The rounding of sums over ranks depends on the buckets. Without this, the first step after a resume would be
        rounded differently from the same step of an uninterrupted run.
        """
        loss = self.forward(lambda: parts.riders.attach(parts.zero()))
        parts.riders.write(Note(loss, 0.0, 0))
        self.backward(loss)
        parts.root.zero_grad(set_to_none=True)

    def micro(self, cut: Cut, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last or self._wrapper is None else self._wrapper.no_sync()

    def backward(self, loss: Tensor) -> None:
        self._run_backward(loss)
        if self._wrapper:
            _add_unused(self._wrapper)

    def reduce(self) -> Number:
        """Return the gradient's norm: DDP summed gradients and riders in the last backward."""
        return self.norm()


def _add_unused(wrapper: DistributedDataParallel) -> None:
    """Add a zero gradient for each parameter that this rank's pass didn't use.

    DDP reduces a bucket only once each of its parameters has a gradient. Only this rank knows which of its parameters
    were unused, and the other ranks wait for its buckets.
    """
    try:
        wrapper._check_reducer_finalized()
    except RuntimeError as error:
        if (listed := re.search(r"indices which did not receive grad for rank \d+:([\d ]+)", str(error))) is None:
            raise
        reduced = [p for p in wrapper._module_parameters if p.requires_grad]
        unused = [reduced[int(index)] for index in listed[1].split()]
        torch.autograd.backward(unused, [torch.zeros_like(p) for p in unused])
