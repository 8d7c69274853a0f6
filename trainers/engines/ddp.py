"""Reduce gradients by torch's DistributedDataParallel; without it on a world of one."""

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
    """Gradients are means over ranks; ``wrap`` makes DistributedDataParallel of a module, with ``keywords``."""

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
        """Let DDP arrange its buckets, as it does after its first backward; sums over ranks are rounded by buckets.

        Else the first step of a run that resumes would be rounded otherwise than that of one that was never stopped.
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

    DDP reduces a bucket once each of its parameters has a gradient, and leaves the rest as they are. Which
    parameters have none, only this rank knows; the other ranks wait for its buckets.
    """
    try:
        wrapper._check_reducer_finalized()
    except RuntimeError as error:
        if (listed := re.search(r"indices which did not receive grad for rank \d+:([\d ]+)", str(error))) is None:
            raise
        reduced = [p for p in wrapper._module_parameters if p.requires_grad]
        unused = [reduced[int(index)] for index in listed[1].split()]
        torch.autograd.backward(unused, [torch.zeros_like(p) for p in unused])
