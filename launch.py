"""Isobatch's command: compose the config, resolve it to a plan, do one action, and end with its exit code."""
# ruff: noqa: E402

from __future__ import annotations

import gc
import os
import sys

HERE = os.path.dirname(os.path.realpath(__file__))
INSTALLED = os.path.exists(f"{HERE}/__init__.py")  # then this is the package's own folder, else a clone's
if __name__ == "__main__" and INSTALLED and os.path.realpath(sys.path[0]) == HERE:
    # A file of the installed package was run: its folders must not take the place of the user's conf or trainers.
    sys.path.append(os.path.dirname(sys.path.pop(0)))

from isobatch.trainers.ranks.signals import Stop

STOP = Stop()
if __name__ == "__main__":
    STOP.install()  # before all else: a signal that comes while the rest is imported isn't lost
    gc.disable()  # what is imported stays; workers turn it on again

from importlib.util import find_spec

if __name__ == "__main__" and not (find_spec("hydra") and find_spec("pydantic")):
    print(
        f"isobatch: the packages that Isobatch needs aren't installed for {sys.executable}; run `make train` once, or "
        "`source .venv/bin/activate`",
        file=sys.stderr,
    )
    sys.exit(2)

import shlex
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from isobatch.actions import (
    describe_start,
    forget_other_launchers,
    list_runs,
    plan_from_checkpoint,
    planned,
    report,
    show,
    sweep,
    train,
    warn_of_unused,
)
from isobatch.conf.compose import refuse_typo
from isobatch.conf.existing import tuning_directory
from isobatch.conf.groups import Slurm
from isobatch.conf.hardware import refuse_unless_startable, under_torchrun
from isobatch.conf.help import annotated, command_line, help_text
from isobatch.conf.identity import run_directory
from isobatch.conf.rundir.directory import RunDir
from isobatch.conf.terminal import answer, first, say_once, secure_streams
from isobatch.scaling.errors import UserError
from isobatch.scaling.planning.automatic import configured
from isobatch.trainers.launch.children import count_samples, guarded
from isobatch.trainers.launch.start import launch, run_in_process, run_under_torchrun
from isobatch.trainers.launch.worker import import_torch, leave
from isobatch.trainers.tuning.child import estimate_memory

COUNT, ESTIMATE = partial(count_samples, stop=STOP), partial(estimate_memory, stop=STOP)

if TYPE_CHECKING:
    from isobatch.conf.schema import RunConfig


def main(arguments: list[str], kept: list[object]) -> int:
    """Do what ``arguments`` ask for; return the exit code.

    Args:
        kept: see ``World``; this process is a worker under torchrun and with ``debug=true``.

    Raises:
        UserError: the command isn't valid.
    """
    args, trains = command_line(arguments), partial(work, kept, allocation=None)
    if args.config_dir is not None:  # a task may lie beside its YAML; jobs and spawned workers look for it there, too
        beside = os.path.dirname(os.path.abspath(args.config_dir))
        sys.path.insert(1, beside)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (beside, os.environ.get("PYTHONPATH"))))
    if args.help:
        answer(help_text(args.overrides, args.config_dir), end="")
        return 0
    if args.multirun:
        if args.cfg or under_torchrun():
            other = "--cfg prints one config" if args.cfg else "torchrun starts workers of one run"
            raise UserError(f"-m is a sweep of several runs, but {other}; leave out one of the two")
        return sweep(args.overrides, args.config_dir, COUNT, ESTIMATE, trains, STOP)
    config = configured(args.overrides, args.config_dir)
    refuse_typo(args.overrides, config)
    warn_of_unused([(args.overrides, config)])
    if args.cfg:
        answer(annotated(config, args.overrides, args.config_dir))
        return 0
    if config.action == "runs":
        return list_runs(config)
    if config.action == "report":
        return report(config)
    if config.action == "requeue":
        from isobatch.slurm import jobs  # here and below: a plan, which has no use for it, answers at once

        code, why = jobs.end(RunDir(run_directory(config)), config)
        say_once(why)
        return code
    allocation = None
    if isinstance(config.cluster, Slurm) and config.action != "plan" and not config.cluster.dry_run:
        from isobatch.slurm.allocation import Allocation, as_local

        if allocation := Allocation.within():
            config = as_local(config, allocation)
    if config.action in ("evaluate", "tune"):
        refuse_unless_startable(config)
        directory = tuning_directory(config) if config.action == "tune" else ""
        return trains(config, str(directory), allocation=allocation)
    if config.action == "plan" and not first():
        return 0  # the first of the ranks prints it
    plan, directory = planned(config, COUNT), run_directory(config)
    if config.action == "plan" and plan:
        show(plan_from_checkpoint(plan, config, RunDir(directory)), config, ESTIMATE)
        return 0
    return train(config, plan, directory, partial(trains, allocation=allocation))


def work(kept: list[object], config: RunConfig, run_dir: str = "", extends: bool = False, *, allocation: Any) -> int:
    """Start the workers, or be one of them; return the exit code."""
    start = describe_start(config, shlex.join(["python", *sys.argv]), run_dir, extends)
    if allocation:
        start = replace(start, hosts=allocation.hosts, host=allocation.host, kill_wait_s=allocation.kill_wait_s)
    import_torch(config)
    if config.action == "evaluate":
        from isobatch.trainers.loop.evaluate_weights import evaluate_weights as body
    elif config.action == "tune":
        from isobatch.trainers.tuning.tune import tune as body
    else:
        from isobatch.trainers.run import train as body
    if under_torchrun():
        return run_under_torchrun(config, start, body, STOP, kept)
    if config.debug:
        return run_in_process(config, start, body, STOP, kept).exit_code
    return launch(config, start, body, STOP)


def begin(kept: list[object]) -> int:
    """Run the command in the working directory, whose modules are found before any others."""
    try:
        sys.path.insert(0, os.getcwd())
    except FileNotFoundError:
        raise UserError("the working directory was deleted", "change to one that exists") from None
    return main(sys.argv[1:], kept)


def command() -> NoReturn:
    """Run the command line, and end this process with its exit code."""
    STOP.install()  # the script ``isobatch`` imports this file, so nothing has done it yet
    gc.disable()
    secure_streams()
    if not under_torchrun():
        forget_other_launchers()
    kept: list[object] = []  # until this process has ended
    leave(guarded(partial(begin, kept)))


if __name__ == "__main__":
    command()
