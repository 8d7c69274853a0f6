"""torch's DistributedDataParallel behind the protocol; without the wrapper on a world of one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from scaling.rules import Recipe
from trainers.average import Average
from trainers.batchnorm import settled, statistics_of
from trainers.checkpoints.slices import Reader, Slice
from trainers.engines import Update
from trainers.locate import check_call
from trainers.model import distinct
from trainers.noise import GradientSquares
from trainers.optim import Tuned
from trainers.optim.stored import restore_optimizer, stored_optimizer
from trainers.precision import LossScale, autocast, widened
from trainers.rundir import Fatal, Refused
from trainers.tally import Note, NoteCarrier, Number, Total
from trainers.tasks import Task
from trainers.world import World


class LossModule(nn.Module):
    """A module whose forward is the task's loss: so a task may call its model twice, or only a part of it."""

    def __init__(self, task: Task, model: nn.Module, device: torch.device, precision: str) -> None:
        super().__init__()
        self.model = model
        self.carrier = NoteCarrier(device)
        self.statistics = statistics_of(model, device)
        self.task, self._device, self._precision = task, device, precision

    def forward(self, batch: Any | None) -> tuple[Tensor, float | Tensor]:
        if self.statistics:
            self.statistics.begin()
        with autocast(self._precision, self._device):
            loss, units = self._stand_in() if batch is None else checked(self.task.loss(self.model, batch))
        return self.carrier.attach(self.statistics.attach(loss) if self.statistics else loss), units

    def _stand_in(self) -> tuple[Tensor, float]:
        """A zero that gives every parameter a zero gradient, without data and without touching statistics."""
        parts = [p.reshape(-1)[:0].sum() for p in self.model.parameters() if p.requires_grad]
        return torch.stack([part.float() for part in parts]).sum(), 0.0


def checked(result: Any) -> tuple[Tensor, float | Tensor]:
    """What a task's loss returned, if it is (sum, units). Raises Refused if not."""
    wanted = "task.loss has to return (sum of the losses over units, number of units)"
    if not isinstance(result, tuple) or len(result) != 2:
        raise Refused(f"{wanted}; it returned {_shown(result)}")
    loss, units = result
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise Refused(f"{wanted}; its sum is {_shown(loss)}, not a scalar tensor with a gradient")
    loss = widened(loss.reshape(()))
    if isinstance(units, Tensor) and units.numel() == 1:
        if units.device.type != "cpu":  # a look would wait for the device; the step's total is looked at later
            return loss, units.detach().reshape(())
        units = units.item()
    if isinstance(units, Real) and not isinstance(units, bool) and 0 <= float(units) < math.inf:
        return loss, float(units)
    raise Refused(f"{wanted}; its number of units is {_shown(units)}, not a number of 0 or more")


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}{'' if value.requires_grad else ' without a gradient'}"
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return (
        f"{value!r:.60}, a {type(value).__name__}"
        if isinstance(value, Real | str | None)
        else f"a {type(value).__name__}"
    )


class DDP:
    """The engine ``ddp``. Gradients are sums over ranks divided by the planned units, whatever DDP averages."""

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        tuned: Tuned,
        average: Average | None,
        world: World,
        config: dict[str, Any],
        *,
        skip_nonfinite: bool,
        precision: str = "fp32",
    ) -> None:
        self.model, self.average = model, average
        self._tuned, self._world, self._ranks = tuned, world, world.size
        self._skip_nonfinite = skip_nonfinite
        self._loss_scale = LossScale() if precision == "fp16" else None
        self._buffers_before: dict[str, Tensor] = {}
        self._keep_buffers()
        self.layout()  # what can't be saved is refused now, and not when it would be lost
        self._stepped = False
        self._parameters = [p for group in tuned.optimizer.param_groups for p in group["params"]]
        self._squares = GradientSquares(self._parameters)
        self._bare = LossModule(task, model, world.device, precision)
        self._carrier = self._bare.carrier
        self._wrapped: nn.Module = self._bare
        check_call("engine.config", "DistributedDataParallel", DistributedDataParallel, (self._bare,), config)
        if world.size > 1:
            ours = {"gradient_as_bucket_view": True}
            if settled(model) and "broadcast_buffers" not in config:
                ours["forward_sync_buffers"] = False
            self._wrapped = DistributedDataParallel(self._bare, **{**ours, **config})
            self._settle_buckets()

    def _settle_buckets(self) -> None:
        """Let DDP arrange its buckets, as it does after its first backward; sums over ranks are rounded by buckets.

        Else the first step of a run that goes on would be rounded otherwise than that of one that was never stopped.
        """
        loss, units = self.loss(None)
        self.backward(loss, Note(loss, units, 0))
        self._bare.zero_grad(set_to_none=True)

    def micro(self, last: bool) -> AbstractContextManager[Any]:
        if last or self._wrapped is self._bare:
            return nullcontext()
        assert isinstance(self._wrapped, DistributedDataParallel)
        return self._wrapped.no_sync()

    def loss(self, batch: Any | None) -> tuple[Tensor, float | Tensor]:
        try:
            loss, units = self._wrapped(batch)
        except RuntimeError as error:
            if "find_unused_parameters" in str(error):
                raise Refused(
                    "some parameters have no part in the loss, so their gradient never comes: freeze them with "
                    "requires_grad=False, or give engine.config.find_unused_parameters=true"
                ) from error
            raise
        except ValueError as error:
            if "Expected more than 1 value per channel" in str(error):
                raise Refused(
                    "BatchNorm has no statistics of a single sample, which a micro-batch is here: use a larger "
                    "batch.per_gpu or batch.global_size, or batchnorm.mode=ghost batchnorm.ghost_size=N, which takes "
                    "them from N samples on any hardware"
                ) from error
            raise
        return loss, units

    def backward(self, loss: Tensor, note: Note, measured: int | None = None) -> None:
        self._carrier.write(note)
        with nullcontext() if measured is None else self._squares.of(measured):
            # DDP divides by the ranks; the product undoes it where it costs nothing.
            (loss * (self._ranks * self._factor)).backward()

    @property
    def _factor(self) -> float:
        return self._loss_scale.factor if self._loss_scale else 1.0

    def total(self, expected_units: int) -> Total:
        return self._carrier.take(self._ranks, expected_units)

    def update(self, scale: Number, clip_norm: float | None, recipe: Recipe) -> Update:
        for parameter in self._parameters:
            if parameter.grad is None:  # has no part in the loss: a zero, as it is where some rank has no samples
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in self._parameters]
        wide = torch.float64 if any(gradient.dtype == torch.float64 for gradient in gradients) else torch.float32
        total_norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, wide))).double()
        scale = scale / self._factor
        norm = _number(total_norm) * scale
        squares = self._squares.take(self._world.sum)
        if self._may_skip and not math.isfinite(norm):  # on an accelerator this look waits for it
            self._discard()
            return Update(norm, skipped=True)
        factor = scale
        if clip_norm is not None:
            limit = clip_norm / (norm + 1e-6)
            factor = scale * (limit.clamp(max=1.0) if isinstance(limit, Tensor) else min(limit, 1.0))
        if isinstance(factor, Tensor):
            torch._foreach_mul_(gradients, factor.float())
        elif factor != 1.0:
            torch._foreach_mul_(gradients, factor)
        self._tuned.tell(recipe)
        self._tuned.optimizer.step()
        self._tuned.optimizer.zero_grad(set_to_none=True)
        if self.average and recipe.ema is not None:
            self.average.update(recipe.ema)
        if self._bare.statistics:
            self._bare.statistics.update()
        if self._loss_scale:
            self._loss_scale.kept()
        self._keep_buffers()
        if not self._stepped:
            self._stepped = True
            self.values()  # likewise
        return Update(norm, parts_sq=None if squares is None else _number(squares) * (scale / self._ranks) ** 2)

    @property
    def _may_skip(self) -> bool:
        return self._skip_nonfinite or self._loss_scale is not None

    def _keep_buffers(self) -> None:
        if self._may_skip:
            self._buffers_before = {name: buffer.clone() for name, buffer in self.model.named_buffers()}

    def _discard(self) -> None:
        """Undo what the step did to the buffers, also where a module has made a new one.

        Raises:
            Fatal: no lower loss scale can help.
        """
        if self._loss_scale and not self._loss_scale.lower() and not self._skip_nonfinite:
            raise Fatal(
                f"loss or gradient isn't finite, and the loss scale of precision=fp16 is at its lowest, "
                f"{LossScale.LOWEST:g}: try precision=bf16, or a lower learning rate"
            )
        self._tuned.optimizer.zero_grad(set_to_none=True)
        if self._bare.statistics:
            self._bare.statistics.drop()
        for name, buffer in self.model.named_buffers():
            buffer.copy_(self._buffers_before[name])

    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self._always().items()}

    def slices(self) -> Iterator[Slice]:
        for buffer in self.model.buffers():
            self._world.share(buffer)  # rank 0's running statistics are those of the run
        return share_of({**self._always(), **self._optimizer_state()[0]}, self._world.rank, self._ranks)

    def values(self) -> dict[str, Any]:
        return self._optimizer_state()[1]

    def restore(self, reader: Reader) -> None:
        with torch.no_grad():
            for name, tensor in self._always().items():
                tensor.copy_(reader.whole(name))
        restore_optimizer(self._tuned.optimizer, self._names(), reader)
        self._keep_buffers()

    def _always(self) -> dict[str, Tensor]:
        found = {f"model/{name}": tensor for name, tensor in distinct(self.model).items()}
        scale = {"precision/loss_scale": self._loss_scale.state} if self._loss_scale else {}
        averages = self.average.tensors if self.average else {}
        return found | {f"ema/{name}": tensor for name, tensor in averages.items()} | scale

    def _names(self) -> dict[Tensor, str]:
        return {parameter: name for name, parameter in self.model.named_parameters()}

    def _optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return stored_optimizer(self._tuned.optimizer, self._names())


def _number(scalar: Tensor) -> Number:
    return scalar.item() if scalar.is_cpu else scalar


def share_of(tensors: Mapping[str, Tensor], rank: int, ranks: int) -> Iterator[Slice]:
    """A rank's part of tensors that all ranks have whole: laid end to end, they are parted equally, by bytes."""
    total, end = sum(tensor.nbytes for tensor in tensors.values()), 0
    first, last = (total * bound // ranks for bound in (rank, rank + 1))
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        # an element belongs to the rank in whose part its first byte lies
        start, stop = (
            min(tensor.numel(), max(0, -((begin - bound) // tensor.element_size()))) for bound in (first, last)
        )
        if start < stop or (tensor.numel() == 0 and rank == 0):
            yield Slice(name, tuple(tensor.shape), start, tensor.detach().reshape(-1)[start:stop])
