"""Run a real Slurm of four nodes on this machine for tests. `python -m tests.cluster.lab` starts one and waits.

It needs root, and Debian's packages `slurm-wlm` and `munge`, which it installs if they are missing. It writes nothing
to /etc: all files are in a temporary folder, which SLURM_CONF names. All daemons are ended by their process ids.

Each node has two CPUs and two nominal GPUs. Jobs of the partition high preempt all others. A preempted job is requeued
in the partition main, cancelled in cheap, and cancelled 20 s after a TERM in graceful.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

NODES = 4
CONF = """\
ClusterName=lab
SlurmctldHost=localhost
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
SlurmctldPort={port}
FirstJobId={first}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/ctld.pid
SlurmdPidFile={folder}/run/%n.pid
SlurmctldLogFile={folder}/log/ctld.log
SlurmdLogFile={folder}/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
EnforcePartLimits=ALL
JobRequeue=1
MinJobAge=300
KillWait=20
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
GresTypes=gpu
SlurmdTimeout=10
{machines}
PartitionName=main Nodes=n[1-{nodes}] Default=YES MaxTime=60 State=UP PriorityTier=1
PartitionName=high Nodes=n[1-{nodes}] MaxTime=60 State=UP PriorityTier=10
PartitionName=cheap Nodes=n[1-{nodes}] MaxTime=60 State=UP PriorityTier=1 PreemptMode=CANCEL GraceTime=0
PartitionName=graceful Nodes=n[1-{nodes}] MaxTime=60 State=UP PriorityTier=1 PreemptMode=CANCEL GraceTime=20
"""
MACHINE = "NodeName={} NodeHostname=localhost NodeAddr=127.0.0.1 Port={} CPUs=2 RealMemory=4000 Gres=gpu:2"
READY_S = 60.0


class Lab:
    """A running Slurm cluster.

    Attributes:
        folder: the cluster's configuration, logs, state and process ids.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.conf = folder / "slurm.conf"
        self._slurmds: dict[str, subprocess.Popen[bytes]] = {}
        self._gone: set[str] = set()
        self._slurmctld: subprocess.Popen[bytes] | None = None

    @property
    def nodes(self) -> list[str]:
        return [f"n{number}" for number in range(1, NODES + 1)]

    @property
    def diagnostics(self) -> str:
        """Return the state of the nodes and jobs, and the controller's log."""
        shown = run("scontrol", "--oneliner", "show", "node", check=False) + run("squeue", check=False)
        return shown + (self.folder / "log/ctld.log").read_text()[-5000:]

    def start(self) -> None:
        if os.geteuid():
            raise PermissionError("Slurm's daemons need root: they start processes as other users")
        install()
        start_munge(self.folder)
        for name in ("state", "log", "run", *(f"spool/{node}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        port, *ports = free_ports(1 + NODES)
        machines = "\n".join(map(MACHINE.format, self.nodes, ports))
        first = 1 + port % 10_000  # the rendezvous port follows from the job's id, and another lab may run here
        self.conf.write_text(CONF.format(folder=self.folder, nodes=NODES, port=port, first=first, machines=machines))
        (self.folder / "gres.conf").write_text("Name=gpu File=/dev/tty[0-1]\n")  # Slurm needs a file for each GPU
        os.environ["SLURM_CONF"] = str(self.conf)
        self._slurmctld = self._daemon("slurmctld", "-D")
        for node in self.nodes:
            self.start_node(node)
        self.wait_for_idle(self.nodes)

    def start_node(self, node: str) -> None:
        self._slurmds[node] = self._daemon("slurmd", "-D", "-N", node)
        self._gone.discard(node)

    def kill_node(self, node: str) -> None:
        """Simulate a machine's crash: kill its slurmd and all its processes at once, so that none can report."""
        self.freeze_node(node)
        self._send(node, signal.SIGKILL)

    def freeze_node(self, node: str) -> None:
        """Simulate a machine without network: it doesn't answer, and its connections stay open."""
        self._send(node, signal.SIGSTOP)
        self._gone.add(node)

    def clear(self, nodes: Iterable[str]) -> None:
        """Cancel the jobs on these nodes, and bring the nodes back into service."""
        run("scancel", "--me", f"--nodelist={','.join(nodes)}", check=False)
        for node in self._gone & set(nodes):
            self.kill_node(node)
            self.start_node(node)
        self.wait_for_idle(nodes)

    def _send(self, node: str, number: signal.Signals) -> None:
        for pid in {self._slurmds[node].pid, *self.processes_of(node)}:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def processes_of(self, node: str) -> list[int]:
        """Return a node's slurmd and step daemons, which all hold its log open, and their children."""
        log = self.folder / f"log/{node}.log"
        return [*_processes(lambda entry: log in _files(entry)), *self.tasks_of(node)]

    def tasks_of(self, node: str) -> list[int]:
        """Return the processes that Slurm started on a node: the jobs' scripts and tasks."""
        named = {f"SLURMD_NODENAME={node}".encode(), f"SLURM_CONF={self.conf}".encode()}
        return _processes(lambda entry: named <= set((entry / "environ").read_bytes().split(b"\0")))

    def wait_for_idle(self, nodes: Iterable[str], within_s: float = READY_S) -> None:
        deadline, listed = time.monotonic() + within_s, ",".join(nodes)
        while True:
            states = run("sinfo", "-h", "-N", "-n", listed, "-p", "main", "-o", "%T", check=False).split()
            if set(states) == {"idle"}:
                return
            if time.monotonic() > deadline:
                logs = "".join(log.read_text()[-500:] for log in (self.folder / "log").iterdir())
                raise TimeoutError(f"nodes are {states} after {within_s:g} s: {logs}")
            time.sleep(0.2)

    def stop(self) -> None:
        with suppress(OSError, subprocess.SubprocessError):
            run("scancel", "--me", "--signal=KILL", "--full", check=False)
            run("scancel", "--me", check=False)
        for daemon in (self._slurmctld, *self._slurmds.values()):
            if daemon:
                daemon.terminate()
        for daemon in (self._slurmctld, *self._slurmds.values()):
            if daemon:
                with suppress(subprocess.TimeoutExpired):
                    daemon.wait(10)
                daemon.kill()
        for node in self._slurmds:
            self._send(node, signal.SIGKILL)

    def _daemon(self, *words: str) -> subprocess.Popen[bytes]:
        log = open(self.folder / f"log/{'-'.join(words)}.out", "ab")  # noqa: SIM115
        return subprocess.Popen(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)


def _processes(match: Callable[[Path], bool]) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if match(entry):
                found.append(int(entry.name))
    return found


def _files(process: Path) -> set[Path]:
    return {file.readlink() for file in (process / "fd").iterdir()}


def run(*words: str, check: bool = True, **how: Any) -> str:
    """Return the output of a Slurm command."""
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=check, **how).stdout


def install() -> None:
    """Install Slurm and munge from the distribution's packages."""
    if shutil.which("slurmctld") and shutil.which("munged"):
        return
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "update", "-qq"], check=True, env=env)
    subprocess.run(["apt-get", "install", "-y", "-qq", "slurm-wlm", "munge"], check=True, env=env)


def start_munge(folder: Path) -> None:
    """Start munge, which signs Slurm's messages, unless it is running."""
    if subprocess.run("munge -n | unmunge", shell=True, capture_output=True).returncode == 0:
        return
    Path("/run/munge").mkdir(exist_ok=True)
    shutil.chown("/run/munge", "munge", "munge")
    subprocess.run(["su", "-s", "/bin/sh", "munge", "-c", "/usr/sbin/munged"], check=True)


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


@contextmanager
def running() -> Iterator[Lab]:
    """Run a Slurm cluster inside this block."""
    with tempfile.TemporaryDirectory(prefix="isobatch-slurm-", ignore_cleanup_errors=True) as name:
        lab = Lab(Path(name))
        try:
            lab.start()
            yield lab
        finally:
            lab.stop()


if __name__ == "__main__":
    with running() as lab:
        print(f"export SLURM_CONF={lab.conf}", flush=True)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        with suppress(KeyboardInterrupt):
            signal.pause()
