"""Reduce gradients by ZeRO: stage 1 parts the optimizer's state, 2 the gradients, 3 the parameters, too.

DeepSpeed steps flat tensors (flat.py), of which each rank has a part. Its gradient is scaled and clipped where it lies
before DeepSpeed's own step, which is told of neither.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from isobatch.scaling.geometry import Cut
from isobatch.trainers.engines.deepspeed.flat import Flat, Unflattened, flats_of, span_of
from isobatch.trainers.engines.deepspeed.replicated import Wrapper
from isobatch.trainers.engines.deepspeed.zero_order import InOrder
from isobatch.trainers.engines.gradients import gradient_of, multiply, norm_of, number
from isobatch.trainers.engines.lockstep import Lockstep
from isobatch.trainers.engines.reducer import Parts, Read
from isobatch.trainers.engines.root import explain
from isobatch.trainers.engines.step_report import Number
from isobatch.trainers.model.batchnorm import settled
from isobatch.trainers.ranks.trails import BACKWARD, Trail
from isobatch.trainers.tensors.sharding import Part

if TYPE_CHECKING:
    import isobatch.conf.groups


class ZeRO:
    """Stages 1 to 3: gradients are means over ranks, in parts."""

    lockstep = True
    explain = staticmethod(explain)

    def __init__(self, parts: Parts, wrapper: Wrapper, config: isobatch.conf.groups.DeepSpeed) -> None:
        self.tuned, self._stage, self._offload = wrapper.tuned, config.stage, config.offload
        self.mean_over, self.shares_buffers = parts.world.size, settled(parts.model)
        self._riders, self._device = parts.riders, parts.world.device
        self._told, self._late = 0.0, False
        self.observed = [parameter for group in wrapper.groups for parameter in group]
        self._engine, self._zero = wrapper.engine, wrapper.engine.optimizer
        self.forward, self.call, self.backward = wrapper.engine, wrapper.call, wrapper.backward
        self._tell_norm()
        if parts.world.size > 1:
            InOrder(self._zero, self._stage, parts.model.parameters())
        recorded = parts.world.size > 1 and self._stage == 3
        self.trails = Lockstep(parts.world, "engine.stage=2 or engine=ddp") if recorded else None
        if self.trails:
            record(self._zero, parts.model, self.trails.trail)
        self._flats = flats_of(self._zero, self._stage)
        flattened = Unflattened(self.tuned.optimizer, wrapper.groups, self._flats)
        self.storage = FlatStorage(parts.model, self._zero, self._stage, self._flats, flattened)

    def _tell_norm(self) -> None:
        """Where DeepSpeed would find the norm, and send it, once more, it is told whether that is finite."""
        if self._stage == 3:
            self._zero._get_norm_groups = lambda: [self._told]
        else:
            self._zero.scaled_global_norm = lambda: self._told

    def micro(self, cut: Cut, last: bool) -> AbstractContextManager[Any]:
        """Where the gradient goes to the host, DeepSpeed is told of a step's end after its last pass.

        Told before, it would bring there only the gradients of what that pass uses.
        """
        self._late = self._offload and self._stage > 1 and cut.accumulation > 1
        self._engine.set_gradient_accumulation_boundary(last and not self._late)
        return self.trails.trail.begin("training") if self.trails else nullcontext()

    def reduce(self) -> Number:
        """One message: the notes, the statistics, and the norm of the gradient."""
        if self._late:
            self._engine.set_gradient_accumulation_boundary(True)
            self._zero.finalize_gradient_accumulation_boundary()
        if self._offload and self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)  # the gradient is on its way to the host
        square = norm_of(self._gradients()).to(self._device).square()
        return number(self._riders.total(square, *(self.trails.ride() if self.trails else ())).sqrt())

    def step(self, factor: Number) -> None:
        multiply(self._gradients(), factor)
        self._engine.step()
        self._clear()

    def drop(self) -> None:
        self._told = math.inf  # so it drops the gradient itself, wherever it keeps some of it
        self._engine.step()
        self._told = 0.0
        self._clear()

    def _gradients(self) -> list[Tensor]:
        if self._offload:
            return [gradient_of(flat.master) for flat in self._flats]
        if self._stage == 3:
            return [self._zero.grad_partitions_flat_buffer]
        return [gradient for group in self._zero.averaged_gradients.values() for gradient in group]

    def _clear(self) -> None:
        """Zero what is kept for the next gradient: where a parameter isn't in all passes, this one would be in it."""
        kept = self._gradients() if self._offload else []
        if self._stage == 3:
            kept.append(self._zero.grad_partitions_flat_buffer)
        elif self._offload:
            kept.extend(self._zero.accumulated_grads_in_cpu.values())
        if kept:
            torch._foreach_zero_(kept)


class FlatStorage:
    """What is trained is kept in flat tensors.

    Args:
        zero: DeepSpeed's optimizer.
    """

    def __init__(self, model: nn.Module, zero: Any, stage: int, flats: list[Flat], optimizer: Unflattened) -> None:
        self._model, self._zero, self._stage, self._flats = model, zero, stage, flats
        self._optimizer = optimizer

    def parts(self) -> Mapping[str, Tensor | Part]:
        trained = {p: span.of(flat.master) for flat in self._flats for p, span in flat.spans.items()}
        return {name: trained.get(p) or self._frozen(p) for name, p in self._model.named_parameters()}

    def _frozen(self, parameter: Any) -> Part | Tensor:
        return span_of(parameter).of(parameter.ds_tensor) if self._stage == 3 else parameter.detach()

    def optimizer_seen(self) -> AbstractContextManager[None]:
        return self._optimizer.seen()

    @contextmanager
    def restoring(self) -> Iterator[Read]:
        with self._optimizer.restored():
            yield self._optimizer.read
        self.refresh()

    def refresh(self) -> None:
        if self._stage < 3:
            self._zero.update_lp_params()
            return
        self._zero.checkpoint_event_prologue()  # what was gathered is forgotten
        for index in range(len(self._flats)):
            self._zero._reassign_or_swap_out_partitioned_parameters(index)


def record(zero: Any, model: nn.Module, trail: Trail) -> None:
    """Record the modules for which stage 3 gathers weights: its messages follow from their order."""
    coordinator = zero.parameter_offload.get_param_coordinator()
    fetch, names = coordinator.fetch_sub_module, {one: name for name, one in model.named_modules()}

    def fetched(module: nn.Module, forward: bool) -> None:
        name = names.get(module) or "the model"
        trail.ran(name if forward else name + BACKWARD)
        fetch(module, forward)

    coordinator.fetch_sub_module = fetched
