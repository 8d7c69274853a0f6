"""Compare texts with golden files by full equality; ``make golden`` rewrites the files.

Read the difference (``git diff tests/golden``) before you commit it, since users will see these texts.
"""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "golden"


def golden(name: str, text: str) -> None:
    """Fail if ``text`` differs from ``tests/golden/<name>.txt``; with GOLDEN=rewrite, write the file instead."""
    file = FOLDER / f"{name}.txt"
    if os.environ.get("GOLDEN") == "rewrite":
        file.write_text(text)
    assert text == file.read_text(), f"{file} differs; if that is intended, `make golden` rewrites it"
