"""Estimate the memory of a training step without allocating it, on fake tensors, which have shapes and no memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from isobatch.scaling.rules import Recipe
from isobatch.scaling.tuning.footprint import Footprint, Pass, settled
from isobatch.trainers.model.build import is_called, prepare
from isobatch.trainers.model.modes import Modes
from isobatch.trainers.model.precision import autocast
from isobatch.trainers.model.randomness import Stream, generators_kept, seed_generators
from isobatch.trainers.optim.make import make_optimizer
from isobatch.trainers.ranks.internals import disable_current_modes, fake_tensor_mode, tree_map_only
from isobatch.trainers.tasks.task import Task, make_model
from isobatch.trainers.tuning.storages import CUDA_BLOCK, Storages, bytes_of, tensors_in

if TYPE_CHECKING:
    from isobatch.conf.schema import RunConfig
    from isobatch.trainers.ranks.internals import FakeTensorMode

MOST_SIZES = 6  # sizes that are traced until consecutive slopes are equal
TRACED_BYTES = 64_000_000  # of the largest batch that is collated to be traced
CPU = torch.device("cpu")


class Shapes(Stream):
    """A stream for fake tensors: its keys have a shape only."""

    def keys(self, layer: int) -> Tensor:
        return torch.empty(2, self.samples, 1, dtype=torch.int32)


@dataclass(frozen=True, slots=True)
class Subject:
    """What is traced.

    Attributes:
        batch: returns a batch of that many samples, each as large as the largest one that was seen.
        least: the smallest size to trace. A small one needs so little that gradients hide it.
        on_gpu: the memory is a GPU's.
        sizes: the sizes to trace, each in one pass, to be quick; none: from ``least`` on, until memory is linear.
    """

    config: RunConfig
    task: Task
    recipe: Recipe
    batch: Callable[[int], Any]
    least: int
    on_gpu: bool
    sizes: tuple[int, ...] = ()

    def with_config(self, **changes: Any) -> Subject:
        """Return the subject with other sections of the config."""
        return replace(self, config=self.config.model_copy(update=changes))


def trace(subject: Subject, process: int = 0) -> Footprint:
    """Return the parts of a step's memory on one rank; without its passes if the forward can't run on fake tensors.

    Args:
        process: bytes of the process without the model.
    """
    with generators_kept():
        seed_generators(subject.config.seed)
        mode = _fake_mode()
        storages = Storages(CUDA_BLOCK if subject.on_gpu else 1)
        with mode, storages:
            return replace(_traced(subject, mode, storages), process=process)


def _traced(subject: Subject, mode: FakeTensorMode, storages: Storages) -> Footprint:
    config = subject.config.model_copy(update={"compile": False})
    stream = Shapes(config.seed, CPU, lambda text: None)
    model = prepare(_model(subject, mode), config, stream, ranks=1)
    Modes(model).train()
    parameters, buffers = bytes_of(model.parameters()), bytes_of(model.buffers())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = bytes_of(trained)
    named = fsdp_blocks(model)
    blocks = [bytes_of(block.parameters()) for block in named.values()]
    tracer = Tracer(subject, model, stream, mode, storages)
    optimizer, update = tracer.optimizer_step(trained)
    passes, why_not = tracer.passes()
    return Footprint(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        buffers=buffers * (1 + (config.on_nonfinite == "skip" or config.precision == "fp16")),
        update=update,
        average=gradients if config.ema else 0,
        block=max(blocks, default=0),
        rest=parameters - sum(blocks),
        blocks=patterns(named),
        passes=tuple(passes),
        why_not=why_not,
    )


class Tracer:
    """Run steps on fake tensors and measure their memory."""

    def __init__(
        self, subject: Subject, model: nn.Module, stream: Stream, mode: FakeTensorMode, storages: Storages
    ) -> None:
        self._subject, self._model, self._stream, self._mode, self._storages = subject, model, stream, mode, storages

    def optimizer_step(self, trained: Sequence[nn.Parameter]) -> tuple[int, int]:
        """Return the bytes of the optimizer's state, and those of temporary tensors in its second step."""
        config, storages = self._subject.config, self._storages
        if config.optimizer.name in ("lamb", "lars"):  # their C kernels need memory
            args = {**config.optimizer.args, "native": False}
            config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"args": args})})
        optimizer = make_optimizer(config, self._subject.task, self._model, self._subject.recipe).optimizer
        for _ in range(2):
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
            storages.reset_peak()
            before = storages.now
            optimizer.step()
            update = storages.peak - before
            optimizer.zero_grad(set_to_none=True)
        return bytes_of(tensors_in(list(optimizer.state.values()))), update

    def passes(self) -> tuple[list[Pass], str]:
        """Return passes of ascending sizes, until their memory is linear in the size; or why there are none."""
        found: list[Pass] = []
        try:
            for size in self._subject.sizes or [self._subject.least << doubled for doubled in range(MOST_SIZES)]:
                if not settled(found) or self._subject.sizes:
                    found.append(self._pass(size))
        except Exception as error:
            if len(found) < 2:
                return [], f"{type(error).__name__}: {error}".splitlines()[0]
        return found, ""

    def _pass(self, samples: int) -> Pass:
        """Return the memory of two passes over ``samples`` samples; the second adds to the gradients of the first."""
        storages, trained = self._storages, [p for p in self._model.parameters() if p.requires_grad]
        with unfaked():
            real = self._subject.batch(samples)
        batch = fake(real, self._mode)
        lasting = storages.now
        storages.add(tensors_in(batch))
        alone = 0 if self._subject.sizes else self._peak(batch, samples) - lasting
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        lasting += bytes_of(parameter.grad for parameter in trained if parameter.grad is not None)
        held = self._peak(batch, samples) - lasting
        self._model.zero_grad(set_to_none=True)
        gradients = bytes_of(trained)
        return Pass(samples, alone or held + gradients, held)

    def _peak(self, batch: Any, samples: int) -> int:
        """Return the peak of a forward and backward."""
        self._storages.reset_peak()
        self._stream.start(0, samples)
        with autocast(self._subject.config.precision, CPU):
            loss = loss_of(self._subject.task.loss(self._model, batch))
        (loss / samples).backward()
        return self._storages.peak


def traced_from(sample_bytes: int, granule: int) -> int:
    """Return the smallest size to trace: at least 2, at most 16, so that the batches that are collated stay small."""
    size = min(16, max(2, TRACED_BYTES // (4 * max(1, sample_bytes))))
    return -(-size // granule) * granule


def loss_of(result: Any) -> Tensor:
    """Return the sum of the losses in the result of a task's loss; see tasks/losses.py for its forms."""
    if isinstance(result, tuple) and len(result) > 1 and isinstance(result[-1], dict):
        result = result[0] if len(result) == 2 else result[:-1]
    first = result[0] if isinstance(result, tuple) else result
    return first.float().sum()  # type: ignore[no-any-return]


def fake(value: Any, mode: FakeTensorMode) -> Any:
    """Return ``value`` with fake tensors in place of real ones."""
    return tree_map_only(Tensor, mode.from_tensor, value)


def fsdp_blocks(model: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """Return the modules that engine=fsdp shards as one group each by default: the elements of outer ModuleLists."""
    found: dict[str, nn.Module] = {}
    for name, child in model.named_children():
        if isinstance(model, nn.ModuleList) and is_called(child):
            found[f"{prefix}{name}"] = child
        else:
            found |= fsdp_blocks(child, f"{prefix}{name}.")
    return found


def patterns(names: Iterable[str]) -> str:
    """Return the patterns that match elements of ModuleLists, such as ``blocks.*``."""
    return ",".join(dict.fromkeys(f"{name.rpartition('.')[0]}.*" for name in names))


def _fake_mode() -> FakeTensorMode:
    """Return a mode that is one object, however often a module that holds its tensors is copied."""
    mode: FakeTensorMode = fake_tensor_mode()(allow_non_fake_inputs=True)
    mode.__deepcopy__ = lambda memo: mode  # type: ignore[attr-defined]  # nn.TransformerEncoder copies its layer
    return mode


def _model(subject: Subject, mode: FakeTensorMode) -> nn.Module:
    """Return the task's model on fake tensors; one that can't be made of them is made, and then converted."""
    try:
        return make_model(subject.config, subject.task)
    except Exception:  # whatever the user's code does with a tensor that has no values
        with unfaked():
            model = make_model(subject.config, subject.task)
        return converted(model, mode)


@contextmanager
def unfaked() -> Iterator[None]:
    """Leave the modes inside this block."""
    with disable_current_modes():
        yield


def converted(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Replace the tensors of ``model`` by fake ones, in place; shared ones stay shared."""
    known: dict[Tensor, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in known:
                    known[parameter] = nn.Parameter(mode.from_tensor(parameter.detach()), parameter.requires_grad)
                module._parameters[name] = known[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                known.setdefault(buffer, mode.from_tensor(buffer))
                module._buffers[name] = known[buffer]
    return model
