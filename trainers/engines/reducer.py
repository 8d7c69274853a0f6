"""What engines differ in: how ranks bring their gradients together, and where the parameters that are trained are kept.

A new engine is a file here that is named as the engine is, with ``make_reducer(parts, config)``, and a YAML in
conf/engine/; keys and limits of its own go into a section in conf/engines.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar, cast

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
from isobatch.trainers.ranks.world import World
from isobatch.trainers.tensors.sharding import Part, local, read_like
from isobatch.trainers.tensors.slices import Reader

Found = TypeVar("Found")
Read = Callable[[Tensor, Reader, str, torch.device], Tensor]
"""Return what this rank holds of a parameter's state, by its name in a checkpoint, for a device."""


class Root(nn.Module):
    """A module whose forward is whatever is to be done with the model: so a task may call it twice, or only a part."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], Found]) -> Found:
        return work()


class Parts:
    """What a reducer is made of.

    Args:
        model: on the CPU, the same on all ranks; the reducer brings it to its device.
        make_optimizer: called once the model has the parameters that are trained.

    Attributes:
        names: of the model's tensors that a checkpoint holds.
        root: the module to wrap.
        riders: what ranks tell each other beside the gradient.

    Raises:
        UserError: the model keeps what a checkpoint can't hold.
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
    """Where the parameters that are trained are kept, and the optimizer's state; here in the parameters themselves."""

    model: nn.Module
    restored: Callable[[], None] = lambda: None  # called once weights and state are those of a checkpoint

    def parts(self) -> Mapping[str, Tensor | Part]:
        """Return what this rank holds of each parameter, by its name in the model."""
        return dict(self.model.named_parameters())

    def optimizer_seen(self) -> AbstractContextManager[None]:
        """Within, the optimizer's groups and state are those of the model's parameters."""
        return nullcontext()

    @contextmanager
    def restoring(self) -> Iterator[Read]:
        """Within, as in ``optimizer_seen``, it is given another state by what this yields; weights are set already."""
        yield read_like
        self.restored()

    def refresh(self) -> None:
        """Compute from now on with the weights that are stored; called by all ranks."""


class Reducer:
    """Bring the gradients of all ranks and passes together, and step the optimizer.

    A step is: ``accumulation`` times ``micro``, ``forward`` and ``backward``, then ``reduce``, then ``step`` or
    ``drop``. The base class sums all gradients in ``reduce``, by one message.

    Args:
        tuned: the optimizer of the parameters that are trained.
        root: what runs a pass; None: nothing has to be wrapped.

    Attributes:
        parameters: those of the optimizer, in the order of its groups.
        observed: parameters; the gradients that one backward gives them are those of its pass.
        mean_over: by how many the summed gradient is divided: ranks where it is a mean, else 1.
        lockstep: a forward sends messages, so all ranks run as many.
        trails: what compares the modules that ranks run; None: they may differ.
        shares_buffers: buffers are rank 0's in each step, or the same on all ranks anyway.
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
        """Around one pass, perhaps the ``last``, of a step that is cut so."""
        return nullcontext()

    def forward(self, work: Callable[[], Found]) -> Found:
        """Return what ``work`` returns: the loss of a pass."""
        return self._root(work)  # type: ignore[no-any-return]

    def call(self, work: Callable[[], Found]) -> Found:
        """Return what ``work`` returns, which calls the model outside of a step."""
        return work()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a pass to the step's."""
        loss.backward()

    def reduce(self) -> Number:
        """Sum gradients and riders over the ranks unless the backwards did, and return the gradient's norm."""
        self._riders.total(self.held()[0].new_zeros(()), *self.held())
        return self.norm()

    def norm(self) -> Number:
        """Return the norm of the gradients that this rank holds."""
        return number(norm_of(self.held()))

    def held(self) -> list[Tensor]:
        """Return what this rank holds of all gradients, in its own memory; they are looked for once a step."""
        if self._held is None:
            for parameter in self.parameters:
                if parameter.grad is None:  # has no part in the loss: a zero, as it is where some rank has no samples
                    parameter.grad = torch.zeros_like(parameter)
            self._held = [local(parameter.grad) for parameter in self.parameters]
        return self._held

    def step(self, factor: Number) -> None:
        """Multiply the summed gradient, step the optimizer, drop the gradient."""
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
        """Within, an error of torch's is raised as a UserError that says what to do, where there is one."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            if explained := self.explain(str(error)):
                raise explained from error
            raise

    def explain(self, text: str) -> UserError | None:
        """Return what to say for an error of a forward or a backward, by its text; None: nothing better."""
        if "Expected more than 1 value per channel" not in text:
            return None
        problem = "BatchNorm has no statistics of a single sample, which a micro-batch is here"
        ghosts = "batchnorm.mode=ghost batchnorm.ghost_size=N, which takes them from N samples on any hardware"
        return UserError(problem, f"use a larger batch.per_gpu or batch.global_size, or {ghosts}", "batch.per_gpu")


def clipped(scale: Number, norm: Number, clip_norm: float | None) -> Number:
    """Return ``scale``, with what clips a gradient whose norm is then ``norm``."""
    if clip_norm is None:
        return scale
    limit = clip_norm / (norm + 1e-6)
    return scale * (limit.clamp(max=1.0) if isinstance(limit, Tensor) else min(limit, 1.0))


def multiply(gradients: list[Tensor], factor: Number) -> None:
    """Multiply all of them by ``factor``, in place; for those that are in the host's memory it is brought there."""
    if isinstance(factor, Tensor):
        torch._foreach_mul_(gradients, factor.float().to(gradients[0].device))
    elif factor != 1.0:
        torch._foreach_mul_(gradients, factor)


def norm_of(gradients: list[Tensor]) -> Tensor:
    """Return the norm of all of them together, 0-dim float64."""
    gradients = [torch.view_as_real(gradient) if gradient.is_complex() else gradient for gradient in gradients]
    wide = torch.float64 if any(gradient.dtype == torch.float64 for gradient in gradients) else torch.float32
    norms: Tensor = torch.stack(torch._foreach_norm(gradients, 2, wide))
    return cast(Tensor, torch.linalg.vector_norm(norms)).double()


def number(scalar: Tensor) -> Number:
    """Return a float, where a look at it doesn't wait for a device."""
    return scalar.item() if scalar.is_cpu else scalar
