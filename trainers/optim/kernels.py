"""Compile and call the C kernels of LAMB and LARS (kernels.c), which are optional and kept in the user's cache."""

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
# OpenMP isn't linked, so the kernels use torch's OpenMP, which is loaded already, with torch's number of threads.
FLAGS = ("-O3", "-std=c11", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-nodefaultlibs")
VECTORS = {
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"),
}
LONGEST_BUILD_S = 60


@functools.cache
def kernels() -> ctypes.CDLL | None:
    """Return the compiled library; if it can't be built or loaded, warn once and return None."""
    try:
        return ctypes.CDLL(str(_built()))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        warnings.warn(
            f"the C kernel of LAMB and LARS couldn't be built or loaded ({' '.join(reason.split()):.300}), so they use "
            "torch's operations, at about half the speed on a CPU; install a C compiler with OpenMP as cc or set CC, "
            "and make ~/.cache writable or set XDG_CACHE_HOME",
            stacklevel=2,
        )
        return None


def call(name: str, tensors: Sequence[Sequence[Tensor]], *numbers: float) -> None:
    """Run a kernel over lists of tensors, the weights first.

    Args:
        tensors: dense float32 tensors on the CPU; the tensors of one parameter have the same strides.
        numbers: passed as int (bool and int) or as double (float).
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
    """Return the path of the library for this source, these flags and this processor; build it if it's missing.

    Several processes may build it at once: each writes its own file and renames it when it is complete.
    """
    compiler = shlex.split(os.environ.get("CC") or "cc")
    command = [*compiler, *FLAGS, *VECTORS.get(torch.backends.cpu.get_cpu_capability(), ())]
    identity = f"{SOURCE.read_text()}{command}{platform.system()}{platform.machine()}"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "isobatch"
    library = folder / f"kernels-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / library.name
            subprocess.run(
                [*command, str(SOURCE), "-o", str(built), "-lm", "-lc"],
                check=True, capture_output=True, text=True, timeout=LONGEST_BUILD_S,
            )  # fmt: skip
            built.replace(library)
    return library
