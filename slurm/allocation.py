"""Find the machines of the job step that this process belongs to."""

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

PORTS = range(10_000, 30_000)  # below the kernel's ephemeral ports
STEP_STRIDE = 7919  # between the ports of a job's steps; a prime, so that they differ from a neighbouring job's


@dataclass(frozen=True, slots=True)
class Allocation:
    """Describe the job and the machines of a task of ``srun``.

    Attributes:
        job: the job's number; each element of an array has its own.
        step: the number of the step in the job; several steps may run at once.
        hosts: the machines by their names in Slurm; ``host``: this machine.
        gpus: number of the job's GPUs on this machine; None if Slurm doesn't report it.
    """

    job: str
    hosts: tuple[str, ...]
    host: str
    gpus: int | None
    step: int = 0

    @classmethod
    def within(cls, env: Mapping[str, str] = os.environ) -> Allocation | None:
        """Return the allocation of this task; None outside of a job.

        Raises:
            UserError: the process isn't a task of its job, or a machine has several tasks, or Slurm can't name the
                machines.
        """
        if "SLURM_JOB_ID" not in env:
            return None
        if "SLURM_STEP_ID" not in env:
            problem = f"this process runs inside Slurm job {env['SLURM_JOB_ID']}, but not under srun"
            run = "start the job's nodes with `srun --ntasks-per-node=1 python launch.py cluster=slurm …`"
            fix = f"{run}, or submit another job from outside (env -u SLURM_JOB_ID …)"
            raise UserError(problem, fix, "cluster", "slurm")
        tasks, nodes = env.get("SLURM_NTASKS", "1"), env.get("SLURM_STEP_NUM_NODES", "1")
        if tasks != nodes:
            problem = f"srun starts {tasks} tasks on {nodes} nodes, instead of one per node"
            raise UserError(problem, "use srun --ntasks-per-node=1 and #SBATCH --ntasks-per-node=1")
        hosts = tuple(hostnames(env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"]))
        host, gpus = env.get("SLURMD_NODENAME", hosts[0]), env.get("SLURM_GPUS_ON_NODE", "")
        gpus_here = int(gpus) if gpus.isdecimal() else None
        return cls(env["SLURM_JOB_ID"], hosts, host, gpus_here, int(env["SLURM_STEP_ID"]))

    def rendezvous(self) -> str:
        """Return the rendezvous: the first machine's address in Slurm, and a port derived from the job step."""
        return f"{address(self.hosts[0])}:{PORTS[(int(self.job) + STEP_STRIDE * self.step) % len(PORTS)]}"

    @property
    def kill_wait_s(self) -> int | None:
        """Return the seconds between Slurm's TERM and KILL; None if unknown."""
        with suppress(UserError):  # only needed for a warning
            found = re.search(r"^KillWait\s*=\s*(\d+)", ask("scontrol", "show", "config"), re.MULTILINE)
            return int(found[1]) if found else None
        return None


def as_local(config: RunConfig, allocation: Allocation) -> RunConfig:
    """Return ``config`` for the machines of ``allocation``. Raises UserError if it contradicts the allocation."""
    cluster = config.cluster
    assert isinstance(cluster, Slurm)
    nodes = len(allocation.hosts)
    if "cluster.nodes" in config.given and cluster.nodes != nodes:
        problem = f"cluster.nodes={cluster.nodes}, but job {allocation.job} has {nodes}"
        raise UserError(problem, "leave it out", "cluster.nodes", cluster.nodes)
    if config.run.new:
        problem = "run.new=true would start another run each time that this job is requeued"
        fix = "give the new run its own run.name=…, or submit it with python launch.py cluster=slurm run.new=true"
        raise UserError(problem, fix, "run.new", True)
    local = Local(
        name="local",
        nodes=nodes,
        gpus_per_node=(allocation.gpus or "auto") if cluster.gpus_per_node == "auto" else cluster.gpus_per_node,
        backend=cluster.backend,
        memory_gb=cluster.memory_gb,
        gpu_memory_gb=cluster.gpu_memory_gb,
        rendezvous=allocation.rendezvous() if nodes > 1 else None,
        max_restarts=cluster.max_restarts,
        timeout_s=cluster.timeout_s,
        environment=cluster.environment,
    )
    return config.model_copy(update={"cluster": local})
