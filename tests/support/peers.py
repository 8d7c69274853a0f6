"""Others' optimizers, to be compared with: modules alone, as their packages import torchvision, or for seconds.

They lie beside site-packages: who looks whether timm is there finds one that can't be imported.
"""

from __future__ import annotations

import importlib
import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

PLACE = os.path.join(sys.prefix, "peers")


def installed() -> bool:
    """Whether timm, torch_optimizer and pytorch_optimizer are there; `make test` installs them."""
    return all(_spec(name) for name in ("timm", "torch_optimizer", "pytorch_optimizer"))


def _spec(package: str) -> ModuleSpec | None:
    return PathFinder.find_spec(package, [PLACE])


def alone(name: str) -> ModuleType:
    """The module ``name``, below packages that are empty but for their place."""
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
