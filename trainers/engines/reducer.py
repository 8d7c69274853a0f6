"""What engines differ in: how ranks bring their gradients together, and where the parameters that are trained are kept.

A new engine is a file here with a function that makes its reducer, and an entry in make.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from isobatch.scaling.errors import UserError
from isobatch.trainers.engines.riders import Riders
from isobatch.trainers.engines.root import Found, Root
from isobatch.trainers.model.build import distinct
from isobatch.trainers.tensors.sharding import Part, read_like

if TYPE_CHECKING:
    from isobatch.scaling.geometry import Cut
    from isobatch.trainers.engines.lockstep import Lockstep
    from isobatch.trainers.engines.step_report import Number
    from isobatch.trainers.optim.make import Tuned
    from isobatch.trainers.ranks.world import World
    from isobatch.trainers.tensors.slices import Reader

Read = Callable[[Tensor, "Reader", str, torch.device], Tensor]
"""Return what this rank holds of a parameter's state, by its name in a checkpoint, for a device."""


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


class Storage(Protocol):
    """Where the parameters that are trained are kept, and the optimizer's state."""

    def parts(self) -> Mapping[str, Tensor | Part]:
        """Return what this rank holds of each parameter, by its name in the model."""

    def optimizer_seen(self) -> AbstractContextManager[None]:
        """Within, the optimizer's groups and state are those of the model's parameters."""

    def restoring(self) -> AbstractContextManager[Read]:
        """Within, the optimizer is as in ``optimizer_seen``, and is given another state; called once weights are set.

        Yields:
            what reads that state.
        """

    def refresh(self) -> None:
        """Compute from now on with the weights that are stored; called by all ranks."""


@dataclass(frozen=True, slots=True)
class OwnStorage:
    """Parameters are kept in themselves."""

    model: nn.Module
    restored: Callable[[], None] = lambda: None

    def parts(self) -> Mapping[str, Tensor | Part]:
        return dict(self.model.named_parameters())

    def optimizer_seen(self) -> AbstractContextManager[None]:
        return nullcontext()

    @contextmanager
    def restoring(self) -> Iterator[Read]:
        yield read_like
        self.restored()

    def refresh(self) -> None: ...


class Reducer(Protocol):
    """Bring the gradients of all ranks and passes together, and step the optimizer.

    A step is: ``accumulation`` times ``micro``, ``forward`` and ``backward``, then ``reduce``, then ``step`` or
    ``drop``.

    Attributes:
        tuned: the optimizer of the parameters that are trained.
        mean_over: by how many the summed gradient is divided: ranks where it is a mean, else 1.
        lockstep: a forward sends messages, so all ranks run as many.
        shares_buffers: buffers are rank 0's in each step, or the same on all ranks anyway.
    """

    tuned: Tuned
    mean_over: int
    lockstep: bool
    shares_buffers: bool

    @property
    def storage(self) -> Storage:
        """Where the parameters that are trained are kept."""

    @property
    def observed(self) -> Sequence[nn.Parameter]:
        """Parameters; the gradients that one backward gives them are those of its pass."""

    @property
    def trails(self) -> Lockstep | None:
        """What compares the modules that ranks run; None: they may differ."""

    def micro(self, cut: Cut, last: bool) -> AbstractContextManager[Any]:
        """Around one pass, perhaps the ``last``, of a step that is cut so."""

    def forward(self, work: Callable[[], Found]) -> Found:
        """Return what ``work`` returns: the loss of a pass."""

    def call(self, work: Callable[[], Found]) -> Found:
        """Return what ``work`` returns, which calls the model outside of a step."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a pass to the step's."""

    def reduce(self) -> Number:
        """Sum gradients and riders over the ranks, as far as the backwards haven't; return the gradient's norm."""

    def step(self, factor: Number) -> None:
        """Multiply the summed gradient, step the optimizer, drop the gradient."""

    def drop(self) -> None:
        """Drop the gradient."""

    def explain(self, text: str) -> UserError | None:
        """Return what to say for an error of torch's with this text; None: nothing better."""
