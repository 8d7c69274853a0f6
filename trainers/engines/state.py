"""What an engine keeps between steps, as a checkpoint holds it: weights, averages, the optimizer's state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from isobatch.trainers.engines.reducer import Parts, Reducer
from isobatch.trainers.model.average import Average, eval_weights, has_modes
from isobatch.trainers.model.precision import LossScale
from isobatch.trainers.optim.state_io import restore_optimizer, stored_optimizer
from isobatch.trainers.tensors.sharding import Part, copied, fill, gathered, slices_of
from isobatch.trainers.tensors.slices import EVAL, Reader, Slice


class State:
    """The state of a model and its optimizer over all ranks.

    Args:
        ema: keep a moving average of the weights.

    Attributes:
        average: the moving average; None: none is kept.
    """

    def __init__(self, parts: Parts, reducer: Reducer, loss_scale: LossScale | None, ema: bool) -> None:
        self._model, self._world, self._names = parts.model, parts.world, parts.names
        self._storage, self._loss_scale = reducer.storage, loss_scale
        self._optimizer = reducer.tuned.optimizer
        if has_modes(self._optimizer):
            self._optimizer.train()  # type: ignore[attr-defined]  # some begin in eval mode
        self.average = Average(self._trained(), self._storage.refresh) if ema else None

    def eval_weights(self) -> AbstractContextManager[None]:
        """Within, the model has the weights that the optimizer evaluates; called by all ranks, between two steps."""
        modes = has_modes(self._optimizer)
        return eval_weights(self._optimizer, self._storage.refresh) if modes else nullcontext()

    def share_buffers(self) -> None:
        """Give all ranks the buffers of rank 0."""
        for buffer in self._model.buffers():
            self._world.share(buffer)

    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return dtype and shape of what every checkpoint has: ``model/<name>`` and ``ema/<name>``."""
        return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self._always().items()}

    def slices(self) -> Iterator[Slice]:
        """Yield this rank's part of what a checkpoint holds; the parts of all ranks are everything, once.

        Called by all ranks after the same step: ranks may talk to each other.
        """
        self.share_buffers()  # rank 0's running statistics are those of the run
        state = {**self._always(), **self._optimizer_state()[0], **self._evaluated()}
        return slices_of(state, self._world.rank, self._world.size)

    def values(self) -> dict[str, Any]:
        """Return what isn't a tensor, as JSON; the same on all ranks."""
        return self._optimizer_state()[1]

    def restore(self, reader: Reader) -> None:
        """Resume from a checkpoint, of any engine and number of ranks."""
        with torch.no_grad():
            for name, tensor in self._always().items():
                fill(tensor, reader, name)
        with self._storage.restoring() as read:
            restore_optimizer(self._optimizer, self._by_parameter(), reader, read)

    def whole(self, name: str) -> Tensor:
        """Return a tensor of ``layout`` on all ranks, which call this alike."""
        return gathered(self._always()[name])

    def _trained(self) -> dict[str, Tensor | Part]:
        """Return what this rank holds of the parameters that are trained."""
        trained = {name for name, parameter in self._model.named_parameters() if parameter.requires_grad}
        return {name: part for name, part in self._storage.parts().items() if name in trained}

    def _evaluated(self) -> dict[str, Any]:
        """Return the weights that the optimizer evaluates, where these are others; nothing restores them."""
        if not has_modes(self._optimizer):
            return {}
        with self.eval_weights():
            return {f"{EVAL}/{name}": copied(tensor) for name, tensor in self._trained().items()}

    def _always(self) -> dict[str, Any]:
        state = {**self._model.state_dict(keep_vars=True), **self._storage.parts()}
        scale = {"precision/loss_scale": self._loss_scale.state} if self._loss_scale else {}
        averages = self.average.tensors if self.average else {}
        return (
            {f"model/{name}": state[name].detach() for name in self._names}
            | {f"ema/{name}": tensor for name, tensor in averages.items()}
            | scale
        )

    def _by_parameter(self) -> dict[Tensor, str]:
        return {parameter: name for name, parameter in self._model.named_parameters()}

    def _optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        with self._storage.optimizer_seen():
            return stored_optimizer(self._optimizer, self._by_parameter())
