"""The layout of ZeRO's flat tensors, and views of them as parts of the model's parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from isobatch.scaling.errors import UserError
from isobatch.trainers.engines.reducer import Read, Storage
from isobatch.trainers.tensors.sharding import Part
from isobatch.trainers.tensors.slices import Reader


@dataclass(frozen=True, slots=True)
class Span:
    """This rank's elements [start, start + size) of a parameter of ``shape``, at ``offset`` in a flat tensor."""

    shape: tuple[int, ...]
    start: int
    size: int
    offset: int

    def of(self, flat: Tensor) -> Part:
        """Return the view of these elements in ``flat``, which has the length of the flat tensor."""
        return Part(self.shape, self.start, flat.detach()[self.offset : self.offset + self.size])


@dataclass(frozen=True, slots=True)
class Flat:
    """A flat tensor that the optimizer steps: parts of parameters, one after another, and padding.

    Attributes:
        master: the flat tensor, 1-D; its elements are trained.
        group: index of the optimizer's group.
        spans: spans by parameter, in the order of the group; empty for a parameter of which this rank has no part.
    """

    master: Any
    group: int
    spans: dict[Tensor, Span]


def _by_group(zero: Any) -> Iterator[Flat]:
    """Yield the flat tensors of stages 1 and 2, which concatenate a group's parameters and split the result equally."""
    for group, master in enumerate(zero.single_partition_of_fp32_groups):
        begin, spans = dist.get_rank() * master.numel(), dict[Tensor, Span]()
        parameters, offsets = zero.round_robin_bit16_groups[group], zero.round_robin_bit16_offsets[group]
        for parameter, offset in zip(parameters, offsets, strict=True):
            start, stop = (min(max(at - offset, 0), parameter.numel()) for at in (begin, begin + master.numel()))
            spans[parameter] = Span(tuple(parameter.shape), start, stop - start, max(offset - begin, 0))
        yield Flat(master, group, {parameter: spans[parameter] for parameter in zero.bit16_groups[group]})


def _by_parameter(zero: Any) -> Iterator[Flat]:
    """Yield the flat tensors of stage 3, which splits every parameter equally and concatenates the parts."""
    for index, master in enumerate(zero.fp32_partitioned_groups_flat):
        offset, spans = 0, dict[Tensor, Span]()
        for parameter in zero.fp16_groups[index]:
            spans[parameter] = span_of(parameter, offset)
            offset += parameter.partition_numel()
        yield Flat(master, zero.sub_group_to_group_id[index], spans)


def span_of(parameter: Any, offset: int = 0) -> Span:
    """Return this rank's span of a parameter in stage 3; the last ranks' spans may be shorter, or empty."""
    each, whole = parameter.partition_numel(), parameter.ds_numel
    start = min(dist.get_rank() * each, whole)
    return Span(tuple(parameter.ds_shape), start, min(each, whole - start), offset)


class FlatStorage(Storage):
    """Store the trained parameters in flat tensors, and show the optimizer as one of the model's parameters.

    Args:
        zero: DeepSpeed's optimizer.
        optimizer: the user's optimizer, which steps the flat tensors.
        groups: the parameters of the optimizer's groups before DeepSpeed flattened them.
    """

    def __init__(
        self, model: nn.Module, zero: Any, stage: int, optimizer: Optimizer, groups: Sequence[list[Tensor]]
    ) -> None:
        super().__init__(model)
        self._zero, self._stage, self._optimizer, self._groups = zero, stage, optimizer, groups
        self.flats = list(_by_parameter(zero) if stage == 3 else _by_group(zero))
        self._spans = {parameter: span for flat in self.flats for parameter, span in flat.spans.items()}

    def parts(self) -> Mapping[str, Tensor | Part]:
        trained = {p: span.of(flat.master) for flat in self.flats for p, span in flat.spans.items()}
        return {name: trained.get(p) or self._frozen(p) for name, p in self.model.named_parameters()}

    def _frozen(self, parameter: Any) -> Part | Tensor:
        return span_of(parameter).of(parameter.ds_tensor) if self._stage == 3 else parameter.detach()

    def refresh(self) -> None:
        if self._stage < 3:
            self._zero.update_lp_params()
            return
        self._zero.checkpoint_event_prologue()  # drop gathered weights
        for index in range(len(self.flats)):
            self._zero._reassign_or_swap_out_partitioned_parameters(index)

    @contextmanager
    def optimizer_seen(self) -> Iterator[None]:
        """Put the model's parameters into the optimizer's groups and state. Raise UserError if it doesn't fit."""
        optimizer = self._optimizer
        flat, groups = optimizer.state, [group["params"] for group in optimizer.param_groups]
        try:
            optimizer.state = defaultdict(dict, self._unflattened(flat))
            self._exchange(self._groups)
            yield
        finally:
            optimizer.state = flat
            self._exchange(groups)

    @contextmanager
    def restoring(self) -> Iterator[Read]:
        self._optimizer.state.clear()
        with self.optimizer_seen():
            yield self._read
            found = self._optimizer.state
        for flat in self.flats:
            states = [found[parameter] for parameter in flat.spans if parameter in found]
            for key in dict.fromkeys(key for state in states for key in state):
                self._optimizer.state[flat.master][key] = self._flattened(flat, key, found)
                for state in states:  # free each part once it is flat: two copies may not fit in memory
                    state.pop(key, None)
        self.refresh()

    def _read(self, parameter: Tensor, reader: Reader, name: str, device: torch.device) -> Tensor:
        """Return this rank's elements, on the CPU until they are flattened, or a scalar."""
        span = self._spans[parameter]
        if reader.tensors[name].shape == span.shape and (span.shape or not _one_for_all(reader, name)):
            return reader(name, span.start, span.start + span.size)
        return reader.whole(name).to(device)

    def _exchange(self, groups: Sequence[list[Any]]) -> None:
        for group, parameters in zip(self._optimizer.param_groups, groups, strict=True):
            group["params"] = parameters

    def _unflattened(self, state: Mapping[Tensor, dict[str, Any]]) -> dict[Tensor, dict[str, Any]]:
        return {
            parameter: {key: self._part(flat, span, key, value) for key, value in state[flat.master].items()}
            for flat in self.flats
            if flat.master in state
            for parameter, span in flat.spans.items()
        }

    def _part(self, flat: Flat, span: Span, key: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        if value.shape != flat.master.shape:
            state = f"a {key} of shape {list(value.shape)} for {flat.master.numel()} elements"
            problem = f"the optimizer {type(self._optimizer).__name__} keeps {state}, but DeepSpeed needs one number"
            raise UserError(f"{problem} per element", "use engine=ddp", "optimizer")
        return span.of(value)

    def _flattened(self, flat: Flat, key: str, states: Mapping[Tensor, dict[str, Any]]) -> Any:
        """Return the state ``key`` for all of ``flat``, made of its parameters' states."""
        values = {parameter: states[parameter][key] for parameter in flat.spans if key in states.get(parameter, {})}
        first = next(iter(values.values()))
        if not isinstance(first, Tensor) or first.ndim == 0:
            if any(value != first for value in values.values()):
                problem = f"the checkpoint has different {key} for parameters of a group, but DeepSpeed keeps one"
                raise UserError(problem, "use engine=ddp", "engine")
            return first.cpu() if isinstance(first, Tensor) and flat.master.is_cpu else first
        whole = torch.zeros_like(flat.master, dtype=first.dtype, requires_grad=False)
        for parameter, value in values.items():
            flat.spans[parameter].of(whole).data.copy_(value)
        return whole


def _one_for_all(reader: Reader, name: str) -> bool:
    """Return whether the state ``name`` of a 0-dim parameter is a scalar for parameters with dimensions, too."""
    key = name.rpartition("/")[2]
    scalars = [other for other, stored in reader.tensors.items() if other.endswith(f"/{key}") and not stored.shape]
    owners = [other.removeprefix("optim/").removesuffix(f"/{key}") for other in scalars if other.startswith("optim/")]
    return key == "step" or any(reader.tensors[f"model/{owner}"].shape for owner in owners)
