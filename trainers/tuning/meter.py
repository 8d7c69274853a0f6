"""Measure the peak memory of a stretch of work on a device, and find the limit there."""

from __future__ import annotations

import ctypes
import os
import resource
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from isobatch.scaling.tuning.memory import Limit

UNLIMITED = 1 << 60  # bytes; cgroup v1 writes a number above it for no limit
CGROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


class Meter:
    """Measure the peak memory of a device, or of this process on a CPU.

    On a CPU the peak is of resident memory. The address space, which ``ulimit -v`` limits, has no peak that can be
    reset; ``limits`` takes the part of it that isn't resident off its limit.

    Args:
        local_size: ranks on this machine, which share it.
        memory_gb: memory of the machine that may be used; None: all that is free.
    """

    def __init__(self, device: torch.device, local_size: int = 1, memory_gb: float | None = None) -> None:
        self._device, self._local_size, self._memory_gb = device, local_size, memory_gb

    def start(self) -> None:
        """Return unused memory to the device or the system, and begin to look for the peak."""
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
            torch.accelerator.empty_cache()
            torch.accelerator.reset_peak_memory_stats(self._device)
            return
        trim()
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM

    def peak(self) -> int:
        """Return the most bytes in use since ``start``."""
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
            return torch.accelerator.max_memory_allocated(self._device)
        return status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def now(self) -> int:
        """Return the bytes in use."""
        if self._device.type != "cpu":
            return torch.accelerator.memory_allocated(self._device)
        return status("VmRSS") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def limit(self) -> Limit:
        """Return the least of the limits on what this process may use, in bytes, and where it comes from."""
        return min(self._limits(), key=lambda limit: limit.bytes)

    def _limits(self) -> Iterator[Limit]:
        if self._device.type != "cpu":
            free, whole = torch.accelerator.get_memory_info(self._device)
            own = torch.accelerator.memory_reserved(self._device)
            yield Limit(min(whole, free + own), "the device, without what other processes use")
            return
        ranks, own = self._local_size, self.now()
        if self._memory_gb is not None:
            yield Limit(int(self._memory_gb * 1e9 / ranks), "cluster.memory_gb")
        soft, _ = resource.getrlimit(resource.RLIMIT_AS)
        if soft != resource.RLIM_INFINITY:
            yield Limit(soft - (status("VmSize") - own), "ulimit -v")
        for limit, used in cgroup_limits():
            others = max(0, used - own * ranks)
            yield Limit((limit - others) // ranks, "the memory limit of the control group")
        if (available := meminfo("MemAvailable")) is not None:
            yield Limit(available // ranks + own, "the memory that is free on this machine")
        elif self._memory_gb is None:
            yield Limit(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks, "the machine's memory")


def hardware_memory(device: torch.device) -> list[int]:
    """Return the limits in bytes that don't depend on what else runs here, to know the same hardware again."""
    if device.type != "cpu":
        return [torch.accelerator.get_memory_info(device)[1]]
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return [whole, resource.getrlimit(resource.RLIMIT_AS)[0], *(limit for limit, _ in cgroup_limits())]


def trim() -> None:
    """Return the free memory of the C library's heap to the system."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def status(name: str) -> int:
    """Return a value of /proc/self/status in bytes; 0 if the system doesn't have it."""
    return _bytes_of("/proc/self/status", name) or 0


def meminfo(name: str) -> int | None:
    """Return a value of /proc/meminfo in bytes; None if the system doesn't have it."""
    return _bytes_of("/proc/meminfo", name)


def _bytes_of(file: str, name: str) -> int | None:
    with suppress(OSError, ValueError):
        for line in Path(file).read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None


def cgroup_limits(root: Path = CGROUPS, own: Path = OWN_GROUPS) -> Iterator[tuple[int, int]]:
    """Yield limit and use in bytes of this process's control groups, of version 1 or 2, and of those above."""
    for folder, _ in groups(root, own):
        for one in (folder, *folder.parents):
            for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
                with suppress(OSError, ValueError):
                    most = int((one / limit).read_text())
                    if most < UNLIMITED:
                        yield most, int((one / used).read_text()) - _cached(one)
            if one in (root, root / "memory"):
                break


def oom_kills(root: Path = CGROUPS, own: Path = OWN_GROUPS, whole: Path = Path("/proc/vmstat")) -> dict[str, int]:
    """Return how many processes the kernel has killed for lack of memory, in this process's control group.

    Returns:
        The count by machine, its start, and control group; of the whole machine if the group has no count.
    """
    boot = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    place = f"{socket.gethostname()} {boot}"
    for folder, path in groups(root, own):
        for file in ("memory.events", "memory.oom_control"):
            if (count := _value_of(folder / file, "oom_kill")) is not None:
                return {f"{place} {path}": count}
    count = _value_of(whole, "oom_kill")
    return {} if count is None else {place: count}


def groups(root: Path = CGROUPS, own: Path = OWN_GROUPS) -> Iterator[tuple[Path, str]]:
    """Yield the folder and the path of this process's control groups for memory, of version 1 or 2."""
    with suppress(OSError):
        for line in own.read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0" and not controllers:
                yield root / path.strip("/"), path
            elif "memory" in controllers.split(","):
                yield root / "memory" / path.strip("/"), path


def _value_of(file: Path, name: str) -> int | None:
    """Return a value of a file with lines of name and value."""
    with suppress(OSError, ValueError):
        return next((int(line.split()[1]) for line in file.read_text().splitlines() if line.split()[0] == name), None)
    return None


def _cached(folder: Path) -> int:
    """Return the bytes of a control group's page cache, which the system drops when memory is short."""
    with suppress(OSError, ValueError):
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int(stat.get("file", stat.get("cache", 0))) - int(stat.get("shmem", 0))
    return 0
