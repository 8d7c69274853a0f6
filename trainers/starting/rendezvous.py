"""Where the machines of a run find each other."""

from __future__ import annotations

import socket
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from torch._C._distributed_c10d import HashStore
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from conf.identity import identity
from trainers.stop import Stop
from trainers.terminal import say

if TYPE_CHECKING:
    from conf.schema import RunConfig


class Alone(RendezvousHandler):
    """The rendezvous of one machine: nobody to wait for, and no names to look up."""

    def next_rendezvous(self) -> RendezvousInfo:
        return RendezvousInfo(HashStore(), 0, 1, RendezvousStoreInfo("127.0.0.1", 0))

    def get_backend(self) -> str:
        return "alone"

    def get_run_id(self) -> str:
        return "alone"

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def shutdown(self) -> bool:
        return True


def rendezvous(config: RunConfig, stop: Stop) -> tuple[RendezvousHandler, str]:
    """Where the machines of this run find each other, and this machine's address for the others.

    Raises:
        RendezvousError: nobody answers there.
        Stopped: a signal came first.
    """
    cluster = config.cluster
    if cluster.nodes == 1:
        return Alone(), "127.0.0.1"
    assert cluster.rendezvous, "checked before"
    host, port = parse_rendezvous_endpoint(cluster.rendezvous, 29400)
    say(f"isobatch: meeting {cluster.nodes} machines at {cluster.rendezvous} …")
    with stop.interrupting():
        address = _address_towards(host, port, cluster.timeout_s)
        run = f"{identity(config)}-{config.run.dir or config.run.name or config.task.name}"
        parameters = RendezvousParameters(
            "c10d", cluster.rendezvous, run, cluster.nodes, cluster.nodes, address, join_timeout=int(cluster.timeout_s)
        )
        return get_rendezvous_handler(parameters), address


def _address_towards(host: str, port: int, timeout_s: float) -> str:
    """This machine's address as the machine ``host`` sees it, once somebody listens there."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            there = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(there[0], socket.SOCK_STREAM) as probe, suppress(OSError):
                probe.bind((there[4][0], 0))
                return host  # it is this machine
            with socket.create_connection((host, port), timeout=1) as probe:
                return str(probe.getsockname()[0])
        except OSError as error:
            if time.monotonic() > deadline:
                raise RendezvousConnectionError(
                    f"nobody answers there after {timeout_s:g} s ({error}); the same command has to be started on that "
                    "machine too, and the port be open"
                ) from None
            time.sleep(0.2)
