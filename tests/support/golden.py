"""Texts that tests compare by full equality with files; ``make golden`` rewrites the files.

Read the difference (``git diff tests/golden``) before you commit it: it is what users will see.
"""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "golden"


def golden(name: str, text: str) -> None:
    """Fail where ``text`` differs from ``tests/golden/<name>.txt``; with GOLDEN=rewrite write the file instead."""
    file = FOLDER / f"{name}.txt"
    if os.environ.get("GOLDEN") == "rewrite":
        file.write_text(text)
    assert text == file.read_text(), f"{file} differs; meant to? `make golden` rewrites it"
