"""Reduce gradients by torch's DistributedDataParallel; without it on a world of one."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from isobatch.scaling.geometry import Cut
from isobatch.trainers.engines.gradients import Gradients
from isobatch.trainers.engines.reducer import OwnStorage, Parts, Reducer
from isobatch.trainers.engines.root import Found, explain
from isobatch.trainers.engines.step_report import Note
from isobatch.trainers.model.batchnorm import settled
from isobatch.trainers.model.targets import check_call

if TYPE_CHECKING:
    from isobatch.conf.schema import RunConfig


def make_reducer(parts: Parts, config: RunConfig) -> Reducer:
    """Return the reducer of the engine ``ddp``."""
    return DDP(parts, config.engine.config)


class DDP:
    """Gradients are means over ranks.

    Args:
        keywords: of DistributedDataParallel.
        wrap: makes DistributedDataParallel of a module, with keywords.
        run_backward: of a loss.
    """

    lockstep, trails = False, None
    explain = staticmethod(explain)

    def __init__(
        self,
        parts: Parts,
        keywords: dict[str, Any],
        wrap: Callable[..., nn.Module] = DistributedDataParallel,
        run_backward: Callable[[Tensor], Any] = Tensor.backward,
    ) -> None:
        root, world = parts.root, parts.world
        parts.model.to(world.device)
        self._run_backward = run_backward
        self._wrapper: DistributedDataParallel | None = None
        self.mean_over, self.shares_buffers = world.size, settled(parts.model)
        check_call("engine.config", "DistributedDataParallel", DistributedDataParallel, (root,), keywords)
        if world.size > 1:
            parts.riders.ride_in(root, world.size)
            ours = {"gradient_as_bucket_view": True}
            if self.shares_buffers and "broadcast_buffers" not in keywords:
                ours["forward_sync_buffers"] = False
            wrapper = wrap(root, **{**ours, **keywords})
            assert isinstance(wrapper, DistributedDataParallel)
            self._wrapper, self.shares_buffers = wrapper, True
        self.forward = self._wrapper or root
        self.tuned, self.storage = parts.make_optimizer(), OwnStorage(parts.model)
        gradients = Gradients(self.tuned.optimizer)
        self.observed, self.reduce = gradients.parameters, gradients.norm
        self.step, self.drop = gradients.step, gradients.drop
        if self._wrapper:
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

    def call(self, work: Callable[[], Found]) -> Found:
        return work()  # without the wrapper, which would send messages

    def backward(self, loss: Tensor) -> None:
        self._run_backward(loss)
        if self._wrapper:
            _add_unused(self._wrapper)


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
