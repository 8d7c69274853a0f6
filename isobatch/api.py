"""The Python API: the same runs as by ``python launch.py``, from a script or a notebook.

    result = isobatch.train(MyTask, "batch.global_size=64", "lr.peak=0.1", "duration=5ep")
    result.metrics["val/loss"]

One worker runs in the calling process. Several run in child processes, which import the task.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isobatch import actions
from isobatch.conf.command import command_of
from isobatch.conf.compose import refuse_typo
from isobatch.conf.hardware import under_torchrun, workers_here
from isobatch.conf.identity import run_directory
from isobatch.conf.overrides import override
from isobatch.conf.rundir.directory import RunDir
from isobatch.conf.rundir.files import holds_run
from isobatch.conf.rundir.outcome import EXIT_CODE, State
from isobatch.conf.rundir.reading import metric_lines
from isobatch.scaling.errors import UserError
from isobatch.scaling.planning.automatic import configured
from isobatch.trainers.launch.start import process_kept, run_here
from isobatch.trainers.launch.worker import import_torch

if TYPE_CHECKING:
    from torch import nn

    from isobatch.conf.schema import RunConfig
    from isobatch.scaling.plan import Plan
    from isobatch.scaling.report.compare.comparison import Report

__all__ = ["Result", "UserError", "history", "load", "plan", "report", "train"]


@dataclass(frozen=True, slots=True)
class Result:
    """Describe how a run ended.

    Attributes:
        state: ``finished`` or ``stopped``, as in ``outcome.json``.
        directory: the run directory.
        metrics: the last value of each name in ``metrics.jsonl``.
    """

    state: State
    directory: Path
    metrics: dict[str, Any]


def train(task: type | str | None = None, *overrides: str, config_dir: str | Path | None = None) -> Result:
    """Train, or resume; a finished run is not trained again.

    Args:
        task: the task's class or its dotted name; None if the overrides name it.
        overrides: as on the command line, such as ``"batch.global_size=64"``.
        config_dir: a folder of YAML files, as ``--config-dir``.

    Raises:
        UserError: an override, or the task, isn't valid.
        RuntimeError: the run crashed.
        KeyboardInterrupt: the user interrupted it; the same call resumes from the last checkpoint.
    """
    words = [*_task_words(task, overrides), *overrides]
    with _importable(config_dir):
        config = _asked(words, config_dir)
        _refuse_unless_trainable(config)
        plan, directory = actions.planned(config, _count), run_directory(config)
        if workers_here(config) == 1 and config.cluster.nodes == 1 and config.engine.name == "ddp":
            command = f"isobatch.train({', '.join(map(repr, [config.task.target, *overrides]))})"
            actions.warn_of_unused([(words, config)])
            actions.train(config, plan, directory, partial(_work, command))
        else:
            _train_in_children(config, words, config_dir, RunDir(directory))
    outcome = RunDir(directory).outcome()
    assert outcome is not None
    metrics: dict[str, Any] = {}
    for line in history(directory):
        metrics |= line
    return Result(outcome.state, directory, metrics)


def plan(*overrides: str, config_dir: str | Path | None = None) -> Plan:
    """Return the plan of a run, as ``action=plan`` prints it.

    Raises:
        UserError: an override, or the task, isn't valid.
    """
    words = [*overrides, "action=plan"]
    with _importable(config_dir):
        config = _asked(words, config_dir)
        actions.warn_of_unused([(words, config)])
        found = actions.planned(config, _count)
        assert found is not None
        return actions.plan_from_checkpoint(found, config, RunDir(run_directory(config)))


def load(directory: str | Path, task: type | str | None = None) -> tuple[Any, nn.Module]:
    """Return the task of a run, and its model on the CPU, in eval mode, with the newest weights.

    Args:
        directory: the run directory.
        task: needed where the run trained a class of a notebook or script.

    Raises:
        UserError: the directory holds no run or no good weights, or the task can't be imported.
    """
    run = _run_in(directory)
    with _importable(None), process_kept():
        from isobatch.trainers.checkpoints.weights import initialise
        from isobatch.trainers.model.randomness import seed_generators
        from isobatch.trainers.ranks.world import World
        from isobatch.trainers.tasks.task import make_model, make_task

        config = configured([override("run.dir", str(run.path))])
        if task is not None:
            trained = config.task.model_copy(update={"target": _target(task)})
            config = config.model_copy(update={"task": trained})
        _refuse_lost_class(config)
        seed_generators(config.seed)  # a task may draw what its model is made of
        made = make_task(config)
        model = make_model(config, made)
        initialise(model, str(run.path), World.alone())
    return made.own, model.eval()


def history(directory: str | Path) -> list[dict[str, Any]]:
    """Return the lines of the run's ``metrics.jsonl``. Raises UserError if the directory holds no run."""
    return metric_lines(_run_in(directory).path)


def report(directories: str | Path | Sequence[str | Path], *overrides: str) -> Report:
    """Compare runs, and write tables, plots and a page, as ``action=report`` does.

    Args:
        directories: a run directory, a sweep, a folder of runs, or several of these; [] with ``report.points=…``.
        overrides: such as ``"report.target=val/accuracy>=0.97"`` or ``"report.dir=here"``.

    Returns:
        The report: ``print`` shows its table, ``directory`` is where its files are.

    Raises:
        UserError: a folder holds no runs, or an override isn't valid.
    """
    roots = [directories] if isinstance(directories, str | Path) else directories
    words = [*overrides, "action=report"]
    config = _asked(words)
    if not roots and config.report.points is None:
        raise UserError("isobatch.report was given no directories", "name a run, a sweep or a folder of runs")
    instead = {"run.dir": "the first argument names the runs", "output": "the report's attribute json is the JSON"}
    for key in instead.keys() & config.given:
        raise UserError(f"isobatch.report takes no {key}", instead[key], key)
    actions.warn_of_unused([(words, config)])
    return actions.compared(config, list(map(str, roots)))


def _asked(words: Sequence[str], config_dir: str | Path | None = None) -> RunConfig:
    """Return the config that overrides ask for. Raises UserError, as the command does."""
    config = configured(words, config_dir)
    refuse_typo(words, config)
    return config


def _run_in(directory: str | Path) -> RunDir:
    run = RunDir(Path(directory).expanduser())
    if not holds_run(run.path):
        raise UserError(f"{directory} holds no run", "name a run directory, such as the directory of a Result")
    return run


def _task_words(task: type | str | None, overrides: Sequence[str]) -> list[str]:
    """Return the overrides that name the task."""
    if task is None:
        return []
    if isinstance(task, str) and "=" in task:
        raise UserError(f"{task!r} is an override, and the first argument is the task", "give the task or None first")
    resumed = [Path(text.removeprefix("run.dir=")).expanduser() for text in overrides if text.startswith("run.dir=")]
    chosen = any(text.startswith("task=") for text in overrides) or any(map(holds_run, resumed))
    return [*([] if chosen else ["task=custom"]), f"task._target_={_target(task)}"]


def _target(task: type | str) -> str:
    """Return the dotted name by which ``task`` can be found."""
    if isinstance(task, str):
        return task
    if not isinstance(task, type):
        problem = f"the task is an object of {type(task).__name__}, not a class"
        raise UserError(problem, "give its class, and its arguments as task.args.NAME=…")
    found: Any = sys.modules.get(task.__module__)
    for name in task.__qualname__.split("."):
        found = getattr(found, name, None)
    target = f"{task.__module__}.{task.__qualname__}"
    if found is not task:
        raise UserError(f"{target} isn't the class that was given", "define it outside of functions")
    return target


def _refuse_unless_trainable(config: RunConfig) -> None:
    if config.action != "train" or config.cluster.name == "slurm":
        asked = "cluster=slurm" if config.action == "train" else f"action={config.action}"
        raise UserError(f"isobatch.train trains, and {asked} doesn't", f"use `python -m isobatch.launch {asked} …`")
    if under_torchrun():
        raise UserError("isobatch.train starts its workers itself, and torchrun started this process", "use python")
    _refuse_lost_class(config)
    several = config.engine.name != "ddp" or workers_here(config) > 1 or config.cluster.nodes > 1
    if config.task.target.startswith("__main__.") and several:
        raise UserError(
            f"{config.task.target} is a class of this notebook or script, and other processes can't import it",
            "move it to a module, or train with cluster.gpus_per_node=1 engine=ddp",
            "task._target_",
            config.task.target,
        )


def _refuse_lost_class(config: RunConfig) -> None:
    module, _, name = config.task.target.partition(".")
    if module == "__main__" and not hasattr(sys.modules["__main__"], name):
        raise UserError(
            f"the run trained {name}, a class of a notebook or script",
            "define it here, and pass it",
            "task._target_",
            config.task.target,
        )


@contextmanager
def _importable(config_dir: str | Path | None) -> Iterator[None]:
    """Make tasks importable from the working directory and from beside ``config_dir``."""
    before = list(sys.path)
    beside = [] if config_dir is None else [str(Path(config_dir).absolute().parent)]
    sys.path[:0] = [os.getcwd(), *beside]
    try:
        yield
    finally:
        sys.path[:] = before


def _count(config: RunConfig) -> int:
    """Return the number of training samples, counted in this process."""
    with process_kept():
        from isobatch.trainers.ranks.signals import Stop
        from isobatch.trainers.ranks.world import World
        from isobatch.trainers.tasks.prepare import prepare_data
        from isobatch.trainers.tasks.task import make_task, open_data

        task = make_task(config)
        prepare_data(task, World.alone(), Stop(), config.cluster.timeout_s)
        return len(open_data(task, config))


def _work(command: str, config: RunConfig, run_dir: str, extends: bool) -> int:
    """Train in this process; return the exit code that a command would have."""
    with process_kept():
        actions.forget_other_launchers()
        import_torch(config)
        from isobatch.trainers.run import train as body

        return run_here(config, actions.describe_start(config, command, run_dir, extends), body).exit_code


def _train_in_children(config: RunConfig, words: list[str], config_dir: str | Path | None, run: RunDir) -> None:
    """Train by a command in a child process, and relay its output."""
    options = [] if config_dir is None else [f"--config-dir={config_dir}"]
    command = command_of("isobatch.launch", *options, *words)
    pipe: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    said = ""
    with subprocess.Popen(command, **pipe) as child:
        assert child.stdout is not None
        try:
            for said in child.stdout:
                print(said, end="", flush=True)
        except KeyboardInterrupt:
            child.send_signal(signal.SIGTERM)  # it saves, and ends
            for said in child.stdout:
                print(said, end="", flush=True)
            raise
    cause = said.strip().removeprefix("isobatch: ")
    if child.returncode == EXIT_CODE["refused"]:
        raise UserError(cause)
    if child.returncode not in (EXIT_CODE["finished"], EXIT_CODE["stopped"]):
        raise RuntimeError(f"{cause} (exit code {child.returncode} of {shlex.join(command)})")
