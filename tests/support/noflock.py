"""Preload a flock that always succeeds, like that of an NFS mounted with nolock."""

from __future__ import annotations

import subprocess
from pathlib import Path

SOURCE = "int flock(int descriptor, int operation) { return 0; }\n"


def without_flock(folder: Path) -> dict[str, str]:
    """Return the environment of a process in which every flock succeeds."""
    library = folder / "noflock.so"
    if not library.exists():
        command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
        subprocess.run(command, input=SOURCE, text=True, check=True)
    return {"LD_PRELOAD": str(library)}
