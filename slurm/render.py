"""Render the script of a job as text, without side effects."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence

from isobatch.conf.groups import Slurm
from isobatch.scaling.geometry import counted

MAIL = "END,FAIL,REQUEUE,INVALID_DEPEND"


def render(
    cluster: Slurm, runs: Sequence[Sequence[str]], *, name: str, output: str, python: str, launcher: str
) -> tuple[str, tuple[str, ...]]:
    """Render the script of a job for one run, or of an array for several.

    Args:
        runs: the launcher's arguments for each run: ``run.dir=…``, ``run.config=…``.
        name: the name of the job.
        output: the path of the job's output; ``%j`` stands for the job.
        python: the interpreter, if ``cluster.setup`` doesn't provide one.
        launcher: the path of ``launch.py``.

    Returns:
        The text of the script, and all options of sbatch. The text contains the options, too. On the command line they
        override SBATCH_* variables, and may have multi-line values, which ``#SBATCH`` lines can't.
    """
    options = list(_options(cluster, len(runs), name, output))
    lines = [directive(option) for option in options if "\n" not in option]
    workers = f"{counted(cluster.nodes, 'node')} x {counted(int(cluster.gpus_per_node), 'worker')}"
    launch = f"{'python' if cluster.setup else shlex.quote(python)} {shlex.quote(launcher)}"
    cpus = _cpus_per_task(cluster)
    srun = ["srun", "--ntasks-per-node=1", *([f"--cpus-per-task={cpus}"] if cpus else []), "--kill-on-bad-exit=0"]
    srun.append(f"--wait={math.ceil(cluster.timeout_s)}")  # ends hanging tasks after the first task has ended
    text = [
        "#!/bin/bash",
        f"# {counted(len(runs), 'run')} of Isobatch on {workers}, submitted by `python launch.py cluster=slurm`.",
        *lines,
        "",
        *(_array(runs) if len(runs) > 1 else [f"run=({shlex.join(runs[0])})"]),
        "",
        "# One task per node starts that node's workers. When the job has to stop, Slurm signals them, they save",
        "# and end. This shell outlives them, checks how they ended, and requeues the job if they were stopped.",
        "trap : TERM",
        *(["", "# cluster.setup", *cluster.setup, ""] if cluster.setup else []),
        f'{" ".join(srun)} {launch} "${{run[@]}}" &',
        'until wait "$!"; code=$?; ! kill -0 "$!" 2> /dev/null; do :; done',
        "trap '' TERM",
        f'ISOBATCH_STEP_CODE=$code exec {launch} "${{run[@]}}" action=requeue',
        "",
    ]
    return "\n".join(text), tuple(options)


def _options(cluster: Slurm, runs: int, name: str, output: str) -> Iterator[str]:
    """Yield the options of sbatch."""
    yield f"--job-name={name}"
    yield f"--output={output}"
    yield "--open-mode=append"
    yield "--requeue"
    yield f"--nodes={cluster.nodes}"
    yield "--ntasks-per-node=1"
    if cpus := _cpus_per_task(cluster):
        yield f"--cpus-per-task={cpus}"
    if cluster.gres == "gpus-per-node":
        yield f"--gpus-per-node={cluster.gpus_per_node}"
    if cluster.gres == "gres":
        yield f"--gres=gpu:{cluster.gpus_per_node}"
    if cluster.mem_gb is not None:
        yield f"--mem={round(cluster.mem_gb * 1024)}M"
    if cluster.time_min is not None:
        yield f"--time={cluster.time_min}"
    if cluster.signal_s:
        yield f"--signal=USR2@{cluster.signal_s}"
    for option in (
        "partition", "account", "qos", "constraint", "exclude", "nodelist", "reservation", "dependency", "comment",
    ):  # fmt: skip
        if (value := getattr(cluster, option)) is not None:
            yield f"--{option}={value}"
    if cluster.mail is not None:
        yield f"--mail-user={cluster.mail}"
        yield f"--mail-type={MAIL}"
    if runs > 1:
        yield f"--array=0-{runs - 1}" + (f"%{cluster.max_parallel}" if cluster.max_parallel else "")
    yield from cluster.extra


def _cpus_per_task(cluster: Slurm) -> int | None:
    return None if cluster.cpus_per_gpu is None else cluster.cpus_per_gpu * int(cluster.gpus_per_node)


def _array(runs: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the lines that select the run of an array element."""
    yield 'case "$SLURM_ARRAY_TASK_ID" in'
    for number, words in enumerate(runs):
        yield f"{number}) run=({shlex.join(words)}) ;;"
    yield "esac"


def directive(option: str) -> str:
    """Return the ``#SBATCH`` line of ``option``. sbatch parses double quotes and backslashes like a shell."""
    name, equals, value = option.partition("=")
    if set(value) & set(" \t\r#'\"\\"):
        value = '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"#SBATCH {name}{equals}{value}"
