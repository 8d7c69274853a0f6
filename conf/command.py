"""Build the command that runs a module of Isobatch in a process of its own. Torch-free."""

from __future__ import annotations

import os
import site
import sys
import sysconfig


def command_of(module: str, *words: str) -> list[str]:
    """Return the command that runs ``module`` with this process's Python and module paths, from any shell.

    PYTHONPATH has the paths in their order, without the last ones, which this Python adds by itself.
    """
    library = sysconfig.get_path("stdlib")
    added = {library, f"{library}/lib-dynload", sysconfig.get_path("purelib"), *site.getsitepackages()}
    paths = [path for path in dict.fromkeys(map(os.path.abspath, sys.path)) if os.path.exists(path)]
    while paths and paths[-1] in added:
        paths.pop()
    variable = ["env", f"PYTHONPATH={os.pathsep.join(paths)}"] if paths else []
    return [*variable, sys.executable, "-P", "-m", module, *words]
