"""Reduce gradients with ZeRO: stage 1 shards the optimizer's state, 2 also the gradients, 3 also the parameters.

DeepSpeed steps flat tensors (flat.py), of which each rank has a part. The gradient is scaled and clipped in place
before DeepSpeed's own step, which does neither.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from isobatch.conf import engines
from isobatch.scaling.geometry import Cut
from isobatch.trainers.engines.deepspeed.flat import FlatStorage
from isobatch.trainers.engines.deepspeed.stage0 import DeepSpeed
from isobatch.trainers.engines.lockstep import Lockstep
from isobatch.trainers.engines.reducer import Owner, Parts, multiply, norm_of, number
from isobatch.trainers.engines.step_report import Number
from isobatch.trainers.ranks.internals import foreach_zero_
from isobatch.trainers.ranks.trails import BACKWARD, Trail


class ZeRO(DeepSpeed):
    """Average gradients over ranks and shard them (stages 1 to 3)."""

    lockstep = True

    def __init__(self, parts: Parts, config: engines.DeepSpeed) -> None:
        super().__init__(parts, config)
        self._stage, self._offload = config.stage, config.offload
        self._world, self._device, self._zero = parts.world, parts.world.device, self._engine.optimizer
        self._late = False
        # DeepSpeed would compute and send the norm once more, only to check whether it is finite.
        self._norm_for_deepspeed = 0.0
        if self._stage == 3:
            self._zero._get_norm_groups = lambda: [self._norm_for_deepspeed]
        else:
            self._zero.scaled_global_norm = lambda: self._norm_for_deepspeed
        if parts.world.size > 1:
            InOrder(self._zero, self._stage, parts.model.parameters())
            if self._stage == 3:
                self.trails = Lockstep(parts.world, "engine.stage=2 or engine=ddp")
                record(self._zero, parts.model, self.trails.trail)
        self.storage = storage = FlatStorage(parts.model, self._zero, self._stage, self.tuned.optimizer, self._groups)
        self._flats = storage.flats

    def micro(self, cut: Cut, last: bool) -> AbstractContextManager[Any]:
        # If DeepSpeed knew the last pass before it ran, it would offload only the gradients of parameters that this
        # pass uses. So with offload it is told after the last pass, in reduce().
        self._late = self._offload and self._stage > 1 and cut.accumulation > 1
        self._engine.set_gradient_accumulation_boundary(last and not self._late)
        return self.trails.trail.begin("training") if self.trails else nullcontext()

    def reduce(self) -> Number:
        """Sum the notes, the statistics and the squared norm of the gradient in one message."""
        if self._late:
            self._engine.set_gradient_accumulation_boundary(True)
            self._zero.finalize_gradient_accumulation_boundary()
        if self._offload and self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)  # the gradient is on its way to the host
        square = norm_of(self.gradients()).to(self._device).square()
        return number(self._riders.total(square, *(self.trails.ride() if self.trails else ())).sqrt())

    def norm(self) -> Number:
        squares = torch.stack([norm_of([gradient]).square() for gradient in self.gradients()])
        return number(self.total_of(squares[None])[0].sqrt())

    def states(self) -> list[Owner]:
        optimizer, owners = self.tuned.optimizer, list[Owner]()
        one_each = self._offload or self._stage == 3
        pieces = [[each] for each in self.gradients()] if one_each else self._zero.averaged_gradients.values()
        for flat, gradients in zip(self._flats, pieces, strict=True):
            state, start = optimizer.state.get(flat.master, {}), 0
            elements = sum(span.size for span in flat.spans.values())
            for size in (gradient.numel() for gradient in gradients):
                own = {key: _narrowed(value, start, size) for key, value in state.items()}
                owners.append(Owner(optimizer.param_groups[flat.group], own, elements))
                start, elements = start + size, 0  # all elements count for the first part
        return owners

    def total_of(self, parts: Tensor) -> Tensor:
        return self._world.sum(parts.sum(1).to(self._device))

    def step(self, factor: Number) -> None:
        multiply(self.gradients(), factor)
        self._engine.step()
        self._clear()

    def drop(self) -> None:
        self._norm_for_deepspeed = math.inf  # so that DeepSpeed drops all copies of the gradient itself
        self._engine.step()
        self._norm_for_deepspeed = 0.0
        self._clear()

    def gradients(self) -> list[Tensor]:
        if self._offload:
            return [flat.master.grad for flat in self._flats]
        if self._stage == 3:
            return list(self._zero.grad_partitions_flat_buffer.split([flat.master.numel() for flat in self._flats]))
        return [gradient for group in self._zero.averaged_gradients.values() for gradient in group]

    def _clear(self) -> None:
        """Zero the gradient buffers: else a parameter that the next pass doesn't use would keep this gradient."""
        kept = self.gradients() if self._offload else []
        if self._stage == 3:
            kept.append(self._zero.grad_partitions_flat_buffer)
        elif self._offload:
            kept.extend(self._zero.accumulated_grads_in_cpu.values())
        if kept:
            foreach_zero_(kept)


def _narrowed(value: Any, start: int, size: int) -> Any:
    """Return ``size`` elements of a flat tensor; anything else, such as a count of steps, as it is."""
    return value[start : start + size] if isinstance(value, Tensor) and value.ndim else value


def record(zero: Any, model: nn.Module, trail: Trail) -> None:
    """Record the modules for which stage 3 gathers weights, since their order decides its messages."""
    coordinator = zero.parameter_offload.get_param_coordinator()
    fetch, names = coordinator.fetch_sub_module, {one: name for name, one in model.named_modules()}

    def fetched(module: nn.Module, forward: bool) -> None:
        name = names.get(module) or "the model"
        trail.ran(name if forward else name + BACKWARD)
        fetch(module, forward)

    coordinator.fetch_sub_module = fetched


class InOrder:
    """Pass gradients to DeepSpeed's buckets in the reverse order of the model's parameters.

    DeepSpeed puts gradients into buckets as they are computed, and sums the buckets over ranks. If ranks use different
    parameters, that adds gradients of different parameters. This class holds a gradient back until its predecessors
    have been passed on. After a rank's backward, each unused parameter gets a zero gradient.

    Args:
        zero: DeepSpeed's optimizer of stage 1, 2 or 3.
        parameters: the model's parameters, in the same order on all ranks.
    """

    def __init__(self, zero: Any, stage: int, parameters: Iterable[Tensor]) -> None:
        self._zero, self._always = zero, stage > 1  # stage 1 reduces only in a step's last pass
        groups = zero.fp16_groups if stage == 3 else zero.bit16_groups
        more = {p: () if stage == 3 else (index,) for index, group in enumerate(groups) for p in group}
        self._order = [(p, more[p]) for p in reversed(list(parameters)) if p in more and p.requires_grad]
        self._ready, self._passed = set[Tensor](), 0
        self._pass_on = zero.reduce_ready_partitions_and_remove_grads
        self._reduce = zero.overlapping_partition_gradients_reduce_epilogue
        zero.reduce_ready_partitions_and_remove_grads = self._take
        zero.overlapping_partition_gradients_reduce_epilogue = self._finish

    def _take(self, parameter: Tensor, *_: int) -> None:
        """Mark the gradient of ``parameter`` as ready, and pass on all gradients whose turn has come."""
        if not self._always and not self._zero.is_gradient_accumulation_boundary():
            return
        self._ready.add(parameter)
        while self._passed < len(self._order) and self._order[self._passed][0] in self._ready:
            self._pass_on_next()

    def _pass_on_next(self) -> None:
        parameter, more = self._order[self._passed]
        self._passed += 1
        self._pass_on(parameter, *more)

    def _finish(self) -> None:
        """Pass on the remaining gradients of a pass, and reduce them."""
        while self._passed < len(self._order):
            parameter = self._order[self._passed][0]
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
                if parameter.grad.shape != (whole := getattr(parameter, "ds_shape", parameter.shape)):
                    parameter.grad.data = parameter.new_zeros(whole)  # stage 3 has sharded the parameter
            self._pass_on_next()
        self._ready.clear()
        self._passed = 0
        self._reduce()
