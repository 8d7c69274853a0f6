"""Import and build the object that a dotted ``_target_`` names, with errors that name the wrong part."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

from isobatch.scaling.errors import UserError
from isobatch.trainers.ranks.failure import user_line

DOTTED = "write one such as my_package.my_module.MyClass"


def locate(key: str, target: str) -> Any:
    """Import the object that ``target`` names; ``key`` is the config key, for errors.

    ``target`` is ``package.module.Name``, or an attribute of a class: ``package.module.Name.from_config``.

    Raises:
        UserError: the module or the name in it can't be found, or importing it failed (the message has the cause).
    """
    module_name, _, name = target.rpartition(".")
    if not module_name or not all(part.isidentifier() for part in target.split(".")):
        raise UserError(f"{key}={target} isn't a dotted path", DOTTED, key, target)
    try:
        module: Any = importlib.import_module(module_name)
    except Exception as error:
        parent, _, child = module_name.rpartition(".")
        owner = getattr(sys.modules.get(parent), child, None)
        if inspect.isclass(owner):  # the failed import has imported the parent, which has the class
            return _attribute(key, target, owner, name)
        where = user_line(traceback.extract_tb(error.__traceback__))
        problem = f"{key}={target}: importing {module_name} failed: {type(error).__name__}: {error}{where}"
        fix = ""
        if isinstance(error, ModuleNotFoundError) and error.name and module_name.startswith(error.name):
            searched = [os.getcwd(), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
            fix = f"start the command in the folder that has it, or install it (searched: {', '.join(searched)})"
        raise UserError(problem, fix, key, target) from error
    return _attribute(key, target, module, name)


def import_engine_package(name: str) -> Any:
    """Import the package of the engine ``name``, which is also the name of its extra. Raise UserError if it fails."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        problem = f"engine={name} needs the package {name} ({error})"
        raise UserError(problem, f"pip install '.[{name}]'", "engine", name) from error


def _attribute(key: str, target: str, owner: Any, name: str) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError:
        near, path = get_close_matches(name, dir(owner), n=1), target.removesuffix(f".{name}")
        hint = f"did you mean {path}.{near[0]}?" if near else ""
        raise UserError(f"{key}={target}: {path} has no {name}", hint, key, target) from None


def build(
    key: str,
    target: str,
    args: dict[str, Any],
    *,
    local: Mapping[str, Any] = MappingProxyType({}),
    positional: tuple[Any, ...] = (),
    of: type = object,
) -> Any:
    """Call the object that ``target`` names with ``args`` (config ``<key>.args``) and ``local`` (``<key>.local``).

    In both, a mapping with its own ``_target_`` is replaced by the result of calling that with the rest of the mapping.

    Args:
        positional: arguments passed before ``args``.
        of: the required base class; unless it is ``object``, ``target`` has to be a subclass.

    Raises:
        UserError: ``target`` isn't callable or not a subclass of ``of``, or its signature doesn't take ``args``.
    """
    factory = _factory(key, target)
    if of is not object and not (inspect.isclass(factory) and issubclass(factory, of)):
        wanted = f"{of.__module__}.{of.__qualname__}"
        raise UserError(f"{key}._target_={target} is not a class of {wanted}", key=f"{key}._target_", value=target)
    args = {name: value for name, value in args.items() if name not in local}  # else it is null
    check_call(f"{key}.args", target, factory, positional, args, local)
    found = {name: made(f"{key}.args.{name}", value) for name, value in args.items()}
    return factory(*positional, **found, **{name: made(f"{key}.local.{name}", value) for name, value in local.items()})


def made(key: str, value: Any) -> Any:
    """Replace each mapping with a ``_target_`` in ``value`` by the object that it describes, innermost first."""
    if isinstance(value, list):
        return [made(f"{key}.{index}", inner) for index, inner in enumerate(value)]
    if not isinstance(value, dict):
        return value
    args = {name: inner for name, inner in value.items() if name != "_target_"}
    found = {name: made(f"{key}.{name}", inner) for name, inner in args.items()}
    if "_target_" not in value:
        return found
    target = value["_target_"]
    if not isinstance(target, str):
        raise UserError(f"{key}._target_={target!r} isn't a dotted path", DOTTED, f"{key}._target_", target)
    factory = _factory(key, target)
    check_call(key, target, factory, (), args)
    return factory(**found)


def _factory(key: str, target: str) -> Callable[..., Any]:
    factory = locate(f"{key}._target_", target)
    if not callable(factory):
        problem = f"{key}._target_={target} is a {type(factory).__name__}, not a class"
        raise UserError(problem, key=f"{key}._target_", value=target)
    return factory  # type: ignore[no-any-return]


def check_call(
    key: str,
    target: str,
    factory: Callable[..., Any],
    positional: tuple[Any, ...],
    args: dict[str, Any],
    local: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Raise UserError if ``args`` and ``local`` don't fit the signature of ``factory``, if it has one."""
    try:
        signature = inspect.signature(factory)
    except ValueError:
        return
    try:
        signature.bind(*positional, **args, **local)
    except TypeError as error:
        if local:
            key, args = f"{key} and {key.removesuffix('args')}local", {**args, **local}
        names = [name for name in signature.parameters if name != "self"][len(positional) :]
        problem = f"{key}={args} don't fit {target}: {error}"
        raise UserError(problem, f"it takes {', '.join(names) or 'nothing'}", key, args) from None
