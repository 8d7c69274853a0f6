"""A flock that excludes nobody, as on an NFS that is mounted with nolock: compiled, and loaded before the C library."""

from __future__ import annotations

import subprocess
from pathlib import Path

SOURCE = "int flock(int descriptor, int operation) { return 0; }\n"


def without_flock(folder: Path) -> dict[str, str]:
    """The environment of a process in which every flock succeeds."""
    library = folder / "noflock.so"
    if not library.exists():
        command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
        subprocess.run(command, input=SOURCE, text=True, check=True)
    return {"LD_PRELOAD": str(library)}
