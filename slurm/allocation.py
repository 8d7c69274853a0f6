"""Within a job's step: which machines it has, and which of them this one is."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from isobatch.conf.groups import Local, Slurm
from isobatch.conf.schema import RunConfig
from isobatch.scaling.errors import UserError
from isobatch.slurm.state import address, ask, hostnames

PORTS = range(10_000, 30_000)  # below those that kernels give out by themselves
STEP_STRIDE = 7919  # between the ports of two steps of one job: a prime, so that they meet no neighbouring job's


@dataclass(frozen=True, slots=True)
class Allocation:
    """Hold what a task of ``srun`` knows of its job.

    Attributes:
        job: its number; each element of an array has one of its own.
        step: the number of its step in the job; several may run at once.
        hosts: its machines, as Slurm names them; ``host``: this one.
        gpus: of this machine that are the job's; None: Slurm doesn't say.
    """

    job: str
    hosts: tuple[str, ...]
    host: str
    gpus: int | None
    step: int = 0

    @classmethod
    def within(cls, env: Mapping[str, str] = os.environ) -> Allocation | None:
        """Return the job that this process is a task of; None outside of a job.

        Raises:
            UserError: it is in a job and no task of it, or a machine has several, or Slurm can't name the machines.
        """
        if "SLURM_JOB_ID" not in env:
            return None
        if "SLURM_STEP_ID" not in env:
            problem = f"this is inside of Slurm's job {env['SLURM_JOB_ID']}"
            fix = (
                "start its nodes with `srun --ntasks-per-node=1 python launch.py cluster=slurm …`, or submit another "
                "job from outside (env -u SLURM_JOB_ID …)"
            )
            raise UserError(problem, fix, "cluster", "slurm")
        tasks, nodes = env.get("SLURM_NTASKS", "1"), env.get("SLURM_STEP_NUM_NODES", "1")
        if tasks != nodes:
            problem = (
                f"srun starts {tasks} tasks on {nodes} nodes, and needs one a node, which starts that node's workers"
            )
            raise UserError(problem, "srun --ntasks-per-node=1 (and #SBATCH --ntasks-per-node=1)")
        hosts = tuple(hostnames(env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"]))
        host, gpus = env.get("SLURMD_NODENAME", hosts[0]), env.get("SLURM_GPUS_ON_NODE", "")
        gpus_here = int(gpus) if gpus.isdecimal() else None
        return cls(env["SLURM_JOB_ID"], hosts, host, gpus_here, int(env["SLURM_STEP_ID"]))

    def rendezvous(self) -> str:
        """Return where the machines meet: the first one, by Slurm's address of it, at a port of this job step."""
        return f"{address(self.hosts[0])}:{PORTS[(int(self.job) + STEP_STRIDE * self.step) % len(PORTS)]}"

    @property
    def kill_wait_s(self) -> int | None:
        """Return the seconds from Slurm's notice that the job ends to its kill; None where it isn't known."""
        with suppress(UserError):  # only to warn by
            found = re.search(r"^KillWait\s*=\s*(\d+)", ask("scontrol", "show", "config"), re.MULTILINE)
            return int(found[1]) if found else None
        return None


def as_local(config: RunConfig, allocation: Allocation) -> RunConfig:
    """Return ``config`` for the machines of ``allocation``. Raises UserError where it contradicts the allocation."""
    cluster = config.cluster
    assert isinstance(cluster, Slurm)
    nodes = len(allocation.hosts)
    if "cluster.nodes" in config.given and cluster.nodes != nodes:
        problem = f"cluster.nodes={cluster.nodes}, but job {allocation.job} has {nodes}"
        raise UserError(problem, "leave it out", "cluster.nodes", cluster.nodes)
    if config.run.new:
        problem = "run.new=true would begin another run each time that this job is queued again"
        fix = (
            "give the new run a name of its own, run.name=…, or submit it: python launch.py cluster=slurm run.new=true"
        )
        raise UserError(problem, fix, "run.new", True)
    local = Local(
        name="local",
        nodes=nodes,
        gpus_per_node=(allocation.gpus or "auto") if cluster.gpus_per_node == "auto" else cluster.gpus_per_node,
        rendezvous=allocation.rendezvous() if nodes > 1 else None,
        max_restarts=cluster.max_restarts,
        timeout_s=cluster.timeout_s,
        environment=cluster.environment,
    )
    return config.model_copy(update={"cluster": local})
