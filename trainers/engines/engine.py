"""Train one model over all ranks: the code that all engines share. Each engine adds its own reducer (reducer.py)."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from isobatch.scaling.geometry import Cut
from isobatch.scaling.rules import Recipe
from isobatch.trainers.engines.noise import Compared, GradientSquares, compare
from isobatch.trainers.engines.reducer import Found, Parts, Reducer, clipped, number
from isobatch.trainers.engines.state import State
from isobatch.trainers.engines.step_report import Measures, Note, Number, Total, Update
from isobatch.trainers.model.precision import LossScale, autocast
from isobatch.trainers.ranks.failure import RunFailed
from isobatch.trainers.ranks.internals import foreach_add_
from isobatch.trainers.tasks.losses import checked
from isobatch.trainers.tasks.task import Task
from isobatch.trainers.tensors.slices import Reader


class Engine:
    """Forward, backward, reduction and update of one model over all ranks.

    A step is: ``accumulation`` times ``micro``, ``loss`` and ``backward``, then ``total``, then ``update``. A step that
    measures its halves has the passes of the first half, ``set_aside``, and the passes of the second half.

    Args:
        reducer: the reducer of the ranks' gradients, made of ``parts``.
        ema: keep a moving average of the weights.
        skip_nonfinite: skip a step whose gradient isn't finite.

    Attributes:
        model: the unwrapped model.
        average: the moving average of the weights, or None.
        layout, slices, values, whole, eval_weights, new_average: see State.
        lockstep: the forward communicates, so every rank runs the same number of forwards. A rank without samples
            runs a stand-in with other samples.
    """

    def __init__(
        self,
        task: Task,
        parts: Parts,
        reducer: Reducer,
        *,
        ema: bool = False,
        skip_nonfinite: bool = False,
        precision: str = "fp32",
    ) -> None:
        self.model, self.lockstep = parts.model, reducer.lockstep
        self._task, self._world, self._precision = task, parts.world, precision
        self._riders, self._zero, self._reducer, self._tuned = parts.riders, parts.zero, reducer, reducer.tuned
        self._lift = 1 << (reducer.mean_over - 1).bit_length()  # undoes mean_over; a power of two is exact
        self._skip_nonfinite, self._loss_scale = skip_nonfinite, LossScale() if precision == "fp16" else None
        self._may_skip = skip_nonfinite or precision == "fp16"
        self._squares, self._cut, self._first = GradientSquares(parts.world), Cut(1, 1, 1, 1), 0
        self._aside: list[Tensor] = []  # the gradient of a step's first half
        self._found: Compared | None = None
        self._norm: Number = 0.0
        self._buffers_before: dict[str, Tensor] = {}
        self._begun = self._stepped = False
        self._state = state = State(parts, reducer, self._loss_scale, ema)
        self.average, self.layout, self.slices, self.values = state.average, state.layout, state.slices, state.values
        self.whole, self.eval_weights, self.new_average = state.whole, state.eval_weights, state.new_average
        self._keep_buffers()

    # ---- a pass

    def micro(self, cut: Cut, last: bool) -> AbstractContextManager[Any]:
        """Return a context for one pass of a step with this ``cut``; ``last``: it is the step's last pass."""
        self._cut = cut
        return self._reducer.micro(cut, last)

    def loss(self, batch: Any | None, samples: int) -> tuple[Tensor, float | Tensor, Measures]:
        """Return the task's sum of losses, number of units, and measures.

        Args:
            samples: number of samples in the batch. 0 marks a stand-in, which adds nothing to any sum and leaves all
                statistics unchanged. Without ``lockstep`` its batch is None.

        Raises:
            UserError: the task's loss isn't (sum, units).
        """
        if not (self._reducer.shares_buffers or self._begun):
            self._state.share_buffers()  # every step starts with the buffers of rank 0, on every engine
        self._begun = True
        with self._reducer.explained():
            return self._reducer.forward(lambda: self._forward(batch, samples))

    def _forward(self, batch: Any | None, samples: int) -> tuple[Tensor, float | Tensor, Measures]:
        self._riders.begin()
        with autocast(self._precision, self._world.device):
            if samples:
                loss, units, measures = checked(self._task.loss(self.model, batch), samples)
            else:
                loss, units, measures = self._stand_in(batch), 0.0, {}
        return self._riders.attach(loss), units, measures

    def _stand_in(self, batch: Any | None) -> Tensor:
        """Return a zero loss that gives every parameter a zero gradient and leaves the statistics unchanged."""
        if batch is None:
            return self._zero()
        kept = [buffer.clone() for buffer in self.model.buffers()]
        loss, *_ = checked(self._task.loss(self.model, batch))
        for buffer, before in zip(self.model.buffers(), kept, strict=True):
            if not torch.equal(buffer, before):  # autograd raises if a tensor saved for the backward is written to
                buffer.copy_(before)
        self._riders.begin()
        return loss * 0

    def backward(self, loss: Tensor, note: Note, measured: int | None = None) -> None:
        """Add the gradient of a pass to the step's gradient, and send ``note`` along with it.

        Args:
            measured: number of samples of this micro-batch (0: a stand-in), to measure the norm of its gradient. Pass
                it in all passes of a step on all ranks, or in none.
        """
        self._riders.write(note)
        measuring = nullcontext() if measured is None else self._squares.of(self._reducer.observed, measured)
        with self._reducer.explained(), measuring:
            self._reducer.backward(loss * (self._lift * self._factor))

    def call(self, work: Callable[[], Found]) -> Found:
        """Run ``work``, which calls the model outside of a step. With ``lockstep``, all ranks have to call this."""
        trails = self._reducer.trails
        with trails.evaluating() if trails else nullcontext():
            return self._reducer.call(work)

    def describe_mismatch(self) -> str | None:
        """Describe how this stalled rank's modules differ from rank 0's; None if nothing shows a difference."""
        trails = self._reducer.trails
        return trails.trail.describe_mismatch() if trails else None

    @property
    def _factor(self) -> float:
        return self._loss_scale.factor if self._loss_scale else 1.0

    def abandon(self) -> None:
        """Drop the gradients of a step that won't end. Only without ``lockstep``, and after passes before the last."""
        self._begun = False
        self._reducer.drop()
        self._riders.abandon()

    # ---- a step

    def set_aside(self) -> None:
        """Reduce the gradient of the step's first half, and keep it apart from that of the second half."""
        self._reducer.reduce()
        if self._reducer.trails:
            self._reducer.trails.check()
        self._aside = [gradient.clone() for gradient in self._reducer.gradients()]
        self._first = self._cut.global_size
        self._riders.set_aside()
        self._reducer.drop()

    def total(self, expected_units: int) -> Total:
        """Return the sum of the notes of all ranks and passes of a step of ``expected_units``.

        If the first half was set aside, it is compared with the second half, and added.
        """
        self._norm = self._reducer.reduce()
        if self._aside:
            self._found = compare(self._reducer, self._aside, (self._first, self._cut.global_size))
            foreach_add_(self._reducer.gradients(), self._aside)
            self._riders.join()
            self._norm, self._aside = self._reducer.norm(), []
        return self._riders.take(expected_units)

    def update(self, scale: Number, clip_norm: float | None, recipe: Recipe) -> Update:
        """Scale the summed gradient, clip it to ``clip_norm``, step the optimizer, drop the gradient.

        With ``on_nonfinite=skip``, a gradient or scale that isn't finite is dropped on all ranks, and the model's
        buffers are reset to their values before the step. fp16 does the same, and halves the loss scale.

        Raises:
            RunFailed: in fp16, the gradient wasn't finite at the lowest loss scale.
            UserError: ranks ran different modules, or, after the first step, the optimizer has state that a
                checkpoint can't hold.
        """
        self._begun = False
        if self._reducer.trails:
            self._reducer.trails.check()
        mean_over = self._reducer.mean_over
        scale = scale * (mean_over / self._lift) / self._factor
        norm = self._norm * scale
        squares, (halves, self._found) = self._squares.take(self._cut), (self._found, None)
        if self._may_skip and not math.isfinite(norm):  # on an accelerator this waits for the device
            self._discard()
            return Update(norm, skipped=True)
        self._tuned.tell(recipe)
        self._riders.settle(keep=True)
        with self._reducer.explained():
            self._reducer.step(clipped(scale, norm, clip_norm))
        if self.average and recipe.ema is not None:
            self.average.update(recipe.ema)
        if self._loss_scale:
            self._loss_scale.kept()
        self._keep_buffers()
        if not self._stepped:
            self._stepped = True
            self.values()  # reject state that can't be saved now, not at the first checkpoint
        if halves:
            grad_sq, trace = (number(value) * scale**2 for value in halves.values)
            return Update(norm, halves=(grad_sq, trace), norm=halves.norm)
        return Update(norm, parts_sq=None if squares is None else number(squares) * (scale / mean_over) ** 2)

    def _keep_buffers(self) -> None:
        if self._may_skip:
            self._buffers_before = {name: buffer.clone() for name, buffer in self.model.named_buffers()}

    def _discard(self) -> None:
        """Drop the gradient and restore the buffers. Raise RunFailed if the loss scale can't be lowered."""
        if self._loss_scale and not self._loss_scale.lower() and not self._skip_nonfinite:
            lowest = f"the loss scale of precision=fp16 is at its lowest, {LossScale.LOWEST:g}"
            fix = "try precision=bf16, or a lower learning rate"
            raise RunFailed(f"loss or gradient isn't finite, and {lowest}: {fix}")
        self._reducer.drop()
        self._riders.settle(keep=False)
        for name, buffer in self.model.named_buffers():
            buffer.copy_(self._buffers_before[name])

    def restore(self, reader: Reader) -> None:
        """Restore a checkpoint that any engine wrote, on any number of ranks."""
        self._state.restore(reader)
        self._keep_buffers()
