"""The C kernels of LAMB and LARS (kernels.c): compiled on first use, kept in the user's cache, and not needed."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("kernels.c")
# What isn't linked is in the process already: so the threads are those of torch's OpenMP, as many as torch has.
FLAGS = ("-O3", "-std=c11", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-nodefaultlibs")
VECTORS = {
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"),
}
LONGEST_BUILD_S = 60


@functools.cache
def kernels() -> ctypes.CDLL | None:
    """The library, or None, with one warning, where it can't be built or loaded."""
    try:
        return ctypes.CDLL(str(_built()))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        warnings.warn(
            "LAMB and LARS go on with torch's own operations, at about half the speed on a CPU, because their C kernel "
            f"couldn't be built or loaded ({' '.join(said.split()):.300}): it takes a C compiler with OpenMP, as cc or "
            "as CC names it, and a folder to keep it in, ~/.cache or what XDG_CACHE_HOME names",
            stacklevel=2,
        )
        return None


def call(name: str, tensors: Sequence[Sequence[Tensor]], *numbers: float) -> None:
    """Run a kernel over lists of tensors, the weights first.

    Args:
        tensors: float32 on the CPU and dense; those that belong together are of the same strides.
        numbers: bool and int go as int, float as double.
    """
    library = kernels()
    assert library is not None
    count = len(tensors[0])
    numel = (ctypes.c_int64 * count)(*[weights.numel() for weights in tensors[0]])
    pointers = [(ctypes.c_void_p * count)(*[tensor.data_ptr() for tensor in each]) for each in tensors]
    values = [ctypes.c_double(value) if isinstance(value, float) else ctypes.c_int(value) for value in numbers]
    if not getattr(library, name)(ctypes.c_int64(count), numel, *pointers, *values):
        raise MemoryError(f"no memory for the norms of {name}")


def _built() -> Path:
    """The compiled library: of this source, these flags and this kind of processor.

    Several processes may build it at once: each writes a file of its own, and the name is given to one that is whole.
    """
    compiler = shlex.split(os.environ.get("CC") or "cc")
    command = [*compiler, *FLAGS, *VECTORS.get(torch.backends.cpu.get_cpu_capability(), ())]
    what = f"{SOURCE.read_text()}{command}{platform.system()}{platform.machine()}"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "isobatch"
    library = folder / f"kernels-{hashlib.sha256(what.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            built = Path(aside) / library.name
            subprocess.run(
                [*command, str(SOURCE), "-o", str(built), "-lm", "-lc"],
                check=True, capture_output=True, text=True, timeout=LONGEST_BUILD_S,
            )  # fmt: skip
            built.replace(library)
    return library
