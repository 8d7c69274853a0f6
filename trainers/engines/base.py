"""What all engines do alike: the loss of a pass, what is made of a summed gradient, and what a checkpoint holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from isobatch.scaling.geometry import Cut
from isobatch.scaling.rules import Recipe
from isobatch.trainers.engines.engine import Found, Parts, Update
from isobatch.trainers.engines.gradients import clipped, multiply, norm_of, number
from isobatch.trainers.engines.lockstep import Lockstep
from isobatch.trainers.engines.noise import GradientSquares
from isobatch.trainers.engines.root import Explained, Root, checked, reworded
from isobatch.trainers.engines.step_report import Note, NoteCarrier, Number, Total
from isobatch.trainers.model.average import Average
from isobatch.trainers.model.batchnorm import settled, statistics_of
from isobatch.trainers.model.build import distinct
from isobatch.trainers.model.precision import LossScale, autocast
from isobatch.trainers.optim.eval_weights import eval_weights, has_modes
from isobatch.trainers.optim.make import Tuned
from isobatch.trainers.optim.state_io import restore_optimizer, stored_optimizer
from isobatch.trainers.ranks.failure import RunFailed
from isobatch.trainers.tensors.sharding import copied, fill, gathered, local, slices_of
from isobatch.trainers.tensors.slices import EVAL, Reader, Slice


class Base:
    """An engine without a reduction: what its subclasses add is how ranks bring their gradients together.

    A subclass's constructor wraps ``self._root``, and then calls ``_begin``.

    Attributes:
        rides: what ranks tell each other of a pass rides on its backward, as the gradient of parameters that are
            reduced with the model's.
        mean_over: by how many its reduction divides the sum over ranks.
        for_all_ranks: what to use where ranks run different modules, and this engine can't train that; empty: it
            can.
    """

    lockstep = False
    rides = False
    mean_over = 1
    for_all_ranks = ""

    def __init__(self, parts: Parts) -> None:
        self.model, self._task, self._world, self._precision = parts.model, parts.task, parts.world, parts.precision
        self._names = list(distinct(parts.model))  # what can't be saved is refused now, and not when it would be lost
        self._place(parts.model)
        self._carrier = NoteCarrier(self._device)
        wanted = parts.world.size > 1 and self.for_all_ranks
        self._lockstep = Lockstep(parts.world, self.for_all_ranks) if wanted else None
        self._statistics = statistics_of(parts.model, self._device)
        self._root = Root(parts.model)
        self._wrapped: nn.Module = self._root
        self._skip_nonfinite, self._ema = parts.skip_nonfinite, parts.ema
        self._loss_scale = LossScale() if parts.precision == "fp16" else None
        self._buffers_before: dict[str, Tensor] = {}
        self._held: list[Tensor] | None = None
        self._stepped, self._explained = False, Explained(self._reworded)
        # DDP's wrapper does so, for itself
        self._shares_buffers, self._begun = not settled(parts.model), False

    def _ride(self) -> None:
        """Let what ranks tell each other ride: it is then among the parameters of what is wrapped."""
        self.rides = True
        self._root.add_module("carrier", self._carrier)
        self._root.add_module("statistics", self._statistics)

    @property
    def _riders(self) -> list[nn.Parameter]:
        """Whose gradients are what ranks tell each other."""
        return [self._carrier.note, *([self._statistics.sums] if self._statistics else [])]

    def _begin(self, tuned: Tuned) -> None:
        """Take over the optimizer of the parameters that are trained."""
        self._tuned = tuned
        self._parameters = [p for group in tuned.optimizer.param_groups for p in group["params"]]
        self._squares = GradientSquares(self._parameters)
        if has_modes(tuned.optimizer):
            tuned.optimizer.train()  # type: ignore[attr-defined]  # some begin in eval mode
        self.average = self._averaged() if self._ema else None
        self._keep_buffers()

    def _averaged(self) -> Average:
        return Average(self._trained())

    def _trained(self) -> dict[str, Any]:
        """What this rank holds of the parameters that are trained."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def eval_weights(self) -> AbstractContextManager[None]:
        optimizer = self._tuned.optimizer
        return eval_weights(optimizer, self._refresh) if has_modes(optimizer) else nullcontext()

    def _refresh(self) -> None:
        """Let the weights that are computed with be those that are stepped; called by all ranks."""

    @property
    def _device(self) -> torch.device:
        return self._world.device

    def _place(self, model: nn.Module) -> None:
        model.to(self._device)

    # ---- a pass

    def micro(self, cut: Cut, last: bool) -> AbstractContextManager[Any]:
        return self._lockstep.trail.begin("training") if self._lockstep else nullcontext()

    def loss(self, batch: Any | None, samples: int) -> tuple[Tensor, float | Tensor]:
        if self._shares_buffers and not self._begun:
            self._share_buffers()  # a step begins with those of rank 0, on every engine
        self._begun = True
        with self._explained:
            return self._wrapped(lambda: self._forward(batch, samples))  # type: ignore[no-any-return]

    def _forward(self, batch: Any | None, samples: int) -> tuple[Tensor, float | Tensor]:
        if self._statistics:
            self._statistics.begin()
        with autocast(self._precision, self._device):
            loss, units = checked(self._task.loss(self.model, batch), samples) if samples else self._stand_in(batch)
        if self.rides:
            return self._carrier.attach(self._statistics.attach(loss) if self._statistics else loss), units
        if self._statistics:
            self._statistics.add()
        return loss, units

    def _stand_in(self, batch: Any | None) -> tuple[Tensor, float]:
        """A zero that gives every parameter a zero gradient, and leaves the statistics as they are."""
        if batch is None:
            parts = [p.reshape(-1)[:0].sum() for p in self.model.parameters() if p.requires_grad]
            return torch.stack([part.float() for part in parts]).sum(), 0.0
        kept = [buffer.clone() for buffer in self.model.buffers()]
        loss, _ = checked(self._task.loss(self.model, batch))
        for buffer, before in zip(self.model.buffers(), kept, strict=True):
            if not torch.equal(buffer, before):  # autograd minds, where one that is saved for the backward is written
                buffer.copy_(before)
        if self._statistics:
            self._statistics.begin()
        return loss * 0, 0.0

    def backward(self, loss: Tensor, note: Note, measured: int | None = None) -> None:
        self._carrier.write(note)
        if not self.rides:
            self._carrier.add()
        with self._explained, nullcontext() if measured is None else self._squares.of(measured):
            self._backward(loss * (self._lift * self._factor))

    def _reworded(self, text: str) -> str | None:
        """What is to be said of an error of torch's; None: nothing better."""
        return reworded(text)

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def call(self, work: Callable[[], Found]) -> Found:
        return work()

    @property
    def _lift(self) -> int:
        """What the loss is multiplied by against ``mean_over``: a power of two, which rounds nothing."""
        return 1 << (self.mean_over - 1).bit_length()

    @property
    def _factor(self) -> float:
        return self._loss_scale.factor if self._loss_scale else 1.0

    def _share_buffers(self) -> None:
        for buffer in self.model.buffers():
            self._world.share(buffer)

    # ---- a step

    def total(self, expected_units: int) -> Total:
        return self._carrier.take(self.mean_over, expected_units)

    def _all_summed(self, square: Tensor, *more: Tensor) -> Tensor:
        """``square`` (0-dim) over all ranks, by one message; the notes, statistics and ``more`` are summed in place."""
        riding = [*(rider.grad for rider in self._riders if rider.grad is not None), *more]
        riding += self._lockstep.ride() if self._lockstep else []
        message = torch.cat([square.reshape(1).double(), *(one.reshape(-1).double() for one in riding)])
        self._world.sum(message)
        for one, whole in zip(riding, message[1:].split([one.numel() for one in riding]), strict=True):
            one.copy_(whole.view(one.shape))
        return message[0]

    def parting(self) -> str | None:
        return self._lockstep.trail.parting() if self._lockstep else None

    def update(self, scale: Number, clip_norm: float | None, recipe: Recipe) -> Update:
        self._begun = False
        if self._lockstep:
            self._lockstep.check()
        scale = scale * (self.mean_over / self._lift) / self._factor
        norm = self._norm() * scale
        squares = self._measured_squares()
        if self._may_skip and not math.isfinite(norm):  # on an accelerator this look waits for it
            self._discard()
            return Update(norm, skipped=True)
        self._tuned.tell(recipe)
        self._step(clipped(scale, norm, clip_norm))
        self._held = None
        if self.average and recipe.ema is not None:
            self.average.update(recipe.ema)
        if self._statistics:
            self._statistics.update()
        if self._loss_scale:
            self._loss_scale.kept()
        self._keep_buffers()
        if not self._stepped:
            self._stepped = True
            self.values()  # what can't be saved is refused now, and not when it would be lost
        return Update(norm, parts_sq=None if squares is None else number(squares) * (scale / self.mean_over) ** 2)

    def _measured_squares(self) -> Tensor | None:
        """What GradientSquares found in this step, over all ranks."""
        return self._squares.take(self._world.sum)

    def _gradients(self) -> list[Tensor]:
        """Those that this rank holds of all parameters, in its own memory; looked for once a step."""
        if self._held is None:
            for parameter in self._parameters:
                if parameter.grad is None:  # has no part in the loss: a zero, as it is where some rank has no samples
                    parameter.grad = torch.zeros_like(parameter)
            self._held = [local(parameter.grad) for parameter in self._parameters]
        return self._held

    def _norm(self) -> Number:
        """Of the summed gradient."""
        return number(norm_of(self._gradients()))

    def _step(self, factor: Number) -> None:
        """Multiply the gradient, step the optimizer, drop the gradient."""
        multiply(self._gradients(), factor)
        self._tuned.optimizer.step()
        self._drop()

    def _drop(self) -> None:
        """Forget the gradient."""
        self._tuned.optimizer.zero_grad(set_to_none=True)

    @property
    def _may_skip(self) -> bool:
        return self._skip_nonfinite or self._loss_scale is not None

    def _keep_buffers(self) -> None:
        if self._may_skip:
            self._buffers_before = {name: buffer.clone() for name, buffer in self.model.named_buffers()}

    def _discard(self) -> None:
        """Undo what the step did to the buffers, also where a module has made a new one.

        Raises:
            RunFailed: no lower loss scale can help.
        """
        if self._loss_scale and not self._loss_scale.lower() and not self._skip_nonfinite:
            raise RunFailed(
                f"loss or gradient isn't finite, and the loss scale of precision=fp16 is at its lowest, "
                f"{LossScale.LOWEST:g}: try precision=bf16, or a lower learning rate"
            )
        self._drop()
        self._held = None
        if self._statistics:
            self._statistics.drop()
        for name, buffer in self.model.named_buffers():
            buffer.copy_(self._buffers_before[name])

    # ---- a checkpoint

    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self._always().items()}

    def slices(self) -> Iterator[Slice]:
        self._share_buffers()  # rank 0's running statistics are those of the run
        state = {**self._always(), **self._optimizer_state()[0], **self._evaluated()}
        return slices_of(state, self._world.rank, self._world.size)

    def _evaluated(self) -> dict[str, Tensor]:
        """The weights that the optimizer evaluates, where these are others; nothing restores them."""
        if not has_modes(self._tuned.optimizer):
            return {}
        with self.eval_weights():
            return {f"{EVAL}/{name}": copied(tensor) for name, tensor in self._trained().items()}

    def values(self) -> dict[str, Any]:
        return self._optimizer_state()[1]

    def restore(self, reader: Reader) -> None:
        with torch.no_grad():
            for name, tensor in self._always().items():
                fill(tensor, reader, name)
        self._restore_optimizer(reader)
        self._keep_buffers()

    def _restore_optimizer(self, reader: Reader) -> None:
        restore_optimizer(self._tuned.optimizer, self._by_parameter(), reader)

    def whole(self, name: str) -> Tensor:
        return gathered(self._always()[name])

    def _always(self) -> dict[str, Tensor]:
        state = self.model.state_dict(keep_vars=True)
        scale = {"precision/loss_scale": self._loss_scale.state} if self._loss_scale else {}
        averages = self.average.tensors if self.average else {}
        return (
            {f"model/{name}": state[name].detach() for name in self._names}
            | {f"ema/{name}": tensor for name, tensor in averages.items()}
            | scale
        )

    def _by_parameter(self) -> dict[Tensor, str]:
        return {parameter: name for name, parameter in self.model.named_parameters()}

    def _optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return stored_optimizer(self._tuned.optimizer, self._by_parameter())
