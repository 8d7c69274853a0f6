"""DeepSpeed's ZeRO behind the protocol: stage 1 parts the optimizer's state, 2 the gradients, 3 the parameters, too.

DeepSpeed steps flat tensors (zero.py), of which each rank has a part. Its gradient is scaled and clipped
where it lies before DeepSpeed's own step, which is told of neither.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from isobatch.scaling.errors import UserError
from isobatch.scaling.geometry import Cut
from isobatch.trainers.engines.base import Base
from isobatch.trainers.engines.deepspeed.setup import import_deepspeed, refuse_settings, settings_of
from isobatch.trainers.engines.deepspeed.zero import PartsAverage, Unflattened, flats_of, span_of
from isobatch.trainers.engines.deepspeed.zero_order import InOrder
from isobatch.trainers.engines.engine import Found, Parts
from isobatch.trainers.engines.gradients import gradient_of, multiply, norm_of, number
from isobatch.trainers.engines.step_report import Number, Total
from isobatch.trainers.model.average import Average
from isobatch.trainers.model.build import place_buffers
from isobatch.trainers.optim.make import Tuned
from isobatch.trainers.optim.state_io import restore_optimizer
from isobatch.trainers.ranks.trails import BACKWARD, Trail
from isobatch.trainers.tensors.sharding import Part
from isobatch.trainers.tensors.slices import Reader

if TYPE_CHECKING:
    import isobatch.conf.groups


class Replicated(Base):
    """The engine ``deepspeed`` at stage 0: gradients are means over ranks, all else is whole on each."""

    def __init__(self, parts: Parts, config: isobatch.conf.groups.DeepSpeed) -> None:
        self._deepspeed = import_deepspeed(parts.world.device)
        parts.world.connect()
        self._settings = settings_of(config)
        refuse_settings(self._settings)
        super().__init__(parts)
        self._settings["zero_optimization"].setdefault("reduce_bucket_size", bucket_size(self.model))
        self.mean_over = parts.world.size
        tuned = parts.make_optimizer()
        refuse_untrainable(self.model, tuned, config.stage)
        self._wrap(tuned)

    def _place(self, model: nn.Module) -> None:
        if self._settings["zero_optimization"]["stage"] < 3:
            super()._place(model)
        else:  # the parameters follow one by one, as they are parted
            place_buffers(model, self._device)
        for parameter in model.parameters():  # DeepSpeed takes no others
            parameter.data = parameter.data.contiguous()

    def _wrap(self, tuned: Tuned) -> None:
        self._ride()
        self._initialise(tuned)
        self._begin(tuned)

    def _initialise(self, tuned: Tuned) -> None:
        os.environ.setdefault("LOCAL_RANK", str(self._world.local_rank))  # it asks for it there
        scalars = [parameter for parameter in self.model.parameters() if parameter.ndim == 0]
        for parameter in scalars:  # it can't share them
            self._world.share(parameter.data)
            parameter.ds_optim_param = True  # type: ignore[attr-defined]
        try:
            self._engine, *_ = self._deepspeed.initialize(
                model=self._root, optimizer=tuned.optimizer, config=self._settings, dist_init_required=False
            )
        finally:
            for parameter in scalars:
                del parameter.ds_optim_param  # type: ignore[attr-defined]
        self._world.wait_patiently(self._engine.data_parallel_group)  # a group of its own
        self._wrapped = self._engine

    def micro(self, cut: Cut, last: bool) -> AbstractContextManager[Any]:
        self._engine.set_gradient_accumulation_boundary(last)
        return super().micro(cut, last)

    def _backward(self, loss: Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)

    def call(self, work: Callable[[], Found]) -> Found:
        found = list[Found]()
        self._wrapped(lambda: found.append(work()))  # DeepSpeed would look into what a forward gives
        return found[0]

    def _step(self, factor: Number) -> None:
        multiply(self._gradients(), factor)
        kept = self._statistics.sums.grad if self._statistics else None
        self._engine.step()
        if self._statistics:
            self._statistics.sums.grad = kept  # DeepSpeed clears all gradients of the module


class ZeRO(Replicated):
    """The engine ``deepspeed`` from stage 1 on."""

    lockstep = True

    def __init__(self, parts: Parts, config: isobatch.conf.groups.DeepSpeed) -> None:
        self._stage, self._offload = config.stage, config.offload
        self.for_all_ranks = "engine.stage=2 or engine=ddp" if config.stage == 3 else ""
        self._norm_found: Tensor | None = None
        self._told, self._late = 0.0, False
        super().__init__(parts, config)

    def _wrap(self, tuned: Tuned) -> None:
        groups = [group["params"] for group in tuned.optimizer.param_groups]
        if self._stage == 3:
            os.environ.setdefault("LOCAL_RANK", str(self._world.local_rank))
            self._deepspeed.zero.Init(module=self.model, config_dict_or_path=self._settings)
        self._initialise(tuned)
        self._zero = self._engine.optimizer
        self._tell_norm()
        if self._world.size > 1:
            InOrder(self._zero, self._stage, self.model.parameters())
        if self._lockstep:
            self._record(self._lockstep.trail)
        self._flats = flats_of(self._zero, self._stage)
        self._unflattened = Unflattened(tuned.optimizer, groups, self._flats)
        with self._unflattened.seen():
            self._begin(tuned)

    def _record(self, trail: Trail) -> None:
        """Record the modules for which stage 3 gathers weights: its messages follow from their order."""
        coordinator = self._zero.parameter_offload.get_param_coordinator()
        fetch, names = coordinator.fetch_sub_module, {one: name for name, one in self.model.named_modules()}

        def fetched(module: nn.Module, forward: bool) -> None:
            name = names.get(module) or "the model"
            trail.ran(name if forward else name + BACKWARD)
            fetch(module, forward)

        coordinator.fetch_sub_module = fetched

    def call(self, work: Callable[[], Found]) -> Found:
        with self._lockstep.evaluating() if self._lockstep else nullcontext():
            return super().call(work)

    def _tell_norm(self) -> None:
        """Where DeepSpeed would find the norm, and send it, once more, it is told whether that is finite."""
        if self._stage == 3:
            self._zero._get_norm_groups = lambda: [self._told]
        else:
            self._zero.scaled_global_norm = lambda: self._told

    def _averaged(self) -> Average:
        return PartsAverage(self._trained(), self._refresh)

    def _trained(self) -> dict[str, Any]:
        names = super()._trained()
        return {name: part for name, part in self._parts().items() if name in names}

    def micro(self, cut: Cut, last: bool) -> AbstractContextManager[Any]:
        """Where the gradient goes to the host, DeepSpeed is told of a step's end after its last pass.

        Told before, it would bring there only the gradients of what that pass uses.
        """
        self._late = self._offload and self._stage > 1 and cut.accumulation > 1
        return super().micro(cut, last and not self._late)

    def total(self, expected_units: int) -> Total:
        """One message: the notes, the statistics, and the norm of the gradient."""
        if self._late:
            self._engine.set_gradient_accumulation_boundary(True)
            self._zero.finalize_gradient_accumulation_boundary()
        if self._offload and self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)  # the gradient is on its way to the host
        self._norm_found = self._all_summed(norm_of(self._gradients()).to(self._device).square()).sqrt()
        return self._carrier.take(1, expected_units)

    def _norm(self) -> Number:
        found, self._norm_found = self._norm_found, None
        assert found is not None, "no total since the last update"
        return number(found)

    def _gradients(self) -> list[Tensor]:
        if self._offload:
            return [gradient_of(flat.master) for flat in self._flats]
        if self._stage == 3:
            return [self._zero.grad_partitions_flat_buffer]
        return [gradient for group in self._zero.averaged_gradients.values() for gradient in group]

    def _step(self, factor: Number) -> None:
        super()._step(factor)
        self._clear()

    def _drop(self) -> None:
        self._told = math.inf  # so it drops the gradient itself, wherever it keeps some of it
        self._engine.step()
        self._told = 0.0
        self._clear()

    def _clear(self) -> None:
        """Zero what is kept for the next gradient: where a parameter isn't in all passes, this one would be in it."""
        kept = self._gradients() if self._offload else []
        if self._stage == 3:
            kept.append(self._zero.grad_partitions_flat_buffer)
        elif self._offload:
            kept.extend(self._zero.accumulated_grads_in_cpu.values())
        if kept:
            torch._foreach_zero_(kept)

    def _always(self) -> dict[str, Any]:
        return super()._always() | {f"model/{name}": part for name, part in self._parts().items()}

    def _parts(self) -> dict[str, Part | Tensor]:
        """Of each parameter what this rank holds; whole where DeepSpeed leaves it so."""
        trained = {p: span.of(flat.master) for flat in self._flats for p, span in flat.spans.items()}
        return {name: trained.get(p) or self._frozen(p) for name, p in self.model.named_parameters()}

    def _frozen(self, parameter: Any) -> Part | Tensor:
        return span_of(parameter).of(parameter.ds_tensor) if self._stage == 3 else parameter.detach()

    def _optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        with self._unflattened.seen():
            return super()._optimizer_state()

    def restore(self, reader: Reader) -> None:
        super().restore(reader)
        self._refresh()

    def _restore_optimizer(self, reader: Reader) -> None:
        with self._unflattened.restored():
            restore_optimizer(self._tuned.optimizer, self._by_parameter(), reader, self._unflattened.read)

    def _refresh(self) -> None:
        if self._stage < 3:
            self._zero.update_lp_params()
            return
        self._zero.checkpoint_event_prologue()  # what was gathered is forgotten
        for index in range(len(self._flats)):
            self._zero._reassign_or_swap_out_partitioned_parameters(index)


def bucket_size(model: nn.Module) -> int:
    """Elements of the buffer in which gradients are reduced: DeepSpeed's own number, 2 GB, or as many as there are."""
    return min(500_000_000, sum(parameter.numel() for parameter in model.parameters()))


def refuse_untrainable(model: nn.Module, tuned: Tuned, stage: int) -> None:
    """Raises UserError for a model or an optimizer that DeepSpeed can't take."""
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise UserError(f"{name} is {parameter.dtype}; DeepSpeed steps in torch.float32: use engine=ddp or fsdp")
        if stage == 3 and parameter.ndim == 0:
            raise UserError(f"{name} has no dimensions, by which stage 3 could part it: engine.stage=2, or engine=fsdp")
        if stage == 3 and parameter.numel() == 0:
            raise UserError(
                f"{name} has no elements, and stage 3 takes no such parameter: engine.stage=2, or engine=ddp"
            )
    if stage and any(not any(p.requires_grad for p in group["params"]) for group in tuned.optimizer.param_groups):
        raise UserError("the optimizer has a group without a trained parameter, which DeepSpeed doesn't take")
    if stage and tuned.optimizer.state:
        who = type(tuned.optimizer).__name__
        raise UserError(f"the optimizer {who} keeps state from the start, and DeepSpeed makes it anew: use engine=ddp")
