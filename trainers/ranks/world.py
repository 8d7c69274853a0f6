"""Connect the ranks of a run, choose their devices, and exchange the few messages that aren't gradients."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from isobatch.conf.rundir.outcome import Outcome
from isobatch.scaling.errors import UserError
from isobatch.trainers.ranks.failure import RunFailed
from isobatch.trainers.ranks.internals import HashStore, PrefixStore, Store, TCPStore, set_group_timeout
from isobatch.trainers.ranks.notes import read_note

FRESH_STORE = "ISOBATCH_FRESH_STORE"  # set for workers whose agent is Isobatch's own


@dataclass(frozen=True)
class World:
    """Describe the data-parallel ranks from the point of view of one of them.

    Attributes:
        rank, size: index of this rank, and number of ranks.
        local_rank, local_size: the same among the ranks of this machine.
        store: the store in which ranks of this start exchange notes; None without a launcher.
        kept: objects that gloo's threads may still use, kept alive until the process ends by ``os._exit``. Destroying
            gloo hangs in torch 2.13 (pytorch #190489: the destructor holds the interpreter's lock while it waits for
            threads that need it).
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    store: Store | None
    kept: list[object] = field(default_factory=list, repr=False, compare=False)

    @classmethod
    def join(
        cls, device: str, timeout_s: float, store: Store | None, kept: list[object], backend: str = "auto"
    ) -> World:
        """Join the ranks that RANK, WORLD_SIZE, … describe. Without these variables, return a world of one.

        Args:
            device: ``cpu``, ``cuda``, or ``auto`` for a GPU if there is one.
            timeout_s: seconds to wait for the other ranks, now and in every collective until ``wait_patiently``.
            store: the store from ``meeting_point``; ``kept``: see the attributes.
            backend: ``gloo``, with which ranks can share a device, or ``auto`` for the fastest for the device.

        Raises:
            UserError: the device doesn't exist, or there are fewer devices than processes on this machine.
        """
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        local_rank, local_size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        chosen = _device(device, local_rank, local_size, shared=backend == "gloo")
        world = cls(rank, size, local_rank, local_size, chosen, store, kept)
        if size > 1:
            own = chosen.type != "cpu" and backend == "auto"  # the device has a backend of its own
            dist.init_process_group(
                # strings and counts always go over gloo on the CPU
                f"cpu:gloo,{chosen.type}:{dist.get_default_backend_for_device(chosen)}" if own else "gloo",
                store=store,
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=timeout_s),
                device_id=chosen if own else None,
            )
            kept.append(dist.group.WORLD)
        return world

    @classmethod
    def alone(cls) -> World:
        """Return a world of one on the CPU, ignoring the environment."""
        return cls(0, 1, 0, 1, torch.device("cpu"), None)

    def connect(self) -> None:
        """Create a process group even for a world of one, which has none by default."""
        if not dist.is_initialized():
            backend = dist.get_default_backend_for_device(self.device)
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
            self.kept.append(dist.group.WORLD)

    def agree(self, text: str) -> str:
        """Return rank 0's text on all ranks."""
        return self.gather(text if self.rank == 0 else "")[0]

    def gather(self, text: str) -> list[str]:
        """Return the texts of all ranks, by rank, on all ranks."""
        if self.size == 1:
            return [text]
        content = torch.frombuffer(bytearray(text.encode() or b"\0"), dtype=torch.uint8)
        lengths = [torch.zeros((), dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor(len(text.encode())))
        padded = torch.zeros(max(1, *map(int, lengths)), dtype=torch.uint8)
        padded[: len(content)] = content
        texts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(texts, padded)
        return [bytes(text.tolist()[:length]).decode() for text, length in zip(texts, map(int, lengths), strict=True)]

    def share(self, tensor: torch.Tensor) -> None:
        """Copy rank 0's values to all ranks, in place, for any dtype and strides."""
        if self.size == 1:
            return
        plain = real_view(tensor)
        flat = plain.contiguous().reshape(-1).view(torch.uint8)
        dist.broadcast(flat, 0)
        if flat.data_ptr() != plain.data_ptr():
            plain.copy_(flat.view(plain.dtype).reshape(plain.shape))

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum ``tensor`` over the ranks, in place, and return it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Return, on all ranks, whether ``flag`` is true on any rank."""
        return bool(self.sum(torch.tensor(int(flag), device=self.device)))

    def wait_patiently(self, group: dist.ProcessGroup | None = None) -> None:
        """Disable the timeout of ``group``'s collectives (None: of all ranks); ``Watch`` detects hangs instead.

        A collective's timeout would count the time that a job was suspended. A watch doesn't.
        """
        if self.size > 1:
            set_group_timeout(timedelta(days=365), group)

    @contextmanager
    def patient(self, timeout_s: float) -> Iterator[None]:
        """Disable the timeout of collectives inside this block, then restore ``timeout_s`` seconds."""
        self.wait_patiently()
        try:
            yield
        finally:
            if self.size > 1:
                set_group_timeout(timedelta(seconds=timeout_s), None)

    def leave(self) -> None:
        """Destroy the process group. The process must then end by ``os._exit`` (see ``kept``)."""
        if dist.is_initialized():
            dist.destroy_process_group()


def real_view(tensor: torch.Tensor) -> torch.Tensor:
    """Return a complex tensor as real numbers in the same memory; any other tensor as it is."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _device(name: str, local_rank: int, local_size: int, *, shared: bool) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        problem = f"device={name}, but torch finds no such device on this machine"
        raise UserError(problem, "try device=auto or cpu", "device", name)
    visible = torch.accelerator.device_count()
    if local_size > visible and not shared:
        fix = f"set cluster.gpus_per_node={visible} (torchrun: --nproc-per-node={visible}), or device=cpu"
        problem = f"{local_size} processes on this machine, but {visible} GPUs are visible"
        raise UserError(problem, fix, "cluster.gpus_per_node", local_size)
    torch.accelerator.set_device_index(local_rank % visible)
    return torch.device("cuda", local_rank % visible)


def meeting_point(timeout_s: float, kept: list[object]) -> Store | None:
    """Connect to the store in which ranks of this start exchange notes; return None without a launcher.

    Isobatch's agents create a new store for every start. torchrun keeps one store over all restarts, in which ranks
    would find the addresses of dead predecessors. Its restart count doesn't distinguish the starts, since each agent
    counts its own. So under torchrun rank 0 names the start, and sends the name to every rank that registers.

    Raises:
        UserError, RunFailed: an earlier start ended with this error, and a retry would end the same way.
    """
    if "RANK" not in os.environ or "MASTER_ADDR" not in os.environ:
        return None
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    fresh = os.environ.get(FRESH_STORE) == "1"
    by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=rank == 0 and not (fresh or by_torchrun),
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        multi_tenant=True,
    )
    kept.append(store)
    if not by_torchrun:
        return store
    if final := read_note(store, "final", Outcome):
        raise (UserError if final.state == "refused" else RunFailed)(final.cause)
    identifier = uuid.uuid4().hex
    if rank:
        store.set(f"hello/{rank}", identifier)
        start = store.get(f"start/{identifier}").decode()
        store.set(f"here/{start}/{rank}", "")
        return PrefixStore(start, store)
    absent, deadline = set(range(1, size)), time.monotonic() + timeout_s
    while absent:
        for other in sorted(absent):
            if store.check([f"hello/{other}"]):
                store.set(f"start/{store.get(f'hello/{other}').decode()}", identifier)
            if store.check([f"here/{identifier}/{other}"]):
                absent.remove(other)
        if time.monotonic() > deadline:
            raise TimeoutError(f"ranks {sorted(absent)} didn't join within {timeout_s:g} s")
        time.sleep(0.002)
    return PrefixStore(identifier, store)
