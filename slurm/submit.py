"""Submit a job to Slurm, and suggest a fix if Slurm rejects it."""

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
from isobatch.conf.rundir.files import write_atomic
from isobatch.conf.rundir.reading import events
from isobatch.conf.schema import RunConfig
from isobatch.scaling.errors import UserError
from isobatch.slurm.render import render
from isobatch.slurm.state import ask, queued

SITE_VARIABLES = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")  # the other SLURM_* variables describe a job

# pattern in sbatch's error → fix; the first match is used
HELP = {
    "invalid partition": "`sinfo -s` lists the partitions: cluster.partition",
    "invalid account": "`sacctmgr show assoc user=$USER` lists the accounts: cluster.account, cluster.partition",
    "invalid qos": "`sacctmgr show qos` lists them: cluster.qos",
    "invalid feature": "`sinfo -o '%N %f'` lists the features of nodes: cluster.constraint",
    "invalid generic resource": "the nodes don't have it: cluster.gres=none is for clusters without GPUs, "
    "cluster.gres=gres for clusters without --gpus-per-node",
    "more processors requested": "`sinfo -s` shows how many nodes a partition has: cluster.nodes, cluster.cpus_per_gpu",
    "node count specification invalid": "the partition has fewer nodes, or allows a job fewer: cluster.nodes",
    "invalid node name": "`sinfo -N` lists the nodes: cluster.nodelist, cluster.exclude",
    "memory specification": "`sinfo -o '%P %m'` shows a node's memory: cluster.mem_gb",
    "time limit": "`sinfo -o '%P %l'` shows the limits: cluster.time_min",
    "reservation": "`scontrol show reservation` lists them: cluster.reservation",
    "dependency": "give a job that exists, such as cluster.dependency=afterok:JOB",
    "violates": "the account or the quality of service allows less: cluster.account, cluster.qos, cluster.time_min, "
    "cluster.nodes",
    "job array": "the site allows arrays of fewer runs: `scontrol show config | grep MaxArraySize`",
    "unrecognized option": "cluster.extra holds options of sbatch: `sbatch --help` lists them",
    "requested node configuration is not available": "the cluster doesn't have so many or so large nodes: "
    "`sinfo -o '%P %D %c %m %G'` lists them: cluster.nodes, gpus_per_node, cpus_per_gpu, mem_gb",
    "unable to contact": "Slurm's controller doesn't answer; try again later",
}


def refuse_unless_submittable(config: RunConfig) -> None:
    """Raise UserError if a required key is missing, or a key can't be used with a job."""
    if config.cluster.gpus_per_node == "auto":
        problem = "cluster=slurm can't detect the GPUs of the cluster's nodes from this machine"
        fix = "give cluster.gpus_per_node=…, the number of workers on each node"
        raise UserError(problem, fix, "cluster.gpus_per_node", "auto")
    if config.init_from is not None:
        refuse_missing(config.init_from)
    if config.debug:
        problem = "debug=true runs one worker in this process, but cluster=slurm submits a job"
        raise UserError(problem, "leave out one of them", "debug", True)


def common_cluster(configs: Sequence[RunConfig]) -> Slurm:
    """Return the cluster shared by all runs of a sweep, which form a job array. Raises UserError if they differ."""
    first = configs[0].cluster
    if any(config.cluster != first for config in configs) or not isinstance(first, Slurm):
        problem = "the runs of a sweep form one job array, but have different cluster.… keys"
        raise UserError(problem, "give all runs the same cluster.… keys", "cluster")
    return first


def refuse_if_queued(directories: Sequence[Path]) -> None:
    """Raise UserError if a job that was submitted for one of these runs isn't over yet."""
    submitted = {job: directory for directory in directories for job in jobs_of(directory, "submitted")}
    by_hand = {job: directory for directory in directories for job in jobs_of(directory, "start")}
    for job, entry in queued([*submitted, *by_hand]).items() if submitted or by_hand else ():
        # a run started by hand in a job's shell holds the lock while it works, but its job may outlive it
        if job in submitted or (job in by_hand and entry.state == "PENDING"):
            problem = f"job {job} already does the run in {(submitted | by_hand)[job]} ({entry})"
            fix = f"wait for it, `scancel {job}`, or start another run with run.new=true"
            raise UserError(problem, fix, "run.dir")


def jobs_of(directory: Path, kind: str) -> list[str]:
    """Return the ids of the jobs in a run's events of one ``kind``, newest last."""
    return [str(event["job"]) for event in events(directory) if event.get("event") == kind and "job" in event]


def sbatch(script: Path, options: Sequence[str]) -> str:
    """Submit a script and return the job's id. Raises UserError with a fix if Slurm rejects it."""
    # the new job must not inherit the variables of a job that this process is in
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_") or name in SITE_VARIABLES}
    try:
        answer = ask("sbatch", "--parsable", *options, str(script), env=env)
    except UserError as error:
        hints = [hint for pattern, hint in HELP.items() if re.search(pattern, error.problem, re.IGNORECASE)]
        raise UserError(error.problem, hints[0] if hints else error.fix) from None
    return answer.strip().partition(";")[0]


@dataclass(frozen=True, slots=True)
class Submission:
    """Describe a job, or an array of jobs, that is ready to be submitted.

    Attributes:
        script: the path of the script; ``text``: its content; ``options``: the options of sbatch.
        configs: the content of each run's config file, by path.
        output: the path of the output; ``%j`` or ``%A_%a`` stand for the job.
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
        """Return the path of a job's output; for an array, a pattern for all elements."""
        name = self.output.name.replace("%A", job).replace("%a", "*").replace("%j", job)
        return self.output.with_name(name)

    def message(self, job: str) -> str:
        """Return the message to print after the submission."""
        output, runs = self.output_of(job), len(self.configs)
        array = f", an array of {runs} runs" if runs > 1 else ""
        follow = f"tail -F {shlex.quote(str(output.parent))}/{output.name}"
        return (
            f"submitted job {job}{array}\nrun     {self.script.parent.parent}\noutput  {output}\n"
            f"follow  {follow}\ncancel  scancel {job}"
        )

    def submit(self) -> str:
        """Write the files, submit the job and return its id. If Slurm rejects the job, the files are removed."""
        files = {self.script: self.text, **self.configs}
        self.output.parent.mkdir(parents=True, exist_ok=True)  # Slurm doesn't create folders
        try:
            for file, content in files.items():
                file.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(file, content)
            return sbatch(self.script, self.options)
        except BaseException:
            for file in files:
                file.unlink(missing_ok=True)
                with suppress(OSError):  # not empty
                    file.parent.rmdir()
            raise


def prepare(cluster: Slurm, runs: Mapping[Path, str], root: Path, stamp: str, launcher: Path) -> Submission:
    """Return the submission of a job for ``runs``.

    Args:
        runs: the complete config of each run by its absolute directory. It is frozen, so that editing a YAML file later
            doesn't change a waiting job.
        root: the directory of the run, or of the sweep.
        stamp: the name of this submission.
    """
    configs = {directory / f"submissions/{stamp}.yaml": text for directory, text in runs.items()}
    pairs = zip(runs, configs, strict=True)
    words = [[override("run.dir", str(path)), override("run.config", str(file))] for path, file in pairs]
    folder, job = str(root).replace("%", "%%"), "slurm-%A_%a" if len(runs) > 1 else "slurm-%j"
    if "\\" in folder:  # sbatch then reads two backslashes as one, and takes % literally
        folder, job = str(root).replace("\\", "\\\\"), "slurm"
    name, pattern = re.sub(r"[^\w.+-]", "_", root.name, flags=re.ASCII), f"{folder}/logs/{job}.out"
    text, options = render(cluster, words, name=name, output=pattern, python=sys.executable, launcher=str(launcher))
    return Submission(root / f"submissions/{stamp}.sh", text, options, configs, root / f"logs/{job}.out")
