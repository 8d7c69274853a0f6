"""Actions of the command and the API: plan, train, submit, list runs, sweep."""

from __future__ import annotations

import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from isobatch.conf.compose import unused_keys
from isobatch.conf.existing import extends, lengthened
from isobatch.conf.groups import Slurm
from isobatch.conf.hardware import (
    IN_SWEEP,
    enter_slot,
    refuse_unless_startable,
    runs_at_a_time,
    under_torchrun,
    world_size,
)
from isobatch.conf.rundir.directory import RunDir
from isobatch.conf.rundir.files import holds_run
from isobatch.conf.rundir.outcome import EXIT_CODE, Outcome
from isobatch.conf.rundir.rejected import removed_if_rejected
from isobatch.conf.sweep import Element, expand, sweep_directories
from isobatch.conf.terminal import answer, answer_once, first, say, say_once
from isobatch.conf.trackers import refuse_missing_packages
from isobatch.scaling.errors import UserError
from isobatch.scaling.geometry import counted
from isobatch.scaling.limits import one_line
from isobatch.scaling.planning.automatic import configured
from isobatch.scaling.planning.resolve import continued, resolve
from isobatch.scaling.report.grid import grid
from isobatch.scaling.report.plan_json import to_json
from isobatch.scaling.report.plan_table import row_of, table
from isobatch.scaling.tuning.estimated import memory_row, memory_rows, refuse_absurd, refuse_too_small
from isobatch.scaling.tuning.results import FOLDER
from isobatch.trainers.launch.changes import differences
from isobatch.trainers.launch.children import train_elements, trained_columns, tuned_columns
from isobatch.trainers.launch.source import commit_of, folder_of, repository_of
from isobatch.trainers.launch.worker import import_torch
from isobatch.trainers.ranks.session import Start

if TYPE_CHECKING:
    from isobatch.conf.schema import RunConfig
    from isobatch.scaling.plan import Plan
    from isobatch.scaling.report.compare.comparison import Report
    from isobatch.scaling.report.result import Result
    from isobatch.scaling.tuning.estimated import Estimate
    from isobatch.trainers.ranks.signals import Stop

LAUNCHER = Path(__file__).with_name("launch.py").resolve()
# Installed, launch.py lies within the package, which may be in a repository of someone else's.
INSTALLED = LAUNCHER.parent == Path(__file__).resolve().parent

T = TypeVar("T")

Count = Callable[["RunConfig"], int]
"""Open the training data and return the number of samples."""

EstimateMemory = Callable[["RunConfig", "Plan"], "Estimate"]
"""Estimate the memory of a plan."""

Work = Callable[["RunConfig", str, bool], int]
"""Train in a directory, extending a finished run or not; return the exit code."""


def planned(config: RunConfig, count: Count) -> Plan | None:
    """Return the plan for the hardware that the config names; None if only the ranks can make it.

    The ranks make it if several processes got this command and the plan needs the length of the data, which is
    opened once each machine has prepared it.
    """
    if config.action == "tune":
        refuse_unless_startable(config)
    elif isinstance(config.cluster, Slurm):
        from isobatch.slurm.submit import refuse_unless_submittable

        refuse_unless_submittable(config)
    elif config.action == "train":
        refuse_unless_startable(config)
        refuse_missing_packages(config.log.to)
    if config.action == "train":
        to_open = config.batch.global_size == "all" and config.task.train_samples is None  # as large as the data is
        if to_open and not isinstance(config.cluster, Slurm) and (under_torchrun() or config.cluster.nodes > 1):
            return None
    else:
        to_open = config.plan.open_data
    return resolve(config, world_size(config), count(config) if to_open else None)


def plan_from_checkpoint(plan: Plan, config: RunConfig, run: RunDir) -> Plan:
    """Return ``plan`` as it continues from the newest readable checkpoint of ``run``; without one, as it is.

    Raises:
        UserError: the run can't resume with this config.
    """
    if not run.checkpoints.is_dir():
        return plan
    from isobatch.trainers.tensors.manifest import Damaged, read
    from isobatch.trainers.tensors.names import checkpoints

    for path in checkpoints(run):
        with suppress(Damaged):
            header = read(path).header
            longer = lengthened(config, header.identity, header.duration)
            if not longer and header.identity != plan.identity:
                break
            return continued(plan, header.plan, extends=longer)
    return plan


def show(plan: Plan, config: RunConfig, estimate: EstimateMemory) -> None:
    """Print ``plan``, and with ``plan.memory`` the estimate of its memory."""
    memory = estimate_if_wanted(plan, config, estimate)
    if config.output == "json":
        more = {} if memory is None else {"memory": memory.as_json()}
        answer_once(to_json(plan, more))
        return
    answer_once(table(plan, full=config.output == "full", more=() if memory is None else memory_rows(memory)))


def estimate_if_wanted(plan: Plan, config: RunConfig, estimate: EstimateMemory) -> Estimate | None:
    """Return the estimate of the memory of ``plan``; None without ``plan.memory``. Raises UserError."""
    if not config.plan.memory:
        return None
    for key in ("memory_gb", "gpu_memory_gb"):
        refuse_absurd(getattr(config.cluster, key), f"cluster.{key}")
    found = estimate(config, plan)
    refuse_too_small(found)
    return found


def train(config: RunConfig, plan: Plan | None, directory: Path, work: Work, *, keep: bool = False) -> int:
    """Train in ``directory`` or submit a job that does; show the result of a run that is finished there.

    Args:
        keep: keep the directory of a rejected start, in which its outcome is.
    """
    from isobatch.slurm import jobs
    from isobatch.slurm.state import JobStart

    run = RunDir(directory)
    dry = isinstance(config.cluster, Slurm) and config.cluster.dry_run
    before, longer = last_attempt(run, config)
    if is_finished(before, longer) and not dry:
        done = _ended(directory)
        on = f"{done.early.partition('=')[0]}=null goes on; " if done.early else ""
        say_once(f"{done} · {directory} ({on}run.new=true trains again)")
        for difference in differences(run, config, code_now(config)) if first() else ():
            say_once(difference)
        return 0
    if plan and not dry and (isinstance(config.cluster, Slurm) or config.task.train_samples is not None):
        say_once(
            table(plan_from_checkpoint(plan, config, run), full=config.output == "full")
        )  # else rank 0 prints it, once the data is opened
    if config.run.directory and not holds_run(directory) and not dry:
        say_once(f"a new run, in {directory}")
    if isinstance(config.cluster, Slurm):
        say_once(jobs.submit([config], [run], run, LAUNCHER))
        return 0
    if first() and (why := jobs.begin(run)):
        say_once(why)
    alone = not (under_torchrun() or config.cluster.nodes > 1 or JobStart.here().id)  # else others may still use it
    with removed_if_rejected(directory) if alone and not keep else nullcontext():
        code = work(config, str(directory), longer)
    if code not in (EXIT_CODE["finished"], EXIT_CODE["stopped"]):
        return code  # the cause is printed already; another directory may be in this one's place by now
    after = run.outcome()
    if after and after != before:
        with suppress(OSError):  # a full disk under the output doesn't change how the run ended
            how = f"run.dir={directory}" if config.run.new else "the same command"
            resumes = f" ({how} resumes)" if code == EXIT_CODE["stopped"] else ""
            say_once(f"{_ended(directory)} · {directory}{resumes}")
    return code


def _ended(directory: Path) -> Result:
    from isobatch.scaling.report.result import result

    return result(directory)


def describe_start(config: RunConfig, command: str, run_dir: str, extends: bool) -> Start:
    """Describe a start of this ``command``."""
    from isobatch.slurm.state import JobStart

    start, job = Start(uuid.uuid4().hex[:12], command, **code_now(config)), JobStart.here()
    return replace(start, run_dir=run_dir, extends=extends, job=job.id, job_restart=job.restart)


def list_runs(config: RunConfig) -> int:
    """Print the runs in ``run.dir``, else those in runs/ and in the queue."""
    from isobatch.scaling.report.runs import listing

    jobs = _jobs(config.run.directories or ["runs"])
    usual = ["runs", *sorted({job.root for job in jobs.values() if job.root})]
    roots = config.run.directories or list(filter(os.path.exists, usual)) or ["runs"]
    states = {job: str(one) for job, one in jobs.items()}
    answer_once(listing(roots, states, config.output, config.report.where, config.report.sort))
    return 0


def report(config: RunConfig) -> int:
    """Compare the runs in ``run.dir``, else those in runs/: write a report and print its tables."""
    if not first():
        return 0
    made = compared(config, config.run.directories or ([] if config.report.points is not None else ["runs"]))
    page, *more = made.files  # report.html, or report.md without the extra
    where = f"written to {made.directory}/{page} and {counted(len(more), 'more file')}"
    answer(made.json if config.output == "json" else f"{made}\n\n{where}")
    return 0


def compared(config: RunConfig, roots: Sequence[str]) -> Report:
    """Compare the runs in ``roots``, and write the report. Raises UserError."""
    from isobatch.scaling.report.compare.make import make_report

    return make_report(roots, config.report, {job: str(one) for job, one in _jobs(roots).items()})


def _jobs(roots: Sequence[str]) -> dict[str, Any]:
    """Return the queued jobs by id. If squeue fails, return none, and warn if a run in ``roots`` was in a job."""
    from isobatch.scaling.report.runs import any_in_a_job
    from isobatch.slurm.state import queued

    try:
        return dict(queued()) if shutil.which("squeue") else {}
    except UserError as error:
        if any_in_a_job(roots):
            say(f"isobatch: the queue can't be seen: {one_line(str(error).splitlines()[0])}", sys.stderr)
        return {}


def sweep(
    overrides: list[str], config_dir: str | None, count: Count, estimate: EstimateMemory, work: Work, stop: Stop
) -> int:
    """Plan all runs of a sweep, then train them in turn, each in a child process, or submit a job array."""
    os.environ[IN_SWEEP] = "1"
    elements = expand(overrides, config_dir)
    configs = _for_each(elements, [partial(configured, element.overrides, config_dir) for element in elements])
    directories = sweep_directories(configs, [element.swept for element in elements])
    plans: list[Any] = _for_each(elements, [partial(planned, config, count) for config in configs])
    warn_of_unused([(element.overrides, config) for element, config in zip(elements, configs, strict=True)])
    if configs[0].action == "plan":
        memories = [estimate_if_wanted(*one, estimate) for one in zip(plans, configs, strict=True)]
        show_sweep(elements, plans, memories, configs[0].output)
        return 0
    runs = [RunDir(directory) for directory in directories]
    left = [number for number, (run, config) in enumerate(zip(runs, configs, strict=True)) if not finished(run, config)]
    if not any(isinstance(config.cluster, Slurm) for config in configs):
        if not any(config.cluster.environment for config in configs):
            import_torch(configs[0])  # once for all of them
        tunes = configs[0].action == "tune"
        works = [partial(_work_in_slot, *run, work) for run in zip(configs, plans, directories, strict=True)]
        columns = tuned_columns if tunes else trained_columns
        return train_elements(elements, directories, works, stop, runs_at_a_time(configs[0]), columns)
    from isobatch.slurm import jobs
    from isobatch.slurm.allocation import Allocation

    dry = getattr(configs[0].cluster, "dry_run", False)
    if not dry and Allocation.within():
        raise UserError("-m within a job: a sweep on Slurm is an array of jobs", "submit it from outside")
    if not dry:
        say_once(grid([elements[number].column | row_of(plans[number]) for number in left]))
    if left:
        chosen = [configs[number] for number in left], [runs[number] for number in left]
        say_once(jobs.submit(*chosen, RunDir(directories[0].parent), LAUNCHER))
    return 0


def show_sweep(
    elements: Sequence[Element], plans: Sequence[Plan], memories: Sequence[Estimate | None], output: str
) -> None:
    """Print the plans of a sweep, with the estimates of their memory, if any."""
    if output == "json":
        extras = [{} if memory is None else {"memory": memory.as_json()} for memory in memories]
        answer_once("[" + ",\n".join(map(to_json, plans, extras)) + "]")
        return
    rows = [element.column | row_of(plan) for element, plan in zip(elements, plans, strict=True)]
    more = [{} if memory is None else memory_row(memory) for memory in memories]
    answer_once(grid([row | extra for row, extra in zip(rows, more, strict=True)]))


def _work_in_slot(config: RunConfig, plan: Plan | None, directory: Path, work: Work, slot: int) -> int:
    """Train or tune one of several runs at a time, on its share of the GPUs."""
    enter_slot(config, slot)
    if config.action == "tune":
        return work(config, str(directory / FOLDER), False)
    return train(config, plan, directory, work, keep=True)


def _for_each(elements: Sequence[Element], works: Sequence[Callable[[], T]]) -> list[T]:
    """Return the result of the work for each element of a sweep. A rejection names the element."""
    results: list[T] = []
    for element, work in zip(elements, works, strict=True):
        try:
            results.append(work())
        except UserError as error:
            problem = ": ".join(filter(None, [" ".join(element.swept), error.problem]))
            raise UserError(problem, error.fix, error.key, error.value) from None
    return results


def warn_of_unused(commands: Iterable[tuple[Sequence[str], RunConfig]]) -> None:
    """Print each warning of ``unused_keys`` once, in the first of the processes that were given the command.

    Args:
        commands: overrides and the config that they ask for; of a sweep those of each element.
    """
    texts = [text for overrides, config in commands if first() for text in unused_keys(overrides, config)]
    for text in dict.fromkeys(texts):
        say(f"warning: {text}", sys.stderr)


def finished(run: RunDir, config: RunConfig) -> bool:
    """Return whether the run is trained to its end and ``config`` doesn't extend it. Raises UserError."""
    return is_finished(*last_attempt(run, config))


def last_attempt(run: RunDir, config: RunConfig) -> tuple[Outcome | None, bool]:
    """Return the outcome of the run's last attempt, None if there was none, and whether ``config`` extends the run.

    Raises:
        UserError: the directory can't be used for this run.
    """
    run.refuse_foreign()
    return run.outcome(), extends(run.path, config)


def is_finished(outcome: Outcome | None, longer: bool) -> bool:
    return outcome is not None and outcome.state == "finished" and not longer


def code_now(config: RunConfig) -> dict[str, Any]:
    """Return the commit of this checkout, and the state of the repository that the user's code is in."""
    return {"commit": "" if INSTALLED else commit_of(LAUNCHER.parent), "repository": repository_of(folder_of(config))}


def forget_other_launchers() -> None:
    """Remove variables of another launcher from the environment, so that they aren't taken for a rank of ours."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
