"""The ranks of a run, their devices, and the few messages between them besides gradients."""

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
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore
from torch.distributed.distributed_c10d import _set_pg_timeout

from isobatch.conf.rundir.outcome import Outcome
from isobatch.scaling.errors import UserError
from isobatch.trainers.ranks.failure import RunFailed
from isobatch.trainers.ranks.notes import read_note

FRESH_STORE = "ISOBATCH_FRESH_STORE"  # in the environment of workers whose agent is ours


@dataclass(frozen=True)
class World:
    """Describe the data-parallel ranks, as one of them sees them.

    Attributes:
        rank, size: this rank, and how many there are.
        local_rank, local_size: the same on this machine.
        store: where ranks of this start leave each other notes; None for one that no launcher started.
        kept: what must not be destroyed before the process ends by ``os._exit``: all that gloo's threads may still use.
            torch 2.13's gloo hangs where it is destroyed (pytorch #190489: its destructor waits, holding the
            interpreter's lock, for threads that need it).
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    store: Store | None
    kept: list[object] = field(default_factory=list, repr=False, compare=False)

    @classmethod
    def join(cls, device: str, timeout_s: float, store: Store | None, kept: list[object]) -> World:
        """Meet the ranks that the environment names in RANK, WORLD_SIZE, …; without them, be a world of one.

        Args:
            device: ``cpu``, ``cuda``, or ``auto``: a GPU if there is one.
            timeout_s: seconds to wait for the others, now and in every collective until ``wait_patiently``.
            store: of ``meeting_point``; ``kept``: as in the attributes.

        Raises:
            UserError: no such device, or fewer of them than processes on this machine.
        """
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        local_rank, local_size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        world = cls(rank, size, local_rank, local_size, _device(device, local_rank, local_size), store, kept)
        if size > 1:
            accelerated = world.device.type != "cpu"
            backend = dist.get_default_backend_for_device(world.device)
            dist.init_process_group(
                # strings and counts go over gloo on the CPU everywhere
                f"cpu:gloo,{world.device.type}:{backend}" if accelerated else backend,
                store=store,
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=timeout_s),
                device_id=world.device if accelerated else None,
            )
            kept.append(dist.group.WORLD)
        return world

    @classmethod
    def alone(cls) -> World:
        """Return a world of one on the CPU, whatever the environment says."""
        return cls(0, 1, 0, 1, torch.device("cpu"), None)

    def connect(self) -> None:
        """Make a process group for a world of one, which otherwise does without."""
        if not dist.is_initialized():
            backend = dist.get_default_backend_for_device(self.device)
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
            self.kept.append(dist.group.WORLD)

    def agree(self, text: str) -> str:
        """Return rank 0's text, on all ranks."""
        return self.gather(text if self.rank == 0 else "")[0]

    def gather(self, text: str) -> list[str]:
        """Return every rank's text, by rank, on all ranks."""
        if self.size == 1:
            return [text]
        content = torch.frombuffer(bytearray(text.encode() or b"\0"), dtype=torch.uint8)
        lengths = [torch.zeros((), dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor(len(text.encode())))
        mine = torch.zeros(max(1, *map(int, lengths)), dtype=torch.uint8)
        mine[: len(content)] = content
        texts = [torch.empty_like(mine) for _ in lengths]
        dist.all_gather(texts, mine)
        return [bytes(one.tolist()[:length]).decode() for one, length in zip(texts, map(int, lengths), strict=True)]

    def share(self, tensor: torch.Tensor) -> None:
        """Copy rank 0's values to all ranks, in place, whatever their dtype and strides."""
        if self.size == 1:
            return
        plain = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        flat = plain.contiguous().reshape(-1).view(torch.uint8)
        dist.broadcast(flat, 0)
        if flat.data_ptr() != plain.data_ptr():
            plain.copy_(flat.view(plain.dtype).reshape(plain.shape))

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add up a tensor over the ranks, in place, and return it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, wish: bool) -> bool:
        """Tell, on all ranks, whether some rank has the wish."""
        return bool(self.sum(torch.tensor(int(wish), device=self.device)))

    def wait_patiently(self, group: dist.ProcessGroup | None = None) -> None:
        """Let collectives of ``group`` (None: of all ranks) never time out: the watches notice a hang (ranks/watch.py).

        The time that a job was suspended counts in a collective's timeout, and not in a watch's.
        """
        if self.size > 1:
            _set_pg_timeout(timedelta(days=365), group)

    @contextmanager
    def patient(self, timeout_s: float) -> Iterator[None]:
        """Let collectives never time out within; afterwards they do after ``timeout_s`` seconds, as before."""
        self.wait_patiently()
        try:
            yield
        finally:
            if self.size > 1:
                _set_pg_timeout(timedelta(seconds=timeout_s), None)

    def leave(self) -> None:
        """End the process group; the process is expected to end by ``os._exit`` (see ``kept``)."""
        if dist.is_initialized():
            dist.destroy_process_group()


def _device(name: str, local_rank: int, local_size: int) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        problem = f"device={name}, but torch finds no such device on this machine"
        raise UserError(problem, "try device=auto or cpu", "device", name)
    there = torch.accelerator.device_count()
    if local_size > there:
        fix = f"set cluster.gpus_per_node={there} (torchrun: --nproc-per-node={there}), or device=cpu"
        problem = f"{local_size} processes on this machine, but {there} GPUs are visible"
        raise UserError(problem, fix, "cluster.gpus_per_node", local_size)
    torch.accelerator.set_device_index(local_rank)
    return torch.device("cuda", local_rank)


def meeting_point(timeout_s: float, kept: list[object]) -> Store | None:
    """Connect to the store in which ranks of this start leave each other notes; None without a launcher.

    Our own agents make a new store for every start. torchrun's keeps one over all restarts, and ranks that find the
    addresses of their predecessors there dial the dead; its restart count doesn't tell the starts apart, since each
    agent counts its own. So there rank 0 names the start, and tells the name to every rank that greets it.

    Raises:
        UserError, RunFailed: what an earlier start ended with, which needn't be tried again.
    """
    if "RANK" not in os.environ or "MASTER_ADDR" not in os.environ:
        return None
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    fresh = os.environ.get(FRESH_STORE) == "1"
    of_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=rank == 0 and not (fresh or of_torchrun),
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        multi_tenant=True,
    )
    kept.append(store)
    if not of_torchrun:
        return store
    if final := read_note(store, "final", Outcome):
        raise (UserError if final.state == "refused" else RunFailed)(final.cause)
    me = uuid.uuid4().hex
    if rank:
        store.set(f"hello/{rank}", me)
        start = store.get(f"start/{me}").decode()
        store.set(f"here/{start}/{rank}", "")
        return PrefixStore(start, store)
    absent, deadline = set(range(1, size)), time.monotonic() + timeout_s
    while absent:
        for other in sorted(absent):
            if store.check([f"hello/{other}"]):
                store.set(f"start/{store.get(f'hello/{other}').decode()}", me)
            if store.check([f"here/{me}/{other}"]):
                absent.remove(other)
        if time.monotonic() > deadline:
            raise TimeoutError(f"ranks {sorted(absent)} didn't come within {timeout_s:g} s")
        time.sleep(0.002)
    return PrefixStore(me, store)
