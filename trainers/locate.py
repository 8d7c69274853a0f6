"""From a dotted ``_target_`` to the object it names, with errors that say what is wrong with it."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from trainers.rundir import Refused


def locate(key: str, target: str) -> Any:
    """Import the object that ``target`` (``package.module.Name``) names; ``key`` is the config key, for errors.

    Raises:
        Refused: the module or the name in it can't be found, or importing it failed (the real cause is shown).
    """
    module_name, _, name = target.rpartition(".")
    if not module_name or not all(part.isidentifier() for part in target.split(".")):
        raise Refused(f"{key}={target}: write a dotted path such as my_package.my_module.MyClass")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        ours = isinstance(error, ModuleNotFoundError) and error.name and module_name.startswith(error.name)
        where = f" (looked for in {os.getcwd()}, too)" if ours else ""
        said = f"{type(error).__name__}: {error}{where}"
        raise Refused(f"{key}={target}: importing {module_name} failed: {said}") from error
    try:
        return getattr(module, name)
    except AttributeError:
        near = get_close_matches(name, dir(module), n=1)
        hint = f"; did you mean {module_name}.{near[0]}?" if near else ""
        raise Refused(f"{key}={target}: {module_name} has no {name}{hint}") from None


def build(key: str, target: str, args: dict[str, Any], *, positional: tuple[Any, ...] = (), of: type = object) -> Any:
    """Call what ``target`` names with ``args`` (the mapping ``<key>.args``).

    Args:
        positional: passed before ``args``.
        of: the class that has to come out; other than ``object``, ``target`` has to be a class of it.

    Raises:
        Refused: not callable, not such a class, or its signature doesn't take ``args``.
    """
    factory = locate(f"{key}._target_", target)
    if not callable(factory):
        raise Refused(f"{key}._target_={target} is a {type(factory).__name__}, not a class")
    if of is not object and not (inspect.isclass(factory) and issubclass(factory, of)):
        raise Refused(f"{key}._target_={target} is not a class of {of.__module__}.{of.__qualname__}")
    check_call(f"{key}.args", target, factory, positional, args)
    return factory(*positional, **args)


def check_call(
    key: str, target: str, factory: Callable[..., Any], positional: tuple[Any, ...], args: dict[str, Any]
) -> None:
    """Raises Refused where ``factory(*positional, **args)`` doesn't fit its signature (as far as that is known)."""
    try:
        signature = inspect.signature(factory)
    except ValueError:
        return
    try:
        signature.bind(*positional, **args)
    except TypeError as error:
        names = [name for name in signature.parameters if name != "self"][len(positional) :]
        raise Refused(f"{key}={args} don't fit {target}: {error}; it takes {', '.join(names) or 'nothing'}") from None
