"""The base of all engines: how gradients are reduced over ranks, and where the trained parameters are stored.

To add an engine, add a file here with the engine's name and ``make_reducer(parts, config)``, and a YAML in
conf/engine/. Its own config keys and limits go into a section in conf/engines.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from isobatch.scaling.errors import UserError
from isobatch.scaling.geometry import Cut
from isobatch.trainers.engines.lockstep import Lockstep
from isobatch.trainers.engines.riders import Riders
from isobatch.trainers.engines.step_report import Number
from isobatch.trainers.model.batchnorm import settled
from isobatch.trainers.model.build import distinct
from isobatch.trainers.optim.make import Tuned
from isobatch.trainers.ranks.internals import foreach_mul_, foreach_norm
from isobatch.trainers.ranks.world import World, real_view
from isobatch.trainers.tensors.sharding import Part, local, read_like
from isobatch.trainers.tensors.slices import Reader

Found = TypeVar("Found")
Read = Callable[[Tensor, Reader, str, torch.device], Tensor]
"""Return this rank's part of a parameter's state, given the state's name in the checkpoint and a device."""


class Owner(NamedTuple):
    """Hold the optimizer's group and state of a part of the gradient; state tensors may be sharded.

    Attributes:
        elements: number of the part's elements, without padding.
    """

    group: Mapping[str, Any]
    state: Mapping[str, Any]
    elements: int


class Root(nn.Module):
    """A module whose forward runs a function, so that a task may call the model twice, or only a part of it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], Found]) -> Found:
        return work()


class Parts:
    """The parts that a reducer is made of.

    Args:
        model: the model on the CPU, the same on all ranks; the reducer moves it to its device.
        make_optimizer: makes the optimizer; called after the reducer has placed and sharded the parameters.

    Attributes:
        names: names of the model's tensors in a checkpoint.
        root: the module to wrap.
        riders: the notes and statistics that travel with the gradient.

    Raises:
        UserError: the model has state that a checkpoint can't hold.
    """

    def __init__(self, model: nn.Module, world: World, make_optimizer: Callable[[], Tuned]) -> None:
        self.model, self.world, self.make_optimizer = model, world, make_optimizer
        self.names = list(distinct(model))
        self.riders = Riders(model, world)
        self.root = Root(model)

    def zero(self) -> Tensor:
        """Return a zero that gives every parameter a zero gradient."""
        parts = [p.reshape(-1)[:0].sum() for p in self.model.parameters() if p.requires_grad]
        return torch.stack([part.float() for part in parts]).sum()


@dataclass
class Storage:
    """The storage of the trained parameters and the optimizer's state; this base stores them in the model itself."""

    model: nn.Module
    restored: Callable[[], None] = lambda: None  # called after a checkpoint was restored

    def parts(self) -> Mapping[str, Tensor | Part]:
        """Return this rank's part of each parameter, by the parameter's name in the model."""
        return dict(self.model.named_parameters())

    def optimizer_seen(self) -> AbstractContextManager[None]:
        """Return a context in which the optimizer's groups and state refer to the model's parameters."""
        return nullcontext()

    @contextmanager
    def restoring(self) -> Iterator[Read]:
        """Yield a function that reads the optimizer's state, as in ``optimizer_seen``; weights are restored before."""
        yield read_like
        self.restored()

    def refresh(self) -> None:
        """Copy the stored weights to the weights that the model computes with; called by all ranks."""


class Reducer:
    """Reduce the gradients of all ranks and passes, and step the optimizer.

    A step is: ``accumulation`` times ``micro``, ``forward`` and ``backward``, then ``reduce``, then ``step`` or
    ``drop``. The base class sums all gradients in ``reduce``, in one message.

    Args:
        tuned: the optimizer of the trained parameters.
        root: the wrapped module that runs a pass; None if nothing is wrapped.

    Attributes:
        parameters: the optimizer's parameters, in the order of its groups.
        observed: parameters on which a hook sees the gradient of one pass alone.
        mean_over: the divisor of the summed gradient: the number of ranks if it is a mean, else 1.
        lockstep: the forward communicates, so every rank runs the same number of forwards.
        trails: compares the modules that ranks run; None if they may differ.
        shares_buffers: buffers are the same on all ranks in each step without ``State.share_buffers``.
    """

    lockstep = False
    trails: Lockstep | None = None
    mean_over = 1

    def __init__(self, parts: Parts, tuned: Tuned, root: Callable[..., Any] | None = None) -> None:
        self.tuned = tuned
        self._root: Any = root or parts.root
        self._riders = parts.riders
        self.storage, self.shares_buffers = Storage(parts.model), settled(parts.model)
        self.parameters = [parameter for group in tuned.optimizer.param_groups for parameter in group["params"]]
        self.observed: Sequence[nn.Parameter] = self.parameters
        self._held: list[Tensor] | None = None

    def micro(self, cut: Cut, last: bool) -> AbstractContextManager[Any]:
        """Return a context for one pass of a step with this ``cut``; ``last``: it is the step's last pass."""
        return nullcontext()

    def forward(self, work: Callable[[], Found]) -> Found:
        """Run ``work``, which computes the loss of a pass, and return its result."""
        return self._root(work)  # type: ignore[no-any-return]

    def call(self, work: Callable[[], Found]) -> Found:
        """Run ``work``, which calls the model outside of a step, and return its result."""
        return work()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a pass to the step's gradient."""
        loss.backward()

    def reduce(self) -> Number:
        """Sum gradients and riders over the ranks unless the backwards did, and return the gradient's norm."""
        self._riders.total(self.held()[0].new_zeros(()), *self.held())
        return self.norm()

    def norm(self) -> Number:
        """Return the norm of the summed gradient."""
        return number(norm_of(self.held()))

    def gradients(self) -> list[Tensor]:
        """Return this rank's parts of the summed gradient, after ``reduce``."""
        return self.held()

    def states(self) -> list[Owner]:
        """Return the optimizer's states of the elements of ``gradients``, in the same order."""
        groups, state = self.tuned.optimizer.param_groups, self.tuned.optimizer.state
        owned = [(group, parameter) for group in groups for parameter in group["params"]]
        return [
            Owner(group, state.get(one, {}), held.numel())
            for (group, one), held in zip(owned, self.held(), strict=True)
        ]

    def total_of(self, parts: Tensor) -> Tensor:
        """Sum numbers of the parts in ``gradients`` over the whole gradient: float64 [numbers, parts] → [numbers]."""
        return parts.sum(1)

    def held(self) -> list[Tensor]:
        """Return this rank's parts of all gradients as local tensors; collected once per step."""
        if self._held is None:
            for parameter in self.parameters:
                if parameter.grad is None:  # unused in the loss: zero, as if some rank had no samples
                    parameter.grad = torch.zeros_like(parameter)
            self._held = [local(parameter.grad) for parameter in self.parameters]
        return self._held

    def step(self, factor: Number) -> None:
        """Multiply the summed gradient by ``factor``, step the optimizer, drop the gradient."""
        multiply(self.held(), factor)
        self._held = None
        self.tuned.optimizer.step()
        self.drop()

    def drop(self) -> None:
        """Drop the gradient."""
        self._held = None
        self.tuned.optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn an error of torch's that ``explain`` knows into a UserError with a fix."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            if explained := self.explain(str(error)):
                raise explained from error
            raise

    def explain(self, text: str) -> UserError | None:
        """Return the UserError for the error ``text`` of a forward or a backward; None if the text is unknown."""
        if "Expected more than 1 value per channel" not in text:
            return None
        problem = "BatchNorm needs more than one sample, and a micro-batch has one"
        ghosts = "batchnorm.mode=ghost batchnorm.ghost_size=N, which takes statistics of N samples on any hardware"
        return UserError(problem, f"use a larger batch.per_gpu or batch.global_size, or {ghosts}", "batch.per_gpu")


def clipped(scale: Number, norm: Number, clip_norm: float | None) -> Number:
    """Return ``scale`` times the clipping factor of a gradient whose scaled norm is ``norm``."""
    if clip_norm is None:
        return scale
    limit = clip_norm / (norm + 1e-6)
    return scale * (limit.clamp(max=1.0) if isinstance(limit, Tensor) else min(limit, 1.0))


def multiply(gradients: list[Tensor], factor: Number) -> None:
    """Multiply ``gradients`` by ``factor`` in place; the factor is moved to the gradients' device."""
    if isinstance(factor, Tensor):
        foreach_mul_(gradients, factor.float().to(gradients[0].device))
    elif factor != 1.0:
        foreach_mul_(gradients, factor)


def norm_of(gradients: list[Tensor]) -> Tensor:
    """Return the norm of all gradients together, 0-dim float64."""
    gradients = [real_view(gradient) for gradient in gradients]
    wide = torch.float64 if any(gradient.dtype == torch.float64 for gradient in gradients) else torch.float32
    norms: Tensor = torch.stack(foreach_norm(gradients, 2, wide))
    return cast(Tensor, torch.linalg.vector_norm(norms)).double()


def number(scalar: Tensor) -> Number:
    """Return a CPU tensor as a float; leave a tensor on a device as it is, so that nothing waits for the device."""
    return scalar.item() if scalar.is_cpu else scalar
