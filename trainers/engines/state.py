"""The state of an engine between steps, as saved in a checkpoint: weights, their average, the optimizer's state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from isobatch.trainers.engines.reducer import Parts, Reducer
from isobatch.trainers.model.precision import LossScale
from isobatch.trainers.optim.state_io import restore_optimizer, stored_optimizer
from isobatch.trainers.ranks.internals import foreach_copy_, foreach_lerp_
from isobatch.trainers.tensors.sharding import Part, copied, fill, gathered, local, slices_of
from isobatch.trainers.tensors.slices import EVAL, Reader, Slice


class State:
    """The state of a model and its optimizer over all ranks; ``average`` is None without ``ema``."""

    def __init__(self, parts: Parts, reducer: Reducer, loss_scale: LossScale | None, ema: bool) -> None:
        self._model, self._world, self._names = parts.model, parts.world, parts.names
        self._storage, self._loss_scale = reducer.storage, loss_scale
        self._optimizer: Any = reducer.tuned.optimizer
        self._by_parameter: dict[Tensor, str] = {parameter: name for name, parameter in parts.model.named_parameters()}
        # Schedule-free optimizers evaluate other weights than they step; torch's own optimizers have no such methods.
        modes = (getattr(self._optimizer, "train", None), getattr(self._optimizer, "eval", None))
        self._has_modes = all(map(callable, modes))
        if self._has_modes:
            self._optimizer.train()  # type: ignore[attr-defined]  # some start in eval mode
        self.average = self.new_average() if ema else None

    @contextmanager
    def eval_weights(self) -> Iterator[None]:
        """Put the optimizer's evaluation weights into the model; called by all ranks, between two steps.

        ``eval()`` followed by ``train()`` rounds, so the training weights are copied back afterwards, bit by bit.
        """
        if not self._has_modes:
            yield
            return
        weights = [local(parameter) for group in self._optimizer.param_groups for parameter in group["params"]]
        with _replaced(weights, self._optimizer.eval, self._storage.refresh):
            try:
                yield
            finally:
                self._optimizer.train()

    def new_average(self) -> Average:
        """Return another moving average of the trained parameters, which starts at the current ones."""
        return Average(self._trained(), self._storage.refresh)

    def share_buffers(self) -> None:
        """Give all ranks the buffers of rank 0."""
        for buffer in self._model.buffers():
            self._world.share(buffer)

    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return dtype and shape of the tensors in every checkpoint: ``model/<name>`` and ``ema/<name>``."""
        return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self._always().items()}

    def slices(self) -> Iterator[Slice]:
        """Yield this rank's slices of a checkpoint; the slices of all ranks cover every tensor exactly once.

        All ranks call it after the same step, since it may communicate.
        """
        self.share_buffers()  # the run's running statistics are those of rank 0
        state = {**self._always(), **self._optimizer_state()[0], **self._evaluated()}
        return slices_of(state, self._world.rank, self._world.size)

    def values(self) -> dict[str, Any]:
        """Return the state that isn't a tensor, as JSON values; the same on all ranks."""
        return self._optimizer_state()[1]

    def restore(self, reader: Reader) -> None:
        """Restore a checkpoint that any engine wrote, on any number of ranks."""
        with torch.no_grad():
            for name, tensor in self._always().items():
                fill(tensor, reader, name)
        with self._storage.restoring() as read:
            restore_optimizer(self._optimizer, self._by_parameter, reader, read)

    def whole(self, name: str) -> Tensor:
        """Return the whole tensor ``name`` of ``layout`` on every rank; called by all ranks in the same order."""
        return gathered(self._always()[name])

    def _trained(self) -> dict[str, Tensor | Part]:
        """Return this rank's parts of the trained parameters."""
        trained = {name for name, parameter in self._model.named_parameters() if parameter.requires_grad}
        return {name: part for name, part in self._storage.parts().items() if name in trained}

    def _evaluated(self) -> dict[str, Any]:
        """Return the optimizer's evaluation weights if they differ from the trained ones; they are never restored."""
        if not self._has_modes:
            return {}
        with self.eval_weights():
            return {f"{EVAL}/{name}": copied(tensor) for name, tensor in self._trained().items()}

    def _always(self) -> dict[str, Any]:
        state = {**self._model.state_dict(keep_vars=True), **self._storage.parts()}
        scale = {"precision/loss_scale": self._loss_scale.state} if self._loss_scale else {}
        averages = {f"ema/{name}": tensor for name, tensor in self.average.tensors.items()} if self.average else {}
        return {f"model/{name}": state[name].detach() for name in self._names} | averages | scale

    def _optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        with self._storage.optimizer_seen():
            return stored_optimizer(self._optimizer, self._by_parameter)


class Average:
    """The moving average of the trained parameters, initialised with the parameters.

    After each step: average ← decay × average + (1 − decay) × weights. The decay of a step is 0.5^(global batch /
    half-life), both in samples, so that the average forgets at the same pace whatever the batch.

    Args:
        named: this rank's parts of the parameters.
        refresh: copy the parts in ``named`` to the weights that the model computes with, if these are separate;
            called by all ranks.

    Attributes:
        tensors: the averages by name, on the parameters' devices, in the dtype of the parameter, but at least
            float32: fewer bits would round the small change of a step away.
    """

    def __init__(self, named: Mapping[str, Tensor | Part], refresh: Callable[[], None] = lambda: None) -> None:
        self._parameters, self._refresh = list(named.values()), refresh
        narrow = {name: p.dtype.is_floating_point and p.dtype.itemsize < 4 for name, p in named.items()}
        self.tensors = {name: copied(p, torch.float32 if narrow[name] else p.dtype) for name, p in named.items()}

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Update the average with the current parameters."""
        averages = self._averages()
        weights = [local(p).to(average.dtype) for p, average in zip(self._parameters, averages, strict=True)]
        foreach_lerp_(averages, weights, 1 - decay)

    def swapped(self) -> AbstractContextManager[None]:
        """Put the average, rounded to their dtype, into the parameters; copy the parameters back afterwards.

        It needs the memory of one more copy of the parameters, between two steps, when there are no gradients.
        """
        weights = [local(parameter) for parameter in self._parameters]
        return _replaced(weights, lambda: _copy(weights, self._averages()), self._refresh)

    def _averages(self) -> list[Tensor]:
        return [local(average) for average in self.tensors.values()]


@contextmanager
def _replaced(weights: list[Tensor], replace: Callable[[], object], refresh: Callable[[], None]) -> Iterator[None]:
    """Let ``replace`` change ``weights``; copy the previous values back afterwards."""
    kept = [weight.clone() for weight in weights]
    try:
        replace()
        refresh()
        yield
    except BaseException:
        _copy(weights, kept)  # without refresh, which communicates: the other ranks may not be here
        raise
    _copy(weights, kept)
    refresh()


@torch.no_grad()
def _copy(weights: list[Tensor], values: list[Tensor]) -> None:
    foreach_copy_(weights, values)
