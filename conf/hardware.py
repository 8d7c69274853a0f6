"""Find out who started this process and which GPUs are here, without torch."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Mapping
from pathlib import Path

from isobatch.conf.groups import Slurm
from isobatch.conf.schema import RunConfig
from isobatch.scaling.errors import UserError

IN_SWEEP = "ISOBATCH_IN_SWEEP"  # set by a sweep, of which search.parallel runs train at a time
GPUS = "ISOBATCH_GPUS"  # set in each of these runs: its part of the GPUs, as CUDA_VISIBLE_DEVICES names them
FILES = 64  # that a process of a training may have to open: one of two ranks needs some 30, and data loaders more


def under_torchrun(env: Mapping[str, str] = os.environ) -> bool:
    """Return whether torchrun, or a launcher that sets the same variables, started this process."""
    return "TORCHELASTIC_RUN_ID" in env or {"RANK", "WORLD_SIZE"} <= env.keys()


def visible_gpus(env: Mapping[str, str] = os.environ, root: Path = Path("/")) -> int:
    """Count the GPUs that CUDA would show this process: those of the driver, less what CUDA_VISIBLE_DEVICES hides."""
    devices = [file for file in (root / "dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", file.name)]
    present = len(devices) or len(list((root / "proc/driver/nvidia/gpus").glob("*")))
    if "CUDA_VISIBLE_DEVICES" not in env:
        return present
    shown: set[str] = set()
    for name in env["CUDA_VISIBLE_DEVICES"].split(","):
        name = name.strip()
        numbered = re.fullmatch(r"\d+", name) is not None
        if not re.fullmatch(r"\d+|(GPU|MIG)-.+", name) or name in shown or (numbered and int(name) >= present):
            break  # as CUDA does: what follows the first one that isn't there isn't seen
        shown.add(name)
    return len(shown) if present else 0


def enter_slot(config: RunConfig, slot: int) -> None:
    """Give this process its part of the GPUs, if there are any, as one of ``runs_at_a_time`` runs of a sweep.

    Args:
        slot: index of the run among them, from 0.
    """
    env, here = environment(config), workers_here(config)
    count = visible_gpus(env)
    if config.device == "cpu" or not count or runs_at_a_time(config) == 1:
        return
    names = env.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    os.environ[GPUS] = ",".join(names[slot * here : (slot + 1) * here])


def runs_at_a_time(config: RunConfig) -> int:
    """Return the number of runs that train at a time on this machine, by one command."""
    return config.search.parallel if IN_SWEEP in os.environ else 1


def _sharing_gpus(config: RunConfig) -> int:
    """Return the number of runs that share the GPUs that this process sees."""
    return 1 if GPUS in os.environ else runs_at_a_time(config)


def environment(config: RunConfig) -> dict[str, str]:
    """Return the environment of the workers."""
    given = {name: str(value) for name, value in config.cluster.environment.items()}
    part = {"CUDA_VISIBLE_DEVICES": os.environ[GPUS]} if GPUS in os.environ else {}
    return os.environ | given | part


def workers_here(config: RunConfig) -> int:
    """Return the worker processes of this machine: as given, or one for each GPU that it may use, or 1."""
    if config.debug:
        return 1
    if config.cluster.gpus_per_node != "auto":
        return config.cluster.gpus_per_node
    if config.device == "cpu" or (config.engine.name == "accelerate" and by_accelerate()):
        return 1
    return max(1, visible_gpus(environment(config)) // _sharing_gpus(config))


def by_accelerate(env: Mapping[str, str] = os.environ) -> bool:
    """Return whether `accelerate launch` started this process as its only one; it starts several by torchrun."""
    return "ACCELERATE_MIXED_PRECISION" in env and not under_torchrun(env)


def world_size(config: RunConfig) -> int:
    """Return the number of data-parallel ranks: torchrun's number of them, or machines × workers of each.

    Raises:
        UserError: torchrun's numbers aren't any, or the config contradicts them.
    """
    cluster = config.cluster
    if not under_torchrun():
        return cluster.nodes * workers_here(config)
    world, here = _ranks("WORLD_SIZE", ""), _ranks("LOCAL_WORLD_SIZE", "1")
    if cluster.gpus_per_node not in ("auto", here):
        problem = f"cluster.gpus_per_node={cluster.gpus_per_node} contradicts torchrun's LOCAL_WORLD_SIZE={here}"
        raise UserError(problem, "leave it out", "cluster.gpus_per_node", cluster.gpus_per_node)
    nodes = _ranks("GROUP_WORLD_SIZE", str(max(1, world // here)))
    if cluster.nodes != nodes and (cluster.nodes > 1 or "cluster.nodes" in config.given):
        torchruns = f"torchrun's WORLD_SIZE={world} with LOCAL_WORLD_SIZE={here}"
        problem = f"cluster.nodes={cluster.nodes} contradicts {torchruns}"
        raise UserError(problem, "leave it out", "cluster.nodes", cluster.nodes)
    return world


def _ranks(name: str, default: str) -> int:
    said = os.environ.get(name, default)
    if not re.fullmatch(r"[1-9]\d*", said):
        raise UserError(f"{name}={said} in the environment isn't the number that torchrun sets")
    return int(said)


def _allow_files() -> None:
    """Raise the limit of open files to ``FILES``. Raises UserError if that isn't allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= FILES:
        return
    if hard != resource.RLIM_INFINITY and hard < FILES:
        problem = f"a process may have {hard} files open here, and training needs {FILES}"
        raise UserError(problem, f"raise it, ulimit -n {FILES}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, hard))


def refuse_unless_startable(config: RunConfig) -> None:
    """Raise UserError if training can't start on this machine."""
    _allow_files()
    cluster, torchrun = config.cluster, under_torchrun()
    if isinstance(cluster, Slurm):
        command = f"srun --ntasks-per-node=1 python launch.py cluster=slurm action={config.action} …"
        problem = f"cluster=slurm submits trainings, and action={config.action} isn't one"
        raise UserError(problem, f"within a job, `{command}` does it on its machines", "action", config.action)
    if config.debug and (torchrun or cluster.nodes > 1 or cluster.gpus_per_node not in ("auto", 1)):
        nodes, gpus = cluster.nodes, cluster.gpus_per_node
        asked = "torchrun" if torchrun else f"cluster.nodes={nodes} cluster.gpus_per_node={gpus}"
        problem = f"debug=true is one worker in the launcher's own process, which contradicts {asked}"
        raise UserError(problem, "leave out one of them", "debug", True)
    several = by_accelerate() and os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_PORT" in os.environ
    if config.engine.name == "accelerate" and several and cluster.gpus_per_node == "auto":
        raise UserError(
            "accelerate launch was asked for several processes on the CPU, and starts one, or what mpirun starts",
            "give it --multi_gpu instead of --cpu, and device=cpu here; or cluster.gpus_per_node=N, which starts N",
        )
    if cluster.nodes > 1 and cluster.rendezvous is None and not torchrun:
        problem = f"cluster.nodes={cluster.nodes} needs cluster.rendezvous=host:port, the same on every node"
        raise UserError(problem, "the host is the first node, the port a free one of it", "cluster.rendezvous")
    env = environment(config)
    visible = visible_gpus(env)
    if config.device == "cuda" and not visible:
        hidden = f" (CUDA_VISIBLE_DEVICES={env['CUDA_VISIBLE_DEVICES']})" if "CUDA_VISIBLE_DEVICES" in env else ""
        raise UserError(
            f"device=cuda, but no GPU is visible here{hidden}", "device=cpu trains without", "device", "cuda"
        )
    here = _ranks("LOCAL_WORLD_SIZE", "1") if torchrun else workers_here(config)
    at_a_time = _sharing_gpus(config)
    if config.device != "cpu" and visible and at_a_time > 1 and here * at_a_time > visible:
        problem = f"search.parallel={at_a_time} runs of {here} GPUs need {here * at_a_time}, and {visible} are visible"
        raise UserError(problem, "give fewer, or device=cpu", "search.parallel", at_a_time)
    if config.device != "cpu" and visible and here > visible and cluster.backend == "auto":
        problem = f"{here} processes here need a GPU each, and {visible} {'are' if visible > 1 else 'is'} visible"
        fix = f"{visible} give the same run with more accumulation (batch.per_gpu bounds the memory), or device=cpu"
        raise UserError(problem, fix, "cluster.gpus_per_node", here)
