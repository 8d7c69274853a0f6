"""Import single modules of other optimizer packages without their ``__init__``, which imports torchvision or is slow.

They are installed outside site-packages, since code that checks for timm would find it and fail to import it.
"""

from __future__ import annotations

import importlib
import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

PLACE = os.path.join(sys.prefix, "peers")


def installed() -> bool:
    """Return True if timm, torch_optimizer and pytorch_optimizer are installed, as by `make test`."""
    return all(_spec(name) for name in ("timm", "torch_optimizer", "pytorch_optimizer"))


def _spec(package: str) -> ModuleSpec | None:
    return PathFinder.find_spec(package, [PLACE])


def import_alone(name: str) -> ModuleType:
    """Import the module ``name``, with empty packages above it that have only a path."""
    package, *parts = name.split(".")
    for above in range(len(parts)):
        dotted = ".".join((package, *parts[:above]))
        if dotted not in sys.modules:
            spec = _spec(package)
            assert spec is not None
            assert spec.submodule_search_locations
            empty = ModuleType(dotted)
            empty.__spec__ = spec if above == 0 else None
            empty.__path__ = [os.path.join(spec.submodule_search_locations[0], *parts[:above])]
            sys.modules[dotted] = empty
    return importlib.import_module(name)
