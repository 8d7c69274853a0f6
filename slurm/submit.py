"""Giving a job to Slurm; where Slurm rejects it, what it says, and what would help."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from isobatch.conf.existing import refuse_missing
from isobatch.conf.groups import Slurm
from isobatch.conf.overrides import override
from isobatch.conf.rundir.files import events, write_atomic
from isobatch.conf.schema import RunConfig
from isobatch.scaling.errors import UserError
from isobatch.slurm.render import render
from isobatch.slurm.state import ask, queued

OF_THE_SITE = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")  # of Slurm's variables; the others are of a job

# What sbatch says → what would work; where it says several, the first of these.
HELP = {
    "invalid partition": "`sinfo -s` lists the partitions: cluster.partition",
    "invalid account": "`sacctmgr show assoc user=$USER` lists the accounts: cluster.account, cluster.partition",
    "invalid qos": "`sacctmgr show qos` lists them: cluster.qos",
    "invalid feature": "`sinfo -o '%N %f'` lists the features of nodes: cluster.constraint",
    "invalid generic resource": "nodes have none of that kind: cluster.gres=none is for clusters without GPUs, "
    "cluster.gres=gres for those without --gpus-per-node",
    "more processors requested": "`sinfo -s` shows how many nodes a partition has: cluster.nodes, cluster.cpus_per_gpu",
    "node count specification invalid": "the partition has fewer nodes, or allows a job fewer: cluster.nodes",
    "invalid node name": "`sinfo -N` lists the nodes: cluster.nodelist, cluster.exclude",
    "memory specification": "`sinfo -o '%P %m'` shows a node's memory: cluster.mem_gb",
    "time limit": "`sinfo -o '%P %l'` shows the limits: cluster.time_min",
    "reservation": "`scontrol show reservation` lists them: cluster.reservation",
    "dependency": "cluster.dependency=afterok:JOB, of a job that is there",
    "violates": "the account or the quality of service allows less: cluster.account, cluster.qos, cluster.time_min, "
    "cluster.nodes",
    "job array": "the site allows arrays of fewer runs: `scontrol show config | grep MaxArraySize`",
    "unrecognized option": "cluster.extra holds options of sbatch: `sbatch --help` lists them",
    "requested node configuration is not available": "no such nodes are there, so many or so large: "
    "`sinfo -o '%P %D %c %m %G'` shows what there is: cluster.nodes, gpus_per_node, cpus_per_gpu, mem_gb",
    "unable to contact": "Slurm's controller doesn't answer; try again later",
}


def refuse_unless_submittable(config: RunConfig) -> None:
    """Raise UserError where a key has to be given, or doesn't go with a job."""
    if config.cluster.gpus_per_node == "auto":
        problem = "cluster=slurm doesn't know the GPUs of a node: what this machine has says nothing of those"
        fix = "give cluster.gpus_per_node=…, the worker processes of each node"
        raise UserError(problem, fix, "cluster.gpus_per_node", "auto")
    if config.init_from is not None:
        refuse_missing(config.init_from)
    if config.debug:
        problem = "debug=true is one worker in this process, and cluster=slurm submits a job"
        raise UserError(problem, "give one of them", "debug", True)


def common_cluster(configs: Sequence[RunConfig]) -> Slurm:
    """Return the cluster of all runs of a sweep, which are one array of jobs. Raises UserError where they differ."""
    first = configs[0].cluster
    if any(config.cluster != first for config in configs) or not isinstance(first, Slurm):
        problem = "the runs of a sweep are one array of jobs, and ask for different clusters"
        raise UserError(problem, "cluster.… has to be the same for all of them", "cluster")
    return first


def refuse_if_queued(directories: Sequence[Path]) -> None:
    """Raise UserError, naming it, where a job that was submitted for one of these runs isn't over yet."""
    submitted = {job: directory for directory in directories for job in jobs_of(directory, "submitted")}
    by_hand = {job: directory for directory in directories for job in jobs_of(directory, "start")}
    for job, one in queued([*submitted, *by_hand]).items() if submitted or by_hand else ():
        # one that works has the lock; a shell within a job may have started it there, and may go on without it
        if job in submitted or (job in by_hand and one.state == "PENDING"):
            problem = f"job {job} does the run in {(submitted | by_hand)[job]} already ({one})"
            fix = f"wait for it, `scancel {job}`, or start another run beside it with run.new=true"
            raise UserError(problem, fix, "run.dir")


def jobs_of(directory: Path, kind: str) -> list[str]:
    """Return the ids of the jobs in events of a run, the newest last."""
    return [str(event["job"]) for event in events(directory) if event.get("event") == kind and "job" in event]


def sbatch(script: Path, options: Sequence[str]) -> str:
    """Submit a script; return the job's id. Raises UserError where Slurm rejects it, with what would help."""
    # without the variables of a job that this process is in, which the new one would find
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_") or name in OF_THE_SITE}
    try:
        answer = ask("sbatch", "--parsable", *options, str(script), env=env)
    except UserError as error:
        hints = [hint for pattern, hint in HELP.items() if re.search(pattern, error.problem, re.IGNORECASE)]
        raise UserError(error.problem, hints[0] if hints else error.fix) from None
    return answer.strip().partition(";")[0]


@dataclass(frozen=True, slots=True)
class Submission:
    """Describe a job, or an array of several, that is ready to be given to Slurm.

    Attributes:
        script: its path; ``text`` its content; ``options``: of sbatch, beside it.
        configs: of each run, the file that holds its config, and the content.
        output: the file that Slurm writes to; ``%j`` or ``%A_%a`` in it stand for the job.
    """

    script: Path
    text: str
    options: tuple[str, ...]
    configs: dict[Path, str]
    output: Path

    def job_of(self, job: str, number: int) -> str:
        """Return the id of the ``number``-th run's job."""
        return f"{job}_{number}" if len(self.configs) > 1 else job

    def output_of(self, job: str) -> Path:
        """Return the file that a job writes to; of an array a pattern for all."""
        name = self.output.name.replace("%A", job).replace("%a", "*").replace("%j", job)
        return self.output.with_name(name)

    def told(self, job: str) -> str:
        """Return what is said once Slurm has it."""
        output, runs = self.output_of(job), len(self.configs)
        array = f", an array of {runs} runs" if runs > 1 else ""
        follow = f"tail -F {shlex.quote(str(output.parent))}/{output.name}"
        return (
            f"submitted job {job}{array}\nrun     {self.script.parent.parent}\noutput  {output}\n"
            f"follow  {follow}\ncancel  scancel {job}"
        )

    def give(self) -> str:
        """Write the files and submit; return the job's id. Where Slurm rejects the job, none of the files stays."""
        files = {self.script: self.text, **self.configs}
        self.output.parent.mkdir(parents=True, exist_ok=True)  # Slurm makes no folders
        try:
            for file, content in files.items():
                file.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(file, content)
            return sbatch(self.script, self.options)
        except BaseException:
            for file in files:
                file.unlink(missing_ok=True)
                with suppress(OSError):  # there is another one
                    file.parent.rmdir()
            raise


def prepare(cluster: Slurm, runs: Mapping[Path, str], root: Path, stamp: str, launcher: Path) -> Submission:
    """Return what is to be submitted.

    Args:
        runs: the absolute directory of each, and its whole config as it is now: editing a file later doesn't change a
            job that waits.
        root: the directory of the run, or of the sweep.
        stamp: the name of this submission.
    """
    configs = {directory / f"submissions/{stamp}.yaml": text for directory, text in runs.items()}
    pairs = zip(runs, configs, strict=True)
    words = [[override("run.dir", str(place)), override("run.config", str(file))] for place, file in pairs]
    folder, job = str(root).replace("%", "%%"), "slurm-%A_%a" if len(runs) > 1 else "slurm-%j"
    if "\\" in folder:  # a path with one is taken as it is, and two of them for one
        folder, job = str(root).replace("\\", "\\\\"), "slurm"
    name, pattern = re.sub(r"[^\w.+-]", "_", root.name, flags=re.ASCII), f"{folder}/logs/{job}.out"
    text, options = render(cluster, words, name=name, output=pattern, python=sys.executable, launcher=str(launcher))
    return Submission(root / f"submissions/{stamp}.sh", text, options, configs, root / f"logs/{job}.out")
