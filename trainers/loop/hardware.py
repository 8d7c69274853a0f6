"""Measure what a run needs of its hardware: peak memory, and the share of the devices' peak speed (MFU)."""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING

import torch
from torch import nn

from isobatch.scaling.errors import UserError
from isobatch.scaling.tally import Tally
from isobatch.trainers.tasks.task import Task

if TYPE_CHECKING:
    from isobatch.conf.schema import RunConfig

# Dense peak in TFLOP/s for matrices of 16-bit numbers, of TF32 and of fp32, from NVIDIA's datasheets, by words of the
# device's name. The first match counts.
PEAK_TFLOPS = {
    "H100 NVL": (835.5, 417.5, 60.0),
    "H100 PCIe": (756.0, 378.0, 51.0),
    "H100": (989.4, 494.7, 66.9),
    "H200": (989.4, 494.7, 66.9),
    "A100": (312.0, 156.0, 19.5),
    "V100": (125.0, 15.7, 15.7),
    "L40S": (362.05, 183.0, 91.6),
    "L4": (121.0, 60.0, 30.3),
    "A10G": (70.0, 35.0, 31.2),
    "A10": (125.0, 62.5, 31.2),
    "T4": (65.0, 8.1, 8.1),
}


class Hardware:
    """Measure a device.

    Args:
        flops_per_unit: floating-point operations of forward and backward for one unit; None: not known.
        peak_flops: operations per second of all ranks' devices at their peak; None: not known.
    """

    def __init__(self, device: torch.device, flops_per_unit: float | None, peak_flops: float | None) -> None:
        self._device = device
        self._share = flops_per_unit / peak_flops if flops_per_unit and peak_flops else None

    def values(self, tally: Tally) -> dict[str, float]:
        """Return values for a line of metrics, without waiting for the device.

        ``memory_gb`` is the peak on rank 0 since the start, in 10⁹ bytes: allocated on its device, or resident on a
        CPU. ``mfu`` is the model's operations per second as a share of the peak (Chowdhery et al. 2022,
        arXiv:2204.02311, appendix B).
        """
        found = {"memory_gb": peak_memory(self._device) / 1e9}
        if self._share is not None:
            found["mfu"] = self._share * tally.interval.units / max(1e-9, tally.interval.seconds)
        return found


def peak_memory(device: torch.device) -> int:
    """Return the most bytes in use so far, on the device or of this process."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.accelerator.max_memory_allocated(device)


def flops_per_unit(task: Task, model: nn.Module) -> float | None:
    """Return the task's ``flops_per_unit``, or None. Raise UserError if it isn't a positive number."""
    found = task.flops_per_unit(model)
    if found is None or (isinstance(found, int | float) and not isinstance(found, bool) and 0 < found < 1e30):
        return found
    raise UserError(f"task.flops_per_unit(model) returned {found!r:.60}", "return a positive number", "task._target_")


def peak_flops(config: RunConfig, device: torch.device, world_size: int) -> float | None:
    """Return the peak of all ranks' devices in FLOP/s, for matrices of the run's precision; None: not known."""
    tflops = config.log.peak_tflops
    if tflops is None and device.type == "cuda":
        narrow, tf32, fp32 = peak_tflops(torch.cuda.get_device_name(device)) or (None, None, None)
        exact = torch.get_float32_matmul_precision() == "highest"
        tflops = narrow if config.precision != "fp32" else fp32 if exact else tf32
    return None if tflops is None else tflops * 1e12 * world_size


def peak_tflops(name: str) -> tuple[float, float, float] | None:
    """Return the entry of PEAK_TFLOPS for a device's name, or None.

    >>> peak_tflops("NVIDIA H100 80GB HBM3")
    (989.4, 494.7, 66.9)
    """
    words = set(name.replace("-", " ").split())
    return next((peaks for known, peaks in PEAK_TFLOPS.items() if words.issuperset(known.split())), None)


def device_name(device: torch.device) -> str:
    """Return the name of a device's kind."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
