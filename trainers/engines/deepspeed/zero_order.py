"""The order in which ZeRO reduces gradients: one for all ranks, whatever part of the model each of them used."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class InOrder:
    """Hand gradients to DeepSpeed's buckets in the reverse order of the model's parameters.

    DeepSpeed puts a gradient into a bucket when it comes, and adds up the buckets of all ranks. Where ranks use
    different parameters, that adds gradients of different parameters. Here a gradient waits for those before it, and
    after a rank's backward each parameter that it didn't use gets a zero gradient.

    Args:
        zero: DeepSpeed's optimizer of stage 1, 2 or 3.
        parameters: of the model, in the same order on all ranks.
    """

    def __init__(self, zero: Any, stage: int, parameters: Iterable[Tensor]) -> None:
        self._zero, self._always = zero, stage > 1  # stage 1 adds up on each rank until a step's last pass
        groups = zero.fp16_groups if stage == 3 else zero.bit16_groups
        more = {p: () if stage == 3 else (index,) for index, group in enumerate(groups) for p in group}
        self._order = [(p, more[p]) for p in reversed(list(parameters)) if p in more and p.requires_grad]
        self._came, self._handed = set[Tensor](), 0
        self._hand, self._reduce = (
            zero.reduce_ready_partitions_and_remove_grads,
            zero.overlapping_partition_gradients_reduce_epilogue,
        )
        zero.reduce_ready_partitions_and_remove_grads = self._take
        zero.overlapping_partition_gradients_reduce_epilogue = self._finish

    def _take(self, parameter: Tensor, *_: int) -> None:
        """Hand over the gradient of ``parameter``, and those that waited for it, once its turn has come."""
        if not self._always and not self._zero.is_gradient_accumulation_boundary():
            return
        self._came.add(parameter)
        while self._handed < len(self._order) and self._order[self._handed][0] in self._came:
            self._hand_next()

    def _hand_next(self) -> None:
        parameter, more = self._order[self._handed]
        self._handed += 1
        self._hand(parameter, *more)

    def _finish(self) -> None:
        """Hand over what is left of a pass, and reduce it."""
        while self._handed < len(self._order):
            parameter = self._order[self._handed][0]
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
                if parameter.grad.shape != (whole := getattr(parameter, "ds_shape", parameter.shape)):
                    parameter.grad.data = parameter.new_zeros(whole)  # stage 3 has parted the parameter itself
            self._hand_next()
        self._came.clear()
        self._handed = 0
        self._reduce()
