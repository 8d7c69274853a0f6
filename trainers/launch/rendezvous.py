"""Connect the machines of a run."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from isobatch.conf.groups import Local
from isobatch.conf.identity import identity
from isobatch.conf.terminal import say
from isobatch.trainers.ranks.internals import HashStore, Store
from isobatch.trainers.ranks.signals import Stop

if TYPE_CHECKING:
    from isobatch.conf.schema import RunConfig


REPORT_S = 10.0  # of waiting, before the absent machines are printed


class Alone(StaticTCPRendezvous):
    """A rendezvous of a single machine, which waits for no other and looks up no host names."""

    def __init__(self) -> None:
        super().__init__("127.0.0.1", 0, rank=0, world_size=1, run_id="alone", timeout=0)

    def next_rendezvous(self) -> RendezvousInfo:
        return RendezvousInfo(HashStore(), 0, 1, RendezvousStoreInfo(self.master_addr, self.master_port))


def rendezvous(config: RunConfig, stop: Stop, hosts: Sequence[str], host: str) -> tuple[RendezvousHandler, str]:
    """Return the rendezvous of this run's machines, and the address at which the others reach this machine.

    Args:
        hosts: names of all machines, if a scheduler provides them; the first one hosts the rendezvous.
        host: the name of this machine.

    Raises:
        RendezvousError: the rendezvous doesn't answer, or some of ``hosts`` didn't join.
        Stopped: a signal came first.
    """
    cluster = config.cluster
    if cluster.nodes == 1:
        return Alone(), "127.0.0.1"
    assert isinstance(cluster, Local)
    assert cluster.rendezvous
    first, port = parse_rendezvous_endpoint(cluster.rendezvous, 29400)
    say(f"isobatch: meeting {cluster.nodes} machines at {cluster.rendezvous} …")
    with stop.interrupting():
        known = {"is_host": host == hosts[0]} if hosts else {}
        name = hosts[0] if hosts else "that machine"
        address = first if known.get("is_host") else _address_towards(first, port, cluster.timeout_s, name)
        run = f"{identity(config)}-{config.run.dir or config.run.name or config.task.name}"
        parameters = RendezvousParameters(
            "c10d", cluster.rendezvous, run, cluster.nodes, cluster.nodes, address,
            join_timeout=int(cluster.timeout_s), **known,
        )  # fmt: skip
        backend, store = create_backend(parameters)
        if hosts:
            _sign_in(store, hosts, host, cluster.timeout_s)
        return create_handler(store, backend, parameters), address


def _sign_in(store: Store, hosts: Sequence[str], host: str, timeout_s: float) -> None:
    """Wait until all of ``hosts`` have joined. Raises RendezvousTimeoutError, which names the absent hosts."""
    store.set(f"here/{host}", "")
    began, reported = time.monotonic(), False
    while absent := [other for other in hosts if not store.check([f"here/{other}"])]:
        waited_s = time.monotonic() - began
        if waited_s > timeout_s:
            missing = f"{', '.join(absent)} of {', '.join(hosts)}"
            raise RendezvousTimeoutError(f"no word from {missing} within {timeout_s:g} s")
        if waited_s > REPORT_S and not reported and host == hosts[0]:
            say(f"isobatch: waiting for {', '.join(absent)} …")
            reported = True
        time.sleep(0.1)


def _address_towards(host: str, port: int, timeout_s: float, name: str) -> str:
    """Return this machine's address as seen from ``host``, once a process listens there. ``name`` is for messages."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, socket.SOCK_STREAM) as probe, suppress(OSError):
                probe.bind((address[0], 0))
                return host  # this machine has that address
            with socket.create_connection((host, port), timeout=1) as probe:
                return str(probe.getsockname()[0])
        except OSError as error:
            if time.monotonic() > deadline:
                fix = f"start the same command on {name} too, and open the port"
                problem = f"no answer within {timeout_s:g} s ({error})"
                raise RendezvousConnectionError(f"{problem}; {fix}") from None
            time.sleep(0.2)
