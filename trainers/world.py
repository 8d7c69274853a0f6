"""The ranks of a run: who is there, on which device, and the few things they tell each other outside the gradients."""

from __future__ import annotations

import os
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist

from trainers.rundir import Refused

# gloo's destructor waits for threads that need the lock it holds (pytorch #190489): groups are never let go of.
_KEPT: list[object] = []


@dataclass(frozen=True)
class World:
    """The data-parallel ranks, as one of them sees them.

    Attributes:
        rank, size: this rank, and how many there are.
        local_rank, local_size: the same on this machine.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @classmethod
    def join(cls, device: str, timeout_s: float) -> World:
        """Meet the other ranks that RANK, WORLD_SIZE, … of the environment speak of; without them, a world of one.

        Args:
            device: ``cpu``, ``cuda``, or ``auto``: the accelerator if there is one.
            timeout_s: seconds to wait for the others, now and in every collective.

        Raises:
            Refused: no such device, or fewer of them than processes on this machine.
        """
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        store = meeting_point(timeout_s)
        world = cls(rank, size, local_rank, local_size, _device(device, local_rank, local_size))
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
            _KEPT.append(dist.group.WORLD)
        return world

    def agree(self, text: str) -> str:
        """Rank 0's text, on all ranks."""
        if self.size == 1:
            return text
        length = torch.tensor([len(text.encode())])
        dist.broadcast(length, 0)
        content = torch.zeros(int(length), dtype=torch.uint8)
        if self.rank == 0:
            content = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        dist.broadcast(content, 0)
        return bytes(content.tolist()).decode()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def leave(self) -> None:
        """End the process group; the process is expected to end by ``os._exit`` (see trainers/workers.py)."""
        if self.size > 1:
            dist.destroy_process_group()


def _device(name: str, local_rank: int, local_size: int) -> torch.device:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "cpu" or (name == "auto" and accelerator is None):
        return torch.device("cpu")
    if accelerator is None or name not in ("auto", accelerator.type):
        raise Refused(f"device={name}, but this machine has {accelerator or 'no accelerator'}; try device=auto or cpu")
    there = torch.accelerator.device_count()
    if local_size > there:
        raise Refused(
            f"{local_size} processes on this machine, but {there} {accelerator.type} devices are visible; "
            f"set cluster.gpus_per_node={there} (torchrun: --nproc-per-node={there}), or device=cpu"
        )
    torch.accelerator.set_device_index(local_rank)
    return torch.device(accelerator.type, local_rank)


@cache
def meeting_point(timeout_s: float) -> dist.Store | None:
    """The store of this start of the workers, where ranks leave each other notes; None without a launcher.

    An elastic agent keeps one store over all restarts, and ranks that find the addresses of their predecessors there
    dial the dead. torch's restart count doesn't tell the starts apart either, since each agent counts its own: so rank
    0 names the start, and tells the name to every rank that greets it.
    """
    if "RANK" not in os.environ or "MASTER_ADDR" not in os.environ:
        return None
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        size,
        is_master=rank == 0 and not by_agent,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        multi_tenant=True,
    )
    _KEPT.append(store)
    if not by_agent:
        return store
    me = uuid.uuid4().hex
    if rank:
        store.set(f"hello/{rank}", me)
        start = store.get(f"start/{me}").decode()
        store.set(f"here/{start}/{rank}", "")
        return dist.PrefixStore(start, store)
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
    return dist.PrefixStore(me, store)
