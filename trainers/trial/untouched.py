"""Let a task and its model compute on copies, and restore what they change, so that calls leave no trace."""

from __future__ import annotations

import pickle
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

Value = TypeVar("Value")

GENERATORS: dict[type, tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]] = {  # how to read and set the state
    torch.Generator: (torch.Generator.get_state, torch.Generator.set_state),
    random.Random: (random.Random.getstate, random.Random.setstate),
    np.random.RandomState: (np.random.RandomState.get_state, np.random.RandomState.set_state),
    np.random.Generator: (
        lambda generator: deepcopy(generator.bit_generator.state),
        lambda generator, state: setattr(generator.bit_generator, "state", state),
    ),
}
MODULES_OWN = ("training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
COPIED_BYTES = 1 << 24  # limit of a tensor or an array in a plain attribute
COPIED_ENTRIES, COPIED_DEPTH = 1000, 3  # limits of a container, and of nested containers
OBJECTS_DEPTH = 2  # levels of objects held by other objects


class Copies:
    """Hold the state of a task, its model and their objects, to restore it after calls that change it.

    Parameters and buffers are replaced by copies. Plain attributes stay the same objects, since closures and other
    objects may refer to them; their numbers and entries are restored in place.

    Args:
        task: the user's object.
        device: device of the copies of the model's tensors; other modules are copied where they are.
    """

    def __init__(self, task: Any, model: nn.Module, device: torch.device) -> None:
        self._model = model
        self._objects = dict(_objects(task, model))
        self._attributes = {name: dict(_plain(one)) for name, one in self._objects.items()}
        self._snapshots = [Snapshot(value) for held in self._attributes.values() for value in held.values()]
        inside: dict[nn.Module, torch.device | None] = dict.fromkeys(model.modules(), device)
        outside = [one for one in self._objects.values() if isinstance(one, nn.Module) and one not in inside]
        # the model's modules come last, so that the tensors they share with others (a teacher) are on its device
        modules = dict.fromkeys(outside) | inside
        self._parameters = {
            parameter: (parameter.data, place)
            for one, place in modules.items()
            for parameter in one.parameters(recurse=False)
        }
        self._places = {buffer: place for one, place in modules.items() for buffer in one.buffers(recurse=False)}
        self._buffers = {one: dict(one._buffers) for one in modules}
        self._modes = {one: one.training for one in modules}

    @contextmanager
    def held(self) -> Iterator[None]:
        """Compute on copies inside the context; restore everything on exit, even if the device has no room for them."""
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
            for one, buffers in self._buffers.items():
                _replace(one._buffers, buffers)
            self._restore_attributes()

    def reset(self) -> None:
        """Give the modules new copies of their buffers, and restore the attributes."""
        copies = {buffer: buffer.to(place, copy=True) for buffer, place in self._places.items()}
        for one, buffers in self._buffers.items():  # a buffer that two modules share stays shared
            fresh = {name: None if buffer is None else copies[buffer] for name, buffer in buffers.items()}
            _replace(one._buffers, fresh)
        self._restore_attributes()

    def _restore_attributes(self) -> None:
        """Restore attributes that were set, added or deleted, and the numbers and entries that changed in place."""
        for name, one in self._objects.items():
            for key in _plain(one).keys() - self._attributes[name].keys():
                del vars(one)[key]
            vars(one).update(self._attributes[name])
        for snapshot in self._snapshots:
            snapshot.restore()

    def moved_by(self, call: Callable[[], Any]) -> list[str]:
        """Return the names of the numbers that a second ``call()`` changes; the first call may fill caches."""
        call()
        before = self._numbers()
        call()
        after = self._numbers()
        return [name for name in after if name in before and before[name] != after[name]]

    def _numbers(self) -> dict[str, Any]:
        """Return the numbers in attributes and in the model's buffers, by name."""
        held = {f"{name}.{key}": value for name, one in self._objects.items() for key, value in _plain(one).items()}
        numbers: dict[str, Any] = {name: Snapshot(value).numbers for name, value in held.items()}
        return numbers | {f"model.{name}": _bits(buffer) for name, buffer in self._model.named_buffers()}


class Snapshot:
    """Record the numbers and entries in a value: in a tensor, an array, a generator or nested containers of these.

    Attributes:
        numbers: the numbers by the keys that lead to them, comparable bit by bit; of a container its length.
    """

    def __init__(self, value: Any) -> None:
        self.numbers: dict[tuple[Any, ...], Any] = {}
        self._undo: list[Callable[[], Any]] = []
        self._take(value, ())

    def restore(self) -> None:
        """Restore the numbers and entries in place."""
        for undo in self._undo:
            undo()

    def _take(self, value: Any, place: tuple[Any, ...]) -> None:
        if isinstance(value, dict | list | tuple | deque | set):
            if len(place) < COPIED_DEPTH and len(value) <= COPIED_ENTRIES:
                self.numbers[place], entries = len(value), _entries(value)
                if not isinstance(value, tuple):
                    self._undo.append(partial(_refill, value, entries))
                for key, inner in entries:
                    self._take(inner, (*place, key))
        elif isinstance(value, bool | int | float | complex | np.generic):  # immutable
            self.numbers[place] = type(value), repr(value)
        elif isinstance(value, nn.Parameter):  # an LSTM keeps a list of its parameters, which are replaced by copies
            pass
        elif isinstance(value, Tensor) and value.layout is torch.strided and value.nbytes <= COPIED_BYTES:
            self.numbers[place] = _bits(value)
            self._undo.append(partial(_put_back, value, value.detach().clone()))
        elif isinstance(value, np.ndarray) and not value.dtype.hasobject and value.nbytes <= COPIED_BYTES:
            self.numbers[place] = value.shape, value.tobytes()
            if value.flags.writeable:
                self._undo.append(partial(np.copyto, value, value.copy()))
        else:
            for kind, (get, put) in GENERATORS.items():
                if isinstance(value, kind):
                    state = get(value)
                    self.numbers[place] = _bits(state)
                    self._undo.append(partial(put, value, state))


def copied(value: Value) -> Value:
    """Return a deep copy of ``value``, or ``value`` itself if it can't be copied."""
    try:
        return deepcopy(value)
    except Exception:
        return value


def _bits(value: Any) -> Any:
    """Return a value that compares numbers bit by bit; a pickled tensor would contain its address."""
    if not isinstance(value, Tensor):
        return pickle.dumps(value)
    plain = value.detach().to_dense().cpu().resolve_conj().resolve_neg().contiguous()
    return value.shape, value.device, plain.reshape(-1).view(torch.uint8).numpy().tobytes()


def _put_back(tensor: Tensor, numbers: Tensor) -> None:
    if not torch.equal(tensor, numbers):  # an unchanged tensor may be read-only
        with torch.no_grad():
            tensor.copy_(numbers)


def _entries(container: Any) -> list[tuple[Any, Any]]:
    return list(container.items() if isinstance(container, dict) else enumerate(container))


def _refill(container: Any, entries: list[tuple[Any, Any]]) -> None:
    """Restore the entries of a mapping, list, deque or set."""
    if [(key, id(inner)) for key, inner in _entries(container)] == [(key, id(inner)) for key, inner in entries]:
        return
    container.clear()
    if isinstance(container, dict):
        container.update(dict(entries))  # a Counter would count the pairs of a list
    elif isinstance(container, set):
        container.update(inner for _, inner in entries)
    else:
        container.extend(inner for _, inner in entries)


def _replace(mapping: dict[str, Any], content: dict[str, Any]) -> None:
    mapping.clear()
    mapping.update(content)


def _objects(task: Any, model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the task, the modules of the model and the task, and objects up to two levels below them, with names."""
    seen = set[int]()
    level = [("task", task), *_modules("model", model), *_modules("task", task)]
    for _ in range(OBJECTS_DEPTH + 1):
        new, level = [(name, one) for name, one in level if hasattr(one, "__dict__")], []
        for name, one in new:
            if id(one) not in seen:
                seen.add(id(one))
                yield name, one
                for place, held in _held(_plain(one)):
                    level += _modules(f"{name}.{place}", held)


def _held(attributes: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield modules and plain objects in attributes, and in small lists and mappings among them, with names."""
    for key, value in attributes.items():
        if isinstance(value, dict | list | tuple) and len(value) <= COPIED_ENTRIES:
            inside = value.items() if isinstance(value, dict) else enumerate(value)
            yield from ((f"{key}.{place}", held) for place, held in inside if _is_looked_into(held))
        elif _is_looked_into(value):
            yield key, value


def _modules(prefix: str, one: Any) -> list[tuple[str, Any]]:
    """Return a module and its submodules by name, or any other object alone."""
    inner = one.named_modules() if isinstance(one, nn.Module) else [("", one)]
    return [(f"{prefix}.{name}" if name else prefix, module) for name, module in inner]


def _is_looked_into(value: Any) -> bool:
    """Return True for a module, and for an object of a user's class that isn't a dataset."""
    foreign = type(value).__module__.partition(".")[0] in ("builtins", "torch", "numpy", *sys.stdlib_module_names)
    return isinstance(value, nn.Module) or not (foreign or isinstance(value, type | Dataset))


def _plain(one: Any) -> dict[str, Any]:
    module = isinstance(one, nn.Module)
    return {k: v for k, v in vars(one).items() if not (module and (k in MODULES_OWN or "_hooks" in k))}
