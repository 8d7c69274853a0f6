"""A text as bytes, and the windows of it that are samples. A file is mapped into memory, never read as a whole."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from isobatch.scaling.errors import UserError

LIBRARY = 1_000_000  # bytes of the standard library: the same number of samples, whatever the version of Python
Open = Callable[[], np.ndarray]


def open_corpus(data: str | None) -> Open:
    """What opens the bytes (uint8) of the text file ``data``, or of the standard library where that is None."""
    return standard_library if data is None else partial(mapped, Path(data).expanduser().absolute())


def mapped(file: Path) -> np.ndarray:
    """The bytes of ``file``, of which only those are read that are asked for. Raises UserError."""
    try:
        return np.memmap(file, np.uint8, "r")
    except FileNotFoundError:
        raise UserError(f"task.args.data={file}: there is no such file", "", "task.args.data", file) from None
    except (OSError, ValueError) as error:
        problem = f"task.args.data={file} can't be mapped into memory: {error}"
        raise UserError(problem, "", "task.args.data", file) from None


def standard_library() -> np.ndarray:
    """The source of the modules of Python's standard library, in the order of their names, up to 1 MB.

    The text, not its length, differs from one version of Python to another.
    """
    folder, text = Path(sysconfig.get_path("stdlib")), bytearray()
    for file in sorted(folder.glob("*.py")):
        text += file.read_bytes()
        if len(text) >= LIBRARY:
            return np.frombuffer(text[:LIBRARY], np.uint8)
    raise UserError(
        f"{folder} has {len(text):,} bytes of Python's source, not {LIBRARY:,}",
        "give a text file as task.args.data",
        "task.args.data",
    )


class Windows(Dataset):
    """Consecutive windows of a corpus: uint8 [length + 1], whose last byte is the first of the next one.

    So each byte but the first is predicted once; fewer than ``length`` at the end are left out.

    Args:
        corpus: opens the bytes, in each process that needs them.
        start, stop: the bytes that the windows are taken from.
        length: bytes that one window predicts.
    """

    def __init__(self, corpus: Open, start: int, stop: int, length: int) -> None:
        self.corpus, self.start, self.stop, self.length = corpus, start, stop, length

    def __len__(self) -> int:
        return max(0, self.stop - self.start - 1) // self.length

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < len(self):
            raise IndexError(index)
        first = self.start + index * self.length
        return torch.from_numpy(self._bytes[first : first + self.length + 1].copy())

    @cached_property
    def _bytes(self) -> np.ndarray:
        return self.corpus()

    def __getstate__(self) -> dict[str, Any]:
        """What another process gets: not the bytes."""
        return {name: value for name, value in vars(self).items() if name != "_bytes"}
