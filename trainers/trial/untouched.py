"""Call a task and its model and leave no trace: tensors and attributes are put back bit by bit."""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Iterator
from copy import deepcopy
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
MODULES_OWN = ("training", "_parameters", "_buffers", "_modules")  # on_copies puts them back
COPIED_BYTES = 1 << 24  # at most, of a tensor or an array that is a plain attribute
OBJECTS_DEPTH = 2  # of objects that are held by objects
COPIED_ENTRIES, COPIED_DEPTH = 1000, 3  # at most, of a list or mapping of numbers


class Copies:
    """Within, ``module`` computes on copies of its parameters and buffers; afterwards it has the originals again.

    Args:
        device: where the copies are; None: each where its original is.
        without: a model that has copies of its own, which ``module`` may contain.
    """

    def __init__(self, module: nn.Module, device: torch.device | None = None, without: nn.Module | None = None) -> None:
        self._device = device
        copied = set(without.modules()) if without else set[nn.Module]()
        apart = [one for one in module.modules() if one not in copied]
        parameters = dict.fromkeys(parameter for one in apart for parameter in one.parameters(recurse=False))
        self._parameters = [(parameter, parameter.data) for parameter in parameters]
        self._buffers = [(one, dict(one._buffers)) for one in apart]
        self._modes = [(one, one.training) for one in apart]

    def __enter__(self) -> Copies:
        try:
            for parameter, original in self._parameters:
                parameter.data = original.to(self._device, copy=True)
            self.reset_buffers()
        except BaseException:  # the device has no room for all of them
            self.__exit__()
            raise
        return self

    def reset_buffers(self) -> None:
        """Copy the original buffers once more."""
        copies = dict[int, Tensor]()  # a buffer that two modules share stays one
        for one, originals in self._buffers:
            self._put(one, {name: self._copy(buffer, copies) for name, buffer in originals.items()})

    def buffers(self) -> dict[tuple[str, str], Any]:
        """Return copies of the buffers as they are now, by the number of their module and their name."""
        found = [(index, name, b) for index, (one, _) in enumerate(self._buffers) for name, b in one._buffers.items()]
        return {(str(index), name): b.detach().clone() for index, name, b in found if b is not None}

    def __exit__(self, *error: object) -> None:
        for parameter, original in self._parameters:
            parameter.data = original
        for one, originals in self._buffers:
            self._put(one, originals)
        for one, training in self._modes:
            one.training = training

    def _copy(self, buffer: Tensor | None, copies: dict[int, Tensor]) -> Tensor | None:
        if buffer is None:
            return None
        return copies.setdefault(id(buffer), buffer.to(self._device, copy=True))

    def _put(self, one: nn.Module, buffers: dict[str, Tensor | None]) -> None:
        one._buffers.clear()
        one._buffers.update(buffers)


class Attributes:
    """The plain attributes of a task, of its modules and of the objects that they hold.

    Args:
        model: whose modules' attributes count as well.
    """

    def __init__(self, task: Any, model: nn.Module) -> None:
        self._objects = dict(_objects(task, model))
        self._before = {name: dict(_plain(one)) for name, one in self._objects.items()}
        self._numbers = self.numbers()

    def modules_apart_from(self, model: nn.Module) -> list[nn.Module]:
        """Return the modules that task and model hold beside ``model``: an attribute of the task, or in a list."""
        known, apart = set(model.modules()), []
        for one in self._objects.values():
            if isinstance(one, nn.Module) and one not in known:
                known.update(one.modules())
                apart.append(one)
        return apart

    def numbers(self) -> dict[tuple[str, str], Any]:
        """Return a copy of the numbers in every attribute, by the object's name and the attribute's."""
        copies = {
            (name, key): _copied(value) for name, one in self._objects.items() for key, value in _plain(one).items()
        }
        return {place: copy for place, copy in copies.items() if copy is not None}

    def restore(self) -> None:
        """Put back every attribute that was set, added or deleted, and the numbers that changed in place."""
        for name, one in self._objects.items():
            attributes, before = vars(one), self._before[name]
            for key in dict(_plain(one)).keys() - before.keys():
                del attributes[key]
            for key, value in before.items():
                attributes[key] = value
                if (name, key) in self._numbers:
                    _put_back(value, self._numbers[name, key])


def moved(before: dict[tuple[str, str], Any], after: dict[tuple[str, str], Any]) -> list[str]:
    """Return the names of the attributes whose numbers differ."""
    return [".".join(place) for place in after if place in before and not _equal(before[place], after[place])]


def _objects(task: Any, model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the task, the modules of the model and of the task, and what these hold two levels down, with names."""
    seen = set[int]()
    level = [("task", task), *_modules("model", model)]
    for _ in range(OBJECTS_DEPTH + 1):
        new = [(name, one) for name, one in level if hasattr(one, "__dict__")]
        level = []
        for name, one in new:
            if id(one) not in seen:
                seen.add(id(one))
                yield name, one
                for place, held in _held(_plain(one)):
                    path = f"{name}.{place}"
                    level += _modules(path, held) if isinstance(held, nn.Module) else [(path, held)]


def _held(attributes: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the modules and plain objects among some attributes, and in small lists and mappings there, with names."""
    for key, value in attributes.items():
        if _is_looked_into(value):
            yield key, value
        elif isinstance(value, dict | list | tuple) and len(value) <= COPIED_ENTRIES:
            inside = value.items() if isinstance(value, dict) else enumerate(value)
            yield from ((f"{key}.{place}", held) for place, held in inside if _is_looked_into(held))


def _modules(prefix: str, module: nn.Module) -> list[tuple[str, Any]]:
    return [(f"{prefix}.{name}" if name else prefix, one) for name, one in module.named_modules()]


def _is_looked_into(value: Any) -> bool:
    """Tell whether ``value`` is a module, or of a class that is neither Python's, torch's nor numpy's; no dataset."""
    foreign = type(value).__module__.partition(".")[0] in ("builtins", "torch", "numpy", *sys.stdlib_module_names)
    return isinstance(value, nn.Module) or not (foreign or isinstance(value, type | Dataset))


def _plain(one: Any) -> dict[str, Any]:
    if not hasattr(one, "__dict__"):
        return {}
    module = isinstance(one, nn.Module)
    return {k: v for k, v in vars(one).items() if not (module and (k in MODULES_OWN or k.endswith("_hooks")))}


def _copied(value: Any, depth: int = COPIED_DEPTH) -> Any:
    """Return a copy of the numbers in ``value``; None where there are none, or too many."""
    if isinstance(value, bool | int | float | complex | np.generic):
        return value
    if isinstance(value, nn.Parameter):
        return None  # as an LSTM lists its own
    if isinstance(value, Tensor) and value.layout is torch.strided and value.nbytes <= COPIED_BYTES:
        return value.detach().clone()
    if isinstance(value, np.ndarray) and not value.dtype.hasobject and value.nbytes <= COPIED_BYTES:
        return np.array(value)
    if isinstance(value, GENERATORS):
        return _state(value)
    if isinstance(value, dict | list | tuple | deque) and depth and len(value) <= COPIED_ENTRIES:
        if isinstance(value, dict):
            return {key: _copied(inner, depth - 1) for key, inner in value.items()}
        return [_copied(inner, depth - 1) for inner in value]
    return None


def _state(generator: Any) -> Any:
    """Return a copy of the state of a generator of random numbers."""
    if isinstance(generator, np.random.Generator):
        return deepcopy(generator.bit_generator.state)
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


def _put_back(value: Any, copy: Any) -> Any:
    """Return ``value`` with the numbers of ``copy``, in place where that can be."""
    if copy is None or _equal(_copied(value), copy):
        return value
    if isinstance(value, GENERATORS):
        _set_state(value, copy)
    elif isinstance(copy, dict) and isinstance(value, dict):
        for key in value.keys() - copy.keys():
            del value[key]
        value.update({key: _put_back(value.get(key), inner) for key, inner in copy.items()})
    elif isinstance(copy, list) and isinstance(value, list | deque):
        before = [_put_back(inner, one) for inner, one in zip_longest([*value][: len(copy)], copy)]
        value.clear()
        value.extend(before)
    elif isinstance(copy, list) and isinstance(value, tuple):
        for inner, one in zip(value, copy, strict=True):
            _put_back(inner, one)
    elif isinstance(copy, Tensor) and isinstance(value, Tensor):
        with torch.no_grad():
            value.copy_(copy)
    elif isinstance(copy, np.ndarray) and isinstance(value, np.ndarray):
        value[...] = copy
    else:
        return copy
    return value


def _equal(before: Any, after: Any) -> bool:
    if type(before) is not type(after):
        return False
    if isinstance(before, dict):
        return before.keys() == after.keys() and all(_equal(before[key], after[key]) for key in before)
    if isinstance(before, list | tuple):
        return len(before) == len(after) and all(map(_equal, before, after))
    if isinstance(before, Tensor):
        alike = before.shape == after.shape and before.device == after.device
        return alike and bool(((before == after) | (before.isnan() & after.isnan())).all())
    if isinstance(before, np.ndarray):
        return np.array_equal(before, after) or repr(before) == repr(after)
    return bool(before == after or before != before)
