"""torch's DistributedDataParallel behind the protocol; without the wrapper on a world of one."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from isobatch.scaling.geometry import Cut
from isobatch.trainers.engines.base import Base
from isobatch.trainers.engines.engine import Parts
from isobatch.trainers.engines.step_report import Note
from isobatch.trainers.model.targets import check_call


class DDP(Base):
    """The engine ``ddp``. Gradients are sums over ranks divided by the planned units, whatever DDP averages.

    Args:
        config: keywords of DistributedDataParallel.
    """

    def __init__(self, parts: Parts, config: dict[str, Any]) -> None:
        super().__init__(parts)
        self.mean_over = parts.world.size
        check_call("engine.config", "DistributedDataParallel", DistributedDataParallel, (self._root,), config)
        if parts.world.size > 1:
            self._ride()
            ours = {"gradient_as_bucket_view": True}
            if not self._shares_buffers and "broadcast_buffers" not in config:
                ours["forward_sync_buffers"] = False
            self._wrapped = self._wrap(self._root, {**ours, **config})
            self._shares_buffers = False
        self._begin(parts.make_optimizer())
        if self.rides:
            self._settle_buckets()

    def _wrap(self, root: nn.Module, config: dict[str, Any]) -> nn.Module:
        return DistributedDataParallel(root, **config)

    def _settle_buckets(self) -> None:
        """Let DDP arrange its buckets, as it does after its first backward; sums over ranks are rounded by buckets.

        Else the first step of a run that goes on would be rounded otherwise than that of one that was never stopped.
        """
        loss, units = self.loss(None, 0)
        self.backward(loss, Note(loss, units, 0))
        self._root.zero_grad(set_to_none=True)

    def micro(self, cut: Cut, last: bool) -> AbstractContextManager[Any]:
        if last or self._wrapped is self._root:
            return nullcontext()
        assert isinstance(self._wrapped, DistributedDataParallel)
        return self._wrapped.no_sync()

    def backward(self, loss: Tensor, note: Note, measured: int | None = None) -> None:
        super().backward(loss, note, measured)
        if self._wrapped is not self._root:
            self._add_unused()

    def _add_unused(self) -> None:
        """Add a zero gradient for each parameter that this rank's pass didn't use.

        DDP reduces a bucket once each of its parameters has a gradient, and leaves the rest as they are. Which
        parameters have none, only this rank knows; the other ranks wait for its buckets.
        """
        assert isinstance(self._wrapped, DistributedDataParallel)
        try:
            self._wrapped._check_reducer_finalized()
        except RuntimeError as error:
            if (listed := re.search(r"indices which did not receive grad for rank \d+:([\d ]+)", str(error))) is None:
                raise
            reduced = [p for p in self._wrapped._module_parameters if p.requires_grad]
            unused = [reduced[int(index)] for index in listed[1].split()]
            torch.autograd.backward(unused, [torch.zeros_like(p) for p in unused])
