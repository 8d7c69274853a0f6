"""Call a task and its model and leave no trace: tensors and attributes are put back bit by bit."""

from __future__ import annotations

import pickle
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

GENERATORS: dict[type, tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]] = {  # how its state is read, and set
    torch.Generator: (torch.Generator.get_state, torch.Generator.set_state),
    random.Random: (random.Random.getstate, random.Random.setstate),
    np.random.RandomState: (np.random.RandomState.get_state, np.random.RandomState.set_state),
    np.random.Generator: (
        lambda generator: deepcopy(generator.bit_generator.state),
        lambda generator, state: setattr(generator.bit_generator, "state", state),
    ),
}
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
        task: the user's object.
        model: whose modules' attributes count as well.
    """

    def __init__(self, task: Any, model: nn.Module) -> None:
        self._objects = dict(_objects(task, model))
        self._before = {name: dict(_plain(one)) for name, one in self._objects.items()}
        self._snapshots = [Snapshot(value) for attributes in self._before.values() for value in attributes.values()]

    def modules_apart_from(self, model: nn.Module) -> list[nn.Module]:
        """Return the modules that task and model hold beside ``model``: an attribute of the task, or in a list."""
        known, apart = set(model.modules()), []
        for one in self._objects.values():
            if isinstance(one, nn.Module) and one not in known:
                known.update(one.modules())
                apart.append(one)
        return apart

    def numbers(self) -> dict[tuple[str, str], Any]:
        """Return copies of the numbers in every attribute, by the object's name and the attribute's."""
        return {
            (name, key): Snapshot(value).numbers
            for name, one in self._objects.items()
            for key, value in _plain(one).items()
        }

    def restore(self) -> None:
        """Put back every attribute that was set, added or deleted, and the numbers that changed in place."""
        for name, one in self._objects.items():
            attributes, before = vars(one), self._before[name]
            for key in _plain(one).keys() - before.keys():
                del attributes[key]
            attributes.update(before)
        for snapshot in self._snapshots:
            snapshot.restore()


class Snapshot:
    """The numbers in a value: one of its own, those of a tensor, an array or a generator, and those in containers.

    Attributes:
        numbers: what can be compared, by the keys that lead to it; of each container how many entries it has.
    """

    def __init__(self, value: Any) -> None:
        self.numbers: dict[tuple[Any, ...], Any] = {}
        self._undo: list[Callable[[], Any]] = []
        self._take(value, ())

    def restore(self) -> None:
        """Put the numbers back in place."""
        for undo in self._undo:
            undo()

    def _take(self, value: Any, place: tuple[Any, ...]) -> None:
        if isinstance(value, dict | list | tuple | deque):
            if len(place) < COPIED_DEPTH and len(value) <= COPIED_ENTRIES:
                self.numbers[place], entries = len(value), _entries(value)
                if not isinstance(value, tuple):
                    self._undo.append(partial(_refill, value, entries))
                for key, inner in entries:
                    self._take(inner, (*place, key))
        elif isinstance(value, bool | int | float | complex | np.generic):  # which never change themselves
            self.numbers[place] = type(value), repr(value)
        elif isinstance(value, nn.Parameter):  # as an LSTM lists its own; they are computed on as copies
            pass
        elif isinstance(value, Tensor) and value.layout is torch.strided and value.nbytes <= COPIED_BYTES:
            self.numbers[place] = comparable(value)
            self._undo.append(partial(_put_back, value, value.detach().clone()))
        elif isinstance(value, np.ndarray) and not value.dtype.hasobject and value.nbytes <= COPIED_BYTES:
            self.numbers[place] = value.shape, value.tobytes()
            if value.flags.writeable:
                self._undo.append(partial(np.copyto, value, value.copy()))
        else:
            for kind, (get, put) in GENERATORS.items():
                if isinstance(value, kind):
                    self.numbers[place] = pickle.dumps(get(value))
                    self._undo.append(partial(put, value, get(value)))


def comparable(tensor: Tensor) -> tuple[Any, ...]:
    """Return what is equal for tensors of the same numbers, bit by bit."""
    plain = tensor.detach().to_dense().cpu().resolve_conj().resolve_neg().contiguous()
    return tensor.shape, tensor.device, plain.reshape(-1).view(torch.uint8).numpy().tobytes()


def _put_back(tensor: Tensor, numbers: Tensor) -> None:
    if not torch.equal(tensor, numbers):  # else it may be one that can't be written to
        with torch.no_grad():
            tensor.copy_(numbers)


def _entries(container: Any) -> list[tuple[Any, Any]]:
    return list(container.items() if isinstance(container, dict) else enumerate(container))


def _refill(container: Any, entries: list[tuple[Any, Any]]) -> None:
    """Give a mapping, list or deque the entries that it had."""
    if [(key, id(inner)) for key, inner in _entries(container)] != [(key, id(inner)) for key, inner in entries]:
        container.clear()
        if isinstance(container, dict):
            container.update(dict(entries))  # of pairs a Counter would count each
        else:
            container.extend(inner for _, inner in entries)


def moved(before: dict[tuple[str, str], Any], after: dict[tuple[str, str], Any]) -> list[str]:
    """Return the names of the attributes whose numbers differ."""
    return [".".join(place) for place in after if place in before and before[place] != after[place]]


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
