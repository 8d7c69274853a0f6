"""Let a task and its model compute on copies of what they hold, so that calls leave no trace."""

from __future__ import annotations

import pickle
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy as shallow_copy
from copy import deepcopy
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import Dataset

Value = TypeVar("Value")

MODULES_OWN = (
    "training",
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
)  # plain attributes are the others
CONTAINERS = (dict, list, tuple, deque, set)
GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
COPIED = (*CONTAINERS, *GENERATORS, Tensor, np.ndarray)  # what calls may change in place
COPIED_BYTES = 1 << 24  # at most, of a tensor or an array that is a plain attribute
COPIED_ENTRIES = 1000  # at most, of a container
OBJECTS_DEPTH = 2  # of objects that are held by objects


class Copies:
    """Hold the originals of what a task, its model and the objects that they hold are about to change.

    These are parameters, buffers and modes of all modules, and the plain attributes of all objects.

    Args:
        task: the user's object.
        device: where the copies of the model's tensors are. Those of other modules are where their originals are.
    """

    def __init__(self, task: Any, model: nn.Module, device: torch.device) -> None:
        self._model = model
        self._objects = dict(_objects(task, model))
        self._attributes = {name: dict(_plain(one)) for name, one in self._objects.items()}
        modules = {one: None for one in self._objects.values() if isinstance(one, nn.Module)}  # a teacher's, say
        self._modules = {**modules, **dict.fromkeys(model.modules(), device)}
        self._parameters = {
            parameter: (parameter.data, place)
            for one, place in self._modules.items()
            for parameter in one.parameters(recurse=False)
        }
        self._buffers = {one: dict(one._buffers) for one in self._modules}
        self._modes = {one: one.training for one in self._modules}

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within, everything computes on copies; afterwards, also where the device has no room, on the originals."""
        try:
            for parameter, (original, place) in self._parameters.items():
                parameter.data = original.to(place, copy=True)
            self.reset()
            yield
        finally:
            for parameter, (original, _) in self._parameters.items():
                parameter.data = original
            for one, training in self._modes.items():
                one.training = training
            self._put(self._buffers, self._attributes)

    def reset(self) -> None:
        """Give buffers and attributes new copies of the originals."""
        copies: dict[int, Any] = {}  # what two objects share stays one
        buffers = {
            one: {name: _copy(buffer, copies, self._modules[one]) for name, buffer in named.items()}
            for one, named in self._buffers.items()
        }

        def copy(value: Any) -> Any:
            return _copy(value, copies) if _is_small(value) else value

        def copies_of(held: dict[str, Any]) -> dict[str, Any]:
            return {k: tree_map(copy, v, is_leaf=_is_large) if isinstance(v, COPIED) else v for k, v in held.items()}

        self._put(buffers, {name: copies_of(held) for name, held in self._attributes.items()})

    def _put(self, buffers: dict[nn.Module, dict[str, Tensor | None]], attributes: dict[str, dict[str, Any]]) -> None:
        for module, named in buffers.items():
            module._buffers.clear()
            module._buffers.update(named)
        for name, one in self._objects.items():
            for key in _plain(one).keys() - attributes[name].keys():
                del vars(one)[key]
            vars(one).update(attributes[name])

    def moved_by(self, call: Callable[[], Any]) -> list[str]:
        """Call it twice and return the names of the numbers that the second call moves; the first may fill caches."""
        call()
        before = self._numbers()
        call()
        after = self._numbers()
        return [name for name in after if name in before and before[name] != after[name]]

    def _numbers(self) -> dict[str, Any]:
        """Return the numbers in attributes and in the model's buffers by name."""
        held = {f"{name}.{key}": value for name, one in self._objects.items() for key, value in _plain(one).items()}
        numbers = {name: _number(value) for name, value in held.items()}
        return numbers | {f"model.{name}": _bits(buffer) for name, buffer in self._model.named_buffers()}


def copied(value: Value) -> Value:
    """Return a deep copy where there can be one, else the value itself."""
    try:
        return deepcopy(value)
    except Exception:
        return value


def _copy(value: Any, copies: dict[int, Any], place: torch.device | None = None) -> Any:
    """Return a copy of a tensor, an array or a generator, the same for the same one; a container's is shallow."""
    if value is None or id(value) in copies:
        return copies.get(id(value))
    if isinstance(value, Tensor):
        copies[id(value)] = value.detach().to(place, copy=True).requires_grad_(value.requires_grad)
    else:
        copies[id(value)] = copied(value) if isinstance(value, GENERATORS) else shallow_copy(value)
    return copies[id(value)]


def _is_small(value: Any) -> bool:
    """Tell whether calls may change ``value`` in place, and it isn't too large to be copied each time."""
    if isinstance(value, nn.Parameter):  # an LSTM lists its own; they are copied as such
        return False
    size = value.numel() * value.element_size() if isinstance(value, Tensor) else getattr(value, "nbytes", 0)
    return isinstance(value, COPIED) and not _is_large(value) and size <= COPIED_BYTES


def _is_large(value: Any) -> bool:
    return isinstance(value, CONTAINERS) and len(value) > COPIED_ENTRIES


def _number(value: Any) -> Any:
    """Return what is equal for equal numbers, bit by bit; None for what holds none, or too many."""
    if isinstance(value, CONTAINERS) and _is_small(value):
        return [_number(entry) for entry in (value.values() if isinstance(value, dict) else value)]
    if isinstance(value, np.ndarray) and value.dtype.hasobject:
        return None
    return _bits(value) if isinstance(value, int | float | complex | np.generic) or _is_small(value) else None


def _bits(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        value = value.get_state()
    if not isinstance(value, Tensor):
        return pickle.dumps(value)
    plain = value.detach().to_dense().cpu().resolve_conj().resolve_neg().contiguous()
    return value.shape, plain.reshape(-1).view(torch.uint8).numpy().tobytes()  # pickled, it would have an address


def _objects(task: Any, model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the task, the modules of the model and of the task, and what these hold two levels down, with names."""
    seen = set[int]()
    level = [("task", task), *_modules("model", model)]
    for _ in range(OBJECTS_DEPTH + 1):
        new, level = [(name, one) for name, one in level if hasattr(one, "__dict__")], []
        for name, one in new:
            if id(one) not in seen:
                seen.add(id(one))
                yield name, one
                for place, held in _held(_plain(one)):
                    level += _modules(f"{name}.{place}", held)


def _held(attributes: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the modules and plain objects among some attributes, and in small lists and mappings there, with names."""
    for key, value in attributes.items():
        if isinstance(value, dict | list | tuple) and not _is_large(value):
            inside = value.items() if isinstance(value, dict) else enumerate(value)
            yield from ((f"{key}.{place}", held) for place, held in inside if _is_looked_into(held))
        elif _is_looked_into(value):
            yield key, value


def _modules(prefix: str, one: Any) -> list[tuple[str, Any]]:
    """Return the submodules of a module, with itself, by name; any other object alone."""
    inner = one.named_modules() if isinstance(one, nn.Module) else [("", one)]
    return [(f"{prefix}.{name}" if name else prefix, module) for name, module in inner]


def _is_looked_into(value: Any) -> bool:
    """Tell whether ``value`` is a module, or of a class that is neither Python's, torch's nor numpy's; no dataset."""
    foreign = type(value).__module__.partition(".")[0] in ("builtins", "torch", "numpy", *sys.stdlib_module_names)
    return isinstance(value, nn.Module) or not (foreign or isinstance(value, type | Dataset))


def _plain(one: Any) -> dict[str, Any]:
    module = isinstance(one, nn.Module)
    return {k: v for k, v in vars(one).items() if not (module and (k in MODULES_OWN or "_hooks" in k))}
